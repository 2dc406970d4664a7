"""One call of an agent and what it gets, in the form that all wire formats come down to.

Made by wires/ from requests and by workflows; prompting.py makes tokens of an Ask, and an Answer of tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

Message = dict[str, Any]
CLOSE_THOUGHT = "</think>"
AnswerReason = Literal["stop", "length", "tool_calls", "stop_string"]


@dataclass(frozen=True)
class Ask:
    """One request for the next message.

    `messages` are in the form of dataset.prompts.chat_messages: roles system, user, assistant, tool; content as text;
    arguments of tool calls as objects; what was thought before an answer as "reasoning_content". Raw text to continue
    is `prompt` instead. `tools` are in the chat form, {"type": "function", "function": {...}}; `tool_choice` is none,
    auto, required or a function's name. `sampling` holds what the client asked for, by the keys of GenerationRequest;
    `num_samples` answers are wanted, each a turn of its own. `template_options` are variables of the chat template.
    `wants_logprobs`: the answer is to have `sampled`.
    """

    messages: list[Message] = field(default_factory=list)
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str = "auto"
    sampling: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 1
    wire: str = "chat"
    model: str = ""
    template_options: dict[str, Any] = field(default_factory=dict)
    wants_logprobs: bool = False

    def said(self) -> str:
        """About what a chat template makes of it; of a prompt of text, that."""
        if self.prompt is not None:
            return self.prompt if isinstance(self.prompt, str) else ""
        texts = [json.dumps(self.tools) if self.tools else ""]
        for message in self.messages:
            texts += [str(message.get("content")), str(message.get("reasoning_content", ""))]
            texts += [json.dumps(message["tool_calls"])] if "tool_calls" in message else []
        return "".join(texts)


@dataclass(frozen=True)
class CallOfTool:
    """`arguments` is JSON text as the OpenAI protocol has it, always an object; `id` is ours, unique in a session."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """What was sampled, read back: `text` without what was thought (`reasoning`) and without `calls`. A call that
    cannot be read stays text. While `reason` is None it is still growing, and each field only ever gets longer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallOfTool, ...] = ()
    reason: AnswerReason | None = None
    matched: str | None = None  # the stop string that ended it
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0
    sampled: tuple[tuple[str, list[int], float], ...] = ()  # text, UTF-8 and logprob of each token, if asked for

    def sampled_text(self) -> tuple[tuple[str, list[int], float], ...]:
        """Of `sampled`, the tokens that `text` is of; all of them where its bytes are not found in one piece."""
        said, text = b"".join(bytes(token[1]) for token in self.sampled), self.text.encode("utf-8", "surrogatepass")
        close = CLOSE_THOUGHT.encode() if self.reasoning else b""
        begin = said.find(text, said.find(close) + len(close))
        ends = accumulate(len(token[1]) for token in self.sampled)
        places = [(end - len(token[1]), end, token) for end, token in zip(ends, self.sampled, strict=True)]
        end = begin + len(text)
        return self.sampled if begin < 0 else tuple(token for low, high, token in places if low < end and begin < high)

    def message(self) -> Message:
        """The assistant's message of it, as a client would send it back."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]
        return message
