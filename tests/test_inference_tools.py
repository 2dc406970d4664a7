"""Tool calls: read from text in both ways of writing, at once and piece by piece, and asked for by the prompt."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import byte_tokenizer

from arealite.api.errors import RequestError
from arealite.inference.core.answers import held_back
from arealite.inference.http.bodies import checked
from arealite.inference.openai.chat import ChatBody, ChatTemplate
from arealite.inference.openai.tools import ToolCall, ToolUse, forced_start, read_calls

AUTO = ToolUse(("add", "get_weather"), "auto")
PARIS = ToolCall("get_weather", '{"city": "Paris"}')
TAGGED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PLAIN = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SEE = {"type": "function", "function": {"name": "see"}}
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("hello", "hello", []),
        ("", "", []),
        (TAGGED, "", [PARIS]),
        (f"Let me see.\n{TAGGED}\n{TAGGED} done", "Let me see.\ndone", [PARIS, PARIS]),
        (TAGGED.removesuffix("</tool_call>"), "", [PARIS]),
        ('<tool_call>{"name": "nobody", "arguments": "{\\"a\\": 1}"}</tool_call>', "",
         [ToolCall("nobody", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>', "",
         [ToolCall("f", '{"x": "</tool_call>"}')]),
        ("a <tool_call>{broken</tool_call> b", "a <tool_call>{broken</tool_call> b", []),
        (f"<tool_call>oops {TAGGED}", f"<tool_call>oops {TAGGED}", []),
        ("<tool_call>" + "[" * 100_000, "<tool_call>" + "[" * 100_000, []),
        ('<tool_call>[1, 2]</tool_call>', '<tool_call>[1, 2]</tool_call>', []),
        ("x <tool_ca", "x <tool_ca", []),
        *((f'{{"name": "get_weather", "parameters": {{"x": {n}}}}}',) * 2 + ([],) for n in ("NaN", "1e999")),
        (PLAIN, "", [PARIS]),
        (f"<|python_tag|>{PLAIN}; {PLAIN}", "", [PARIS, PARIS]),
        (f"[{PLAIN}, {PLAIN}]", "", [PARIS, PARIS]),
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ('{"a": 1} and more', '{"a": 1} and more', []),
        (f"{PLAIN} is what I would call", f"{PLAIN} is what I would call", []),
    ],
)  # fmt: skip
def test_calls_are_found_and_nothing_else_is_lost(text, content, calls):
    assert read_calls(text, AUTO, complete=True) == (content, calls)


def test_each_way_reads_its_own():
    assert read_calls(PLAIN, ToolUse(("get_weather",), "hermes"), True) == (PLAIN, [])
    assert read_calls(TAGGED, ToolUse(("get_weather",), "plain"), True) == (TAGGED, [])


def test_a_forced_call_is_complete_with_its_arguments():
    named = ToolUse(("get_weather",), "auto", forced_start("auto", "get_weather"), "get_weather")
    assert read_calls(' {"city": "Paris"} and on and on', named, False) == ("", [PARIS])
    assert read_calls(' {"city": "Par', named, False) == ("", [])
    assert read_calls(' {"city": "Par', named, True) == (named.forced + ' {"city": "Par', [])
    for way, key in (("auto", "arguments"), ("plain", "parameters")):
        free = ToolUse(("get_weather", "add"), way, forced_start(way, None))
        assert read_calls(f' "get_weather", "{key}": {{"city": "Paris"}}}}', free, True) == ("", [PARIS])


pieces = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<|python_tag|>", TAGGED, PLAIN, ";", "[", "{", "hi", " ", "\n", "<", "}", '"']
)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(pieces, max_size=6), way=st.sampled_from(["auto", "hermes", "plain"]))
def test_pieces_only_add_to_what_was_shown(parts, way):
    """So a stream can show every difference, and ends with the same as the whole."""
    text, use = "".join(parts), ToolUse(("get_weather",), way)
    whole = read_calls(text, use, True)
    shown: tuple[str, list[ToolCall]] = ("", [])
    for end in range(len(text) + 1):
        now = read_calls(text[:end], use, False)
        assert now[0].startswith(shown[0]) and now[1][: len(shown[1])] == shown[1]
        shown = now
    assert whole[0].startswith(shown[0]) and whole[1][: len(shown[1])] == shown[1]


def test_what_may_become_a_marker_is_held_back():
    assert held_back("ab<tool", ["<tool_call>", "b<t"]) == "ab"
    assert held_back("abx", ["<tool_call>"]) == "abx"
    assert held_back("aSTO", ["STOP", "TO!"]) == "a"


def chat(**fields: Any) -> ChatBody:
    return checked(ChatBody, {"messages": [{"role": "user", "content": "u"}], **fields})


def prompt_of(body: dict[str, Any], source: str = CHATML, parser: str = "auto") -> str:
    tokenizer, texts = byte_tokenizer(), []
    tokenizer.chat_template = source

    def encode(text: str, special: bool) -> list[int]:
        if not text.isascii():
            raise RequestError("surrogate")
        texts.append(text)
        return [1]

    ChatTemplate(tokenizer, encode, parser).encode(chat(**body))
    return texts[0]


def test_messages_become_the_templates_prompt():
    assert prompt_of({}) == "<user>u<assistant>"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert prompt_of({"messages": parts}) == "<user>a\nb<assistant>"
    resumed = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "I thi"}]
    assert prompt_of({"messages": resumed, "continue_final_message": True}) == "<user>u<assistant>I thi"
    shouting = "{{ messages[0].content }}{% if loud %}!{% endif %}"
    assert prompt_of({"chat_template_kwargs": {"loud": True, "asks": 1, "tokenizer": 1}}, shouting) == "u!"


def test_tools_reach_a_template_that_knows_them():
    source = "{% for t in tools or [] %}{{ t.function.name }},{% endfor %}"
    source += "{{ messages[-1].tool_calls[0].function.arguments.a }}"
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    body = {"tools": [ADD, SEE], "messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert prompt_of(body, source) == "add,see,7"
    assert prompt_of({**body, "tool_choice": "none"}, source) == "7"


def test_tools_are_told_in_the_system_message_to_a_template_that_does_not():
    told = prompt_of({"tools": [ADD]})
    assert told.startswith("<system>") and json.dumps(ADD["function"]) in told and "<tool_call>" in told
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "u"}]
    assert prompt_of({"tools": [ADD], "messages": messages}).startswith("<system>Be kind.\n\nThese functions")
    plain = prompt_of({"tools": [ADD], "messages": messages}, parser="llama3")
    assert '{"name": "add", "parameters": {}}' in plain and "<tool_call>" not in plain


@pytest.mark.parametrize(
    ("choice", "tools", "ending"),
    [
        ("auto", [ADD, SEE], "<assistant>"),
        ("required", [ADD, SEE], '<assistant><tool_call>\n{"name":'),
        ("required", [ADD], '<assistant><tool_call>\n{"name": "add", "arguments":'),
        ({"type": "function", "function": {"name": "see"}}, [ADD, SEE],
         '<assistant><tool_call>\n{"name": "see", "arguments":'),
    ],
)  # fmt: skip
def test_a_required_call_is_begun_for_the_model(choice, tools, ending):
    assert prompt_of({"tools": tools, "tool_choice": choice}).endswith(ending)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "JSON"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [ADD], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"function": {"name": "see"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"tools": [ADD], "tool_choice": "required", "continue_final_message": True}, "tool_choice"),
    ],
)  # fmt: skip
def test_wrong_chats_are_refused_by_name(body, named):
    with pytest.raises(RequestError) as caught:
        prompt_of(body)
    assert named in str(caught.value)


def test_a_template_that_fails_or_is_missing_is_the_clients_error():
    with pytest.raises(RequestError, match="roles must alternate"):
        prompt_of({}, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="no chat template"):
        ChatTemplate(None, None, "auto").encode(chat())


def test_the_real_models_template_works(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    made = ChatTemplate(tokenizer, lambda text, special: tokenizer(text, add_special_tokens=special).input_ids, "auto")
    ids, use = made.encode(chat(messages=[{"role": "user", "content": "hi"}], tools=[ADD]))
    assert use == ToolUse(("add",), "auto")
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
