"""The formats of agents: what they ask in one form, and answers that come back as the message they are."""

import json
import random
import re

import pytest

from arealite.api.errors import RequestError
from arealite.gateway.asks import Answer, CallOfTool
from arealite.gateway.wires.anthropic_messages import MessagesReply, anthropic_error
from arealite.gateway.wires.forms import Refusal, clean_messages
from arealite.gateway.wires.openai_chat import ChatReply, CompletionReply, openai_error
from arealite.gateway.wires.openai_responses import ResponsesReply

USER = {"role": "user", "content": "hi"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}
ONE, TWO = CallOfTool("call_1", "add", '{"a": 1}'), CallOfTool("call_2", "add", "{}")
ANSWERS = {
    "text": Answer("Hello there", reason="stop", num_prompt_tokens=5, num_cached_tokens=2, num_tokens=3),
    "thought": Answer(
        "Yes.", "Let me see.", reason="length", num_prompt_tokens=5, num_tokens=9, num_reasoning_tokens=6
    ),
    "calls": Answer("So: ", "Hm.", (ONE, TWO), reason="tool_calls"),
    "call": Answer(calls=(ONE,), reason="tool_calls"),
    "nothing": Answer(reason="stop"),
}


def chat(**fields):
    return ChatReply({"messages": [USER], **fields}, "policy")


def responses(**fields):
    return ResponsesReply({"input": "hi", **fields}, "policy", {})


def messages(**fields):
    return MessagesReply({"messages": [USER], "max_tokens": 9, **fields}, "policy")


def events_of(stream: bytes) -> list[dict]:
    return [json.loads(d) for d in re.findall(r"^data: (\{.*)$", stream.decode(), re.MULTILINE)]


def growth(answer: Answer, rng: random.Random) -> list[Answer]:
    """Prefixes of it as they would be shown, some twice."""
    cut = [answer.reasoning[:n] for n in range(0, len(answer.reasoning) + 1, 3)]
    shown = [Answer(reasoning=thought) for thought in cut]
    shown += [Answer(answer.text[:n], answer.reasoning) for n in range(0, len(answer.text) + 1, 2)]
    shown += [Answer(answer.text, answer.reasoning, answer.calls[:n]) for n in range(len(answer.calls) + 1)]
    return [a for a in shown if rng.random() < 0.7 for _ in range(rng.choice((1, 1, 2)))] + [answer, answer]


def streamed(reply, answer: Answer, seed: int) -> bytes:
    stream = b"".join(reply.grown(0, part) for part in growth(answer, random.Random(seed)))
    return stream + reply.ended([answer])


def joined_chat(stream: bytes) -> tuple[dict, str]:
    message, reason = {"role": "", "content": ""}, None
    for event in events_of(stream):
        for choice in event["choices"]:
            delta, reason = choice["delta"], choice["finish_reason"] or reason
            for key in ("role", "content", "reasoning_content"):
                if key in delta:
                    message[key] = message.get(key, "") + delta[key]
            for piece in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if piece["index"] == len(calls):
                    calls.append({k: piece[k] for k in ("id", "type", "function")})
                else:
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return message, reason


def joined_messages(stream: bytes) -> tuple[dict, str]:
    blocks, ended, reason = [], set(), None
    for event in events_of(stream):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks) == len(ended), "one block at a time"
            blocks.append({**event["content_block"], "partial_json": ""})
        elif event["type"] == "content_block_delta":
            kind, delta = event["delta"].pop("type"), event["delta"]
            assert event["index"] not in ended and kind.removesuffix("_delta") in (
                "text",
                "thinking",
                "signature",
                "input_json",
            )
            for key, text in delta.items():
                blocks[event["index"]][key] += text
        elif event["type"] == "content_block_stop":
            ended.add(event["index"])
        elif event["type"] == "message_delta":
            reason = event["delta"]["stop_reason"]
    for block in blocks:
        if partial := block.pop("partial_json"):
            block["input"] = json.loads(partial)
    return blocks, reason


def said(message: dict) -> dict:
    """For comparison."""
    (clean,) = clean_messages([message])
    return {key: clean.get(key) for key in ("content", "reasoning_content", "tool_calls")}


@pytest.mark.parametrize("name", ANSWERS)
def test_streams_and_whole_replies_come_back_as_the_same_message(name):
    answer = ANSWERS[name]
    expected = said(answer.message())
    for seed in range(10):
        whole = chat().whole([answer])["choices"][0]
        message, reason = joined_chat(streamed(chat(), answer, seed))
        assert reason == whole["finish_reason"] == {"stop": "stop"}.get(answer.reason, answer.reason)
        for back in (whole["message"], message):
            assert said(chat(messages=[USER, back]).ask.messages[1]) == expected

        whole = messages().whole([answer])
        blocks, reason = joined_messages(streamed(messages(), answer, seed))
        assert reason == whole["stop_reason"]
        for content in (whole["content"], blocks):
            back = messages(messages=[USER, {"role": "assistant", "content": content}]).ask.messages
            assert said(back[1]) == expected

        whole = responses().whole([answer])
        events = events_of(streamed(responses(), answer, seed))
        assert [e["sequence_number"] for e in events] == list(range(len(events)))
        done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        status = "incomplete" if answer.reason == "length" else "completed"
        last = events[-1]["response"]
        assert events[-1]["type"] == f"response.{status}" and last["status"] == whole["status"] == status
        assert [i["id"] for i in done] == [i["id"] for i in last["output"]]
        for output in (whole["output"], last["output"], done):
            back = responses(input=[USER, *output, USER]).ask.messages
            assert said(back[1]) == expected and len(back) == 3


def test_text_after_a_call_is_a_block_of_its_own_and_comes_back_as_one_message():
    parts = [Answer("So", calls=(ONE,)), Answer("So it is", calls=(ONE,), reason="tool_calls")]
    expected = said(parts[1].message())
    stream = b"".join(
        part for reply in [messages()] for part in [*(reply.grown(0, p) for p in parts), reply.ended(parts[1:])]
    )
    blocks, _ = joined_messages(stream)
    assert [b["type"] for b in blocks] == ["text", "tool_use", "text"]
    assert said(messages(messages=[USER, {"role": "assistant", "content": blocks}]).ask.messages[1]) == expected
    reply = responses()
    events = events_of(b"".join([*(reply.grown(0, p) for p in parts), reply.ended(parts[1:])]))
    back = responses(input=[USER, *events[-1]["response"]["output"]]).ask.messages
    assert said(back[1]) == expected and len(back) == 2


def test_deltas_leave_at_once():
    for reply in (chat(), responses(), messages(), CompletionReply({"prompt": "x"}, "policy")):
        for n in range(1, 6):
            assert b'"' + str(n).encode() + b'"' in reply.grown(0, Answer("12345"[:n])), reply.kind


def test_counts_of_tokens():
    answer = ANSWERS["text"]
    usage = chat(n=2).whole([answer, answer])["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 6, 11)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    usage = messages().whole([answer])["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (3, 2, 3)
    assert responses().whole([answer])["usage"]["total_tokens"] == 8
    options = {"stream": True, "stream_options": {"include_usage": True}}
    assert events_of(streamed(chat(**options), answer, 0))[-1]["usage"]["total_tokens"] == 8
    assert "usage" not in events_of(streamed(chat(stream=True), answer, 0))[-1]


def test_what_is_asked_is_one_form():
    sampling = {"temperature": 1, "top_p": 0.9, "stop": "END", "seed": 3}
    ask = chat(
        max_tokens=7, n=3, tools=[ADD], tool_choice={"type": "function", "function": {"name": "add"}}, **sampling
    ).ask
    assert ask.sampling == {**sampling, "stop": ("END",), "max_new_tokens": 7}
    assert (ask.num_samples, ask.tools, ask.tool_choice, ask.model) == (3, [ADD], "add", "policy")
    named = {"type": "function", "name": "add", "description": "adds", "parameters": PARAMETERS}
    ask = responses(tools=[named, {"type": "web_search"}], tool_choice="required", instructions="Be kind.").ask
    assert ask.tools == [ADD] and ask.tool_choice == "required"
    assert ask.messages == [{"role": "system", "content": "Be kind."}, USER]
    claude = {"name": "add", "description": "adds", "input_schema": PARAMETERS}
    system = [{"type": "text", "text": "x-anthropic-billing-header: cc=1"}, {"type": "text", "text": "Be kind."}]
    ask = messages(
        tools=[claude, {"type": "bash_20250124", "name": "bash"}], tool_choice={"type": "any"}, system=system
    ).ask
    assert (ask.tools, ask.tool_choice, ask.sampling) == ([ADD], "required", {"max_new_tokens": 9})
    assert ask.messages == [{"role": "system", "content": "Be kind."}, USER]
    assert messages(thinking={"type": "enabled", "budget_tokens": 5}).ask.template_options == {"enable_thinking": True}


def test_results_of_tools_come_before_what_is_said_with_them():
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}]}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "2"}], "is_error": False}
    ask = messages(messages=[USER, call, {"role": "user", "content": [{"type": "text", "text": "go on"}, result]}]).ask
    assert ask.messages[2:] == [
        {"role": "tool", "content": "2", "tool_call_id": "t"}, {"role": "user", "content": "go on"}
    ]  # fmt: skip


def test_custom_tools_are_called_with_text():
    tools = [{"type": "custom", "name": "patch", "description": "applies", "format": {"type": "text"}}]
    answer = Answer(calls=(CallOfTool("c", "patch", '{"input": "--- a"}'),), reason="tool_calls")
    (item,) = responses(tools=tools).whole([answer])["output"]
    assert (item["type"], item["input"], item["call_id"]) == ("custom_tool_call", "--- a", "c")
    (message,) = responses(input=[item]).ask.messages
    assert message["tool_calls"][0]["function"] == {"name": "patch", "arguments": {"input": "--- a"}}
    assert "custom_tool_call_input.done" in streamed(responses(tools=tools), answer, 0).decode()


def test_what_was_thought_survives_clients_that_keep_only_what_is_encrypted():
    (item, _) = responses(include=["reasoning.encrypted_content"]).whole([ANSWERS["thought"]])["output"]
    kept = {key: item[key] for key in ("type", "id", "summary", "encrypted_content")}
    assert responses(input=[USER, kept]).ask.messages[1]["reasoning_content"] == "Let me see."


def test_what_is_unknown_is_ignored_and_what_cannot_be_shown_is_refused():
    chat(messages=[{**USER, "audio": None, "annotations": [], "new": 1}], user="me", store=True, future={"a": 1})
    messages(
        messages=[{"role": "user", "content": [{"type": "note_2031", "text": "hi", "cache_control": {}}]}], betas=[1]
    )
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    pictured = {"type": "tool_result", "content": [{"type": "image"}]}
    claude, b = [{"name": "a", "input_schema": {}}], {"type": "tool", "name": "b"}
    for build, wrong in (
        (lambda: chat(messages=[]), "messages: it is empty"),
        (lambda: messages(messages=[]), "messages: it is empty"),
        (lambda: responses(input=[]), "input: it is empty"),
        (lambda: chat(messages=[{"role": "user", "content": [image]}]), r"content\[0\]: only text .* 'image_url'"),
        (lambda: messages(messages=[{"role": "user", "content": [{"type": "hologram"}]}]), "'hologram'"),
        (lambda: messages(messages=[{"role": "user", "content": [pictured]}]), "'image'"),
        (lambda: responses(input=[{"type": "compaction"}]), r"\[0\].type: expected 'message', .* 'compaction'"),
        (lambda: responses(conversation="c"), "conversation: not supported"),
        (lambda: responses(previous_response_id="resp_0"), "no stored response 'resp_0'"),
        (lambda: chat(tool_choice="required"), "not among the tools"),
        (lambda: messages(tools=claude, tool_choice=b), "'b' is not"),
        (lambda: chat(tools=[{"type": "custom"}]), r"tools\[0\]"),
        (lambda: chat(max_tokens=0), "max_tokens"),
        (lambda: chat(temperature="warm"), "temperature: expected a number"),
        (lambda: chat(messages="hi"), "messages: expected a list"),
        (lambda: CompletionReply({"prompt": ["a", "b"]}, "m"), "prompt: expected one text"),
        (lambda: CompletionReply({"prompt": "a", "echo": True}, "m"), "echo: not supported"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=wrong):
            build()
    parts = [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": "c"}]
    assert chat(messages=[{**USER, "content": parts}]).ask.messages[0]["content"] == "a\nb\nc"


def test_errors_have_the_form_of_their_format():
    refusal = Refusal(400, "too long", "context_length_exceeded")
    assert openai_error(refusal)["error"] == {
        "message": "too long", "type": "invalid_request_error", "param": None, "code": "context_length_exceeded"
    }  # fmt: skip
    assert anthropic_error(refusal)["error"] == {"type": "invalid_request_error", "message": "too long"}
    assert anthropic_error(Refusal(529, "full"))["error"]["type"] == "overloaded_error"
    begun = responses()
    begun.grown(0, Answer("a"))
    assert events_of(begun.failed(Refusal(503, "gone")))[0]["type"] == "response.failed"
    assert b"event: error\n" in responses().failed(refusal) and b"event: error\n" in messages().failed(refusal)


def test_logprobs_are_told_where_they_are_asked_for():
    sampled = (("Hi", [72, 105], -0.5), (" you", [32, 121, 111, 117], -0.25))
    answer = Answer("Hi you", reason="stop", num_tokens=2, sampled=sampled)
    assert chat().whole([answer])["choices"][0]["logprobs"] is None
    reply = chat(logprobs=True, stream=True)
    assert reply.ask.wants_logprobs and not chat(logprobs=False).ask.wants_logprobs
    content = [{"token": t, "bytes": b, "logprob": p, "top_logprobs": []} for t, b, p in sampled]
    assert chat(logprobs=True).whole([answer])["choices"][0]["logprobs"]["content"] == content
    told = [c["logprobs"] for event in events_of(streamed(reply, answer, 0)) for c in event["choices"]]
    assert [x["content"] for x in told if x] == [content]
    text = CompletionReply({"prompt": "x", "logprobs": 0}, "m").whole([answer])["choices"][0]["logprobs"]
    assert (text["tokens"], text["token_logprobs"]) == (["Hi", " you"], [-0.5, -0.25]) and text["text_offset"] == [0, 2]


def test_formats_of_answers_are_refused_and_text_is_none():
    schema, text = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, {"type": "text"}
    chat(response_format=text), responses(text={"format": text, "verbosity": "low"}), messages(output_config={})
    for build, name in (
        (lambda: chat(response_format=schema), "response_format"),
        (lambda: chat(response_format={"type": "json_object"}), "response_format"),
        (lambda: responses(text={"format": schema}), "text.format"),
        (lambda: messages(output_config={"format": schema}), "output_config.format"),
        (lambda: chat(logprobs=True, top_logprobs=3), "top_logprobs"),
    ):
        with pytest.raises(RequestError, match=rf"^{name}: (answers cannot be held to a format|not supported) here"):
            build()
