"""Chat templates in the manner of several families, a tokenizer for them, and a model that says what a test wants.

The templates are written for these tests: each has the traps of its family, and nothing more.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from arealite.api.types import Completion

CHATML_CALLS = """{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}"""

# Thoughts before the last question are left out; results of tools are a user's turn together; a default system message.
QWEN3 = (
    """{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}{{- 'You help.' }}{%- endif %}
{%- for tool in tools or [] %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and m.reasoning_content %}
{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
{{- m.content.strip('\\n') }}"""
    + CHATML_CALLS
    + """{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

# The token that ends an answer is the opening of the next turn; thoughts go, unless clear_thinking is false.
GLM = """{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|user|>\\n' + m.content }}
{%- elif m.role == 'system' %}{{- '<|system|>\\n' + m.content }}
{%- elif m.role == 'assistant' %}{{- '<|assistant|>\\n' }}
{%- if m.reasoning_content and clear_thinking is defined and not clear_thinking %}
{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}{{- '\\n<tool_call>' + call.function.name }}
{%- for name, value in call.function.arguments.items() %}{{- '<arg>' + name + '=' + (value | string) }}{%- endfor %}
{{- '</tool_call>' }}{%- endfor %}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
{{- '\\n<tool_response>' + m.content + '</tool_response>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

# Nothing is written between the end of a turn and the next one; results need the name of their call.
KIMI = """{%- if tools %}{{- '<|im_system|>tools<|im_middle|>' + (tools | tojson) + '<|im_end|>' }}{%- endif %}
{%- for m in messages %}
{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' if m.role in ('user', 'assistant', 'system') }}
{%- if m.role == 'tool' %}{{- '<|im_system|>tool<|im_middle|>## Return of ' + m.tool_call_id + '\\n' }}{%- endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>' + call.id + (call.function.arguments | tojson) + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}"""

# Neighbouring turns are folded; the prompt opens a thought; what stands before its end is cut from the history.
DEEPSEEK = """{{- '<bos>' }}{%- for m in messages if m.role == 'system' %}{{- m.content }}{%- endfor %}
{%- for tool in tools or [] %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{%- set ns = namespace(of='') %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '\\n\\n' + m.content if ns.of == 'user' else '<User>' + m.content }}{%- set ns.of = 'user' %}
{%- elif m.role == 'assistant' %}
{{- '<Assistant>' + m.content.split('</think>')[-1] }}
{%- for call in m.tool_calls or [] %}{{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) }}
{%- endfor %}{{- '<eos>' }}{%- set ns.of = 'assistant' %}
{%- elif m.role == 'tool' %}{{- '<result>' if ns.of == 'tool' else '<results><result>' }}
{{- m.content + '</result>' }}{%- set ns.of = 'tool' %}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant><think>\\n' }}{%- endif %}"""

# A default system message with a date, content without the blanks around it, one call at most.
LLAMA3 = """{{- '<bos><|header|>system<|/header|>\\n\\nCutting date: 2023\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- endif %}{{- '<|eot|>' }}
{%- for m in messages if m.role != 'system' %}
{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{{- '<|header|>assistant<|/header|>\\n\\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- (m.tool_calls[0].function.arguments | tojson) + '}<|eot|>' }}
{%- elif m.role == 'tool' %}
{%- if not messages[loop.index0 - 1] %}{{- raise_exception('a result of nothing') }}{%- endif %}
{{- '<|header|>ipython<|/header|>\\n\\n' + (m.content | tojson) + '<|eot|>' }}
{%- else %}{{- '<|header|>' + m.role + '<|/header|>\\n\\n' + (m.content | trim) + '<|eot|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}"""

# template, the tokens that end answers
FAMILIES = {
    "qwen3": (QWEN3, ["<|im_end|>"]),
    "glm": (GLM, ["<|user|>", "<|observation|>"]),
    "kimi": (KIMI, ["<|im_end|>"]),
    "deepseek": (DEEPSEEK, ["<eos>"]),
    "llama3": (LLAMA3, ["<|eot|>"]),
}
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|im_middle|>", "<|im_user|>", "<|im_assistant|>"]
SPECIAL += ["<|im_system|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"]
SPECIAL += ["<User>", "<Assistant>", "<|header|>", "<|/header|>", "<|eot|>", "<think>", "</think>"]


def family_tokenizer(template: str, end: str) -> PreTrainedTokenizerFast:
    """Over bytes, with a token for two line ends, so that what stands side by side is cut otherwise when it is
    encoded together."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {symbol: i for i, symbol in enumerate([*alphabet, "ĊĊ", *SPECIAL])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=end)
    tokenizer.add_special_tokens({"additional_special_tokens": [s for s in SPECIAL if s not in ("<bos>", end)]})
    tokenizer.chat_template = template
    return tokenizer


class ScriptedModel:
    """Stands for a server: `say(request)` is a text to answer with, and the token that ends it; None: it is cut off.
    The versions of an answer's halves differ."""

    context_length = None

    def __init__(self, tokenizer: Any, say: Any) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.requests: list[Any] = []
        self.completions: list[Completion] = []

    async def agenerate(self, request: Any, on_tokens: Any = None) -> Completion:
        text, end = self.say(request)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [] if end is None else [self.tokenizer.convert_tokens_to_ids(end)]
        await asyncio.sleep(0)
        if on_tokens is not None:
            on_tokens(ids)
        number = len(self.requests)
        self.requests.append(request)
        logprobs = [-(number + 1) / 1000 - i for i in range(len(ids))]
        versions = [int(i >= len(ids) // 2) for i in range(len(ids))]
        reason = "length" if end is None else "stop"
        completion = Completion(ids, logprobs, versions, reason, None if end is None else ids[-1])
        self.completions.append(completion)
        return completion
