"""The gateway, asked by clients that mean no good, or know no better."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.gateway import ADMIN, WAIT_S, call, scripted
from transformers import AutoTokenizer

from arealite.api.cli_args import GatewayConfig
from arealite.api.errors import RequestError
from arealite.gateway.prompting import Prompter
from arealite.gateway.wires.anthropic_messages import MessagesReply
from arealite.gateway.wires.openai_chat import ChatReply, CompletionReply
from arealite.gateway.wires.openai_responses import ResponsesReply

USER = {"role": "user", "content": "What is 1 + 2?"}


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def running(tokenizer):
    with scripted(tokenizer, lambda request: "Hello there", max_new_tokens=256) as gateway:
        yield gateway


@pytest.fixture
def session(running):
    return running.new_session()


def test_limits(tokenizer):
    config = GatewayConfig(max_sessions=2, max_turns=1, idle_timeout_s=0.2)
    config.context_length = 128
    with scripted(tokenizer, lambda request: "Yes", config) as running:
        control, session = f"{running.gateway.address}/sessions", running.new_session()
        body, long = {"messages": [USER]}, {"messages": [{**USER, "content": "long " * 200}]}
        status, answer = call(session.base_url + "/v1/chat/completions", long, session.key)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"  # harnesses shorten their history
        assert call(session.base_url + "/v1/chat/completions", body, session.key)[0] == 200
        status, answer = call(session.base_url + "/v1/chat/completions", body, session.key)
        assert status == 400 and answer["error"]["code"] == "session_limit" and "turns" in answer["error"]["message"]
        _, made = call(control, {}, ADMIN)
        assert call(control, {}, ADMIN)[0] == 429
        deadline = time.monotonic() + WAIT_S
        while call(made["base_url"] + "/v1/models", None, made["key"])[0] != 410:  # it asks nothing, and so it ends
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert session.state == "open", "workflows say themselves when theirs have ended"


def test_hostile_bodies(running, session):
    url = session.base_url + "/v1/chat/completions"
    for raw, wrong in ((b"{", "not valid JSON"), (b"[]", "expected a JSON object"), (b"", "messages: it is missing")):
        status, answer = call(url, raw, session.key)
        assert status == 400 and wrong in answer["error"]["message"]
    status, answer = call(session.base_url + "/v1/messages", b"\xff", session.key)
    assert status == 400 and answer["type"] == "error"
    status, answer = call(url, b"[" * 10**6, session.key)
    assert status == 400 and "recursion" in answer["error"]["message"]
    status, answer = call(url, b"no gzip", session.key, headers={"Content-Encoding": "gzip"})
    assert status == 400 and "the body cannot be read" in answer["error"]["message"]
    status, answer = call(session.base_url + "/v1/completions", {"prompt": [5, 1 << 40]}, session.key)
    assert status == 400 and answer["error"]["message"].startswith("prompt: 1099511627776 is no token")
    assert call(session.base_url + "/v1/responses/compact", {}, session.key)[0] == 404
    assert call(url, None, session.key)[0] == 405
    assert call(url, b'{"x": "' + b"a" * (64 << 20) + b'"}', session.key)[0] == 413
    assert not session.turns


CALLED = {"id": "c", "type": "function", "function": {"name": "read", "arguments": "{}"}}
READ = [USER, {"role": "assistant", "content": None, "tool_calls": [CALLED]}]
WORDS = "a word, " * (10 << 17)


@pytest.mark.parametrize("path", ["chat/completions", "messages/count_tokens"])
@pytest.mark.parametrize("body", [
    {"messages": [*READ, {"role": "tool", "tool_call_id": "c", "content": WORDS}]}, {"messages": [USER] * 200_000},
    {"messages": [USER], "tools": [{"type": "function", "name": "a", "function": {"name": "a", "description": WORDS},
                                    "description": WORDS, "input_schema": {}}]},
], ids=["result", "messages", "tools"])  # fmt: skip
def test_what_is_huge_holds_nobody_up(tokenizer, path, body):
    config = GatewayConfig()
    config.context_length = 2048
    if path != "chat/completions" and len(body["messages"]) == 3:
        body = {"messages": [{"role": "user", "content": WORDS}]}
    with scripted(tokenizer, lambda request: "Yes", config) as running, ThreadPoolExecutor(1) as pool:
        huge, small = running.new_session(), running.new_session()
        slow = pool.submit(call, f"{huge.base_url}/v1/{path}", body, huge.key)
        longest, num_asked = 0.0, 0
        while not slow.done() or not num_asked:
            begin = time.monotonic()
            assert call(small.base_url + "/v1/models", None, small.key)[0] == 200
            longest, num_asked = max(longest, time.monotonic() - begin), num_asked + 1
        status, answer = slow.result()
        assert status == 400 and "prompt is too long" in answer["error"]["message"] and not huge.turns
        assert longest < 5.0, "of a busy machine; all of it would take far longer"


def call_of(arguments):
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


ADD = {"type": "object", "properties": {"a": {"type": "integer"}}}
FULL = {  # bodies with all that is read, by the class of their reply
    ChatReply: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [call_of('{"a": 1}')], "reasoning_content": "r"},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ],
        "max_tokens": 4, "max_completion_tokens": 4, "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 1,
        "stop": ["zz"], "stream": False, "stream_options": {"include_usage": True}, "tool_choice": "auto",
        "tools": [{"type": "function", "function": {"name": "add", "description": "d", "parameters": ADD}}],
        "response_format": {"type": "text"}, "reasoning_effort": "low", "logprobs": True, "chat_template_kwargs": {},
    },
    CompletionReply: {"prompt": "once", "max_tokens": 4, "n": 1, "stop": ["zz"], "logprobs": 1, "stream": False},
    ResponsesReply: {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}], "encrypted_content": ""},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
        ],
        "instructions": "be", "max_output_tokens": 4, "temperature": 1.0, "stream": False, "tool_choice": "auto",
        "tools": [{"type": "function", "name": "add", "parameters": ADD}, {"type": "custom", "name": "patch"}],
        "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}},
        "include": ["reasoning.encrypted_content"],
        "store": True, "metadata": {}, "parallel_tool_calls": True,
    },
    MessagesReply: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "a"},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
            ]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "3"}]},
        ],
        "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "tools": [{"name": "add", "input_schema": ADD}],
        "tool_choice": {"type": "auto"}, "thinking": {"type": "enabled"}, "output_config": {"effort": "low"},
        "stop_sequences": ["zz"], "stream": False, "temperature": 1.0,
    },
}  # fmt: skip
WRONG = [
    None, True, 0, -1, 1.5, 10**400, float("nan"), "", "x", "\0", [], [None], [[]], ["x"], [1], {}, [{}],
    {"type": "x"}, {"type": []}, {"a": None}, {"type": "image_url", "image_url": {"url": "x"}},
]  # fmt: skip


def places(value, place=()):
    yield from [place] if place else []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*place, key))


def changed(body, place, value):
    body = json.loads(json.dumps(body))
    within = body
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    return body


@pytest.mark.parametrize("kind", FULL, ids=lambda kind: kind.__name__)
def test_a_wrong_value_anywhere_is_refused_by_its_name_or_can_be_read(tokenizer, kind):
    prompter, more = Prompter(tokenizer), [{}] if kind is ResponsesReply else []
    assert prompter.memory().next_prompt(kind(FULL[kind], "m", *more).ask).added_ids
    num_refused = 0
    for place, value in itertools.product(places(FULL[kind]), WRONG):
        try:
            prompter.memory().next_prompt(kind(changed(FULL[kind], place, value), "m", *more).ask)
        except RequestError as error:
            num_refused += 1
            names = [key for key in place if isinstance(key, str)]
            assert any(name in str(error) for name in names), (place, value, str(error))
    assert num_refused > 100
