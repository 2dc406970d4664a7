"""The gateway, asked by clients that mean no good, or know no better."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.gateway import ADMIN, WAIT_S, call, scripted
from transformers import AutoTokenizer

from arealite.api.cli_args import GatewayConfig

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
    assert call(session.base_url + "/v1/responses/compact", {}, session.key)[0] == 404
    assert call(url, None, session.key)[0] == 405
    assert call(url, b'{"x": "' + b"a" * (64 << 20) + b'"}', session.key)[0] == 413
    assert not session.turns


def test_a_huge_result_of_a_tool_holds_nobody_up(tokenizer):
    config = GatewayConfig()
    config.context_length = 2048
    with scripted(tokenizer, lambda request: "Yes", config) as running, ThreadPoolExecutor(1) as pool:
        huge, small = running.new_session(), running.new_session()
        called = {"id": "c", "type": "function", "function": {"name": "read", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": "c", "content": "a word, " * (10 << 17)}
        body = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [called]}, result]}
        slow = pool.submit(call, huge.base_url + "/v1/chat/completions", body, huge.key)
        longest, num_asked = 0.0, 0
        while not slow.done() or not num_asked:
            begin = time.monotonic()
            url = small.base_url + "/v1/models"
            assert call(url, None, small.key)[0] == 200
            longest, num_asked = max(longest, time.monotonic() - begin), num_asked + 1
        status, answer = slow.result()
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded" and not huge.turns
        assert longest < 5.0, "of a busy machine; the whole text would take far longer"
