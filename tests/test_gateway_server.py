"""The gateway, asked by the packages of OpenAI and Anthropic as they are."""

import asyncio
import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest
from support.gateway import ADMIN, WAIT_S, call, scripted
from transformers import AutoTokenizer

from arealite.gateway import exchange

USER = {"role": "user", "content": "What is 1 + 2?"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
CHAT_TOOL = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
THOUGHT = "<think>\nI should add.\n</think>\n\n"
CALLS = "".join(f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": 2}}}}\n</tool_call>\n' for a in (1, 3))


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def script():
    """What the engine writes: by what the prompt ends with."""
    return {"": "Hello there"}


@pytest.fixture(scope="module")
def running(tokenizer, script):
    def write(request):
        prompt = tokenizer.decode(request.input_ids)
        return next((text for key, text in script.items() if key and key in prompt), script[""])

    with scripted(tokenizer, write, max_new_tokens=256) as gateway:
        yield gateway


@pytest.fixture
def session(running, script):
    script.clear()
    script[""] = "Hello there"
    return running.new_session()


@pytest.fixture
def gpt(session):
    with openai.OpenAI(base_url=session.base_url + "/v1", api_key=session.key, max_retries=0, timeout=WAIT_S) as client:
        yield client


@pytest.fixture
def claude(session):
    with anthropic.Anthropic(base_url=session.base_url, api_key=session.key, max_retries=0, timeout=WAIT_S) as client:
        yield client


def rows(session):
    """The parents of its turns."""
    return [turn.parent for turn in session.turns.values()]


def test_chat_with_thoughts_and_parallel_calls(session, gpt, script):
    script[""] = THOUGHT + "Let us see." + CALLS
    script["<tool_response>"] = script["seven"] = "3 and 5"
    messages = [USER]
    with gpt.chat.completions.stream(model="any", messages=messages, tools=[CHAT_TOOL]) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.reasoning_content == "I should add."
    whole = gpt.chat.completions.create(model="any", messages=messages, tools=[CHAT_TOOL]).choices[0]
    for message in (choice.message, whole.message):
        assert message.content.strip() == "Let us see."
        assert [json.loads(c.function.arguments)["a"] for c in message.tool_calls] == [1, 3]
    messages.append(whole.message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": c.id, "content": "seven"} for c in reversed(whole.message.tool_calls)]
    last = gpt.chat.completions.create(model="any", messages=messages, tools=[CHAT_TOOL])
    assert last.choices[0].message.content == "3 and 5" and last.usage.prompt_tokens > 30
    assert rows(session) == [None, None, 1]


def test_responses_with_a_state_that_the_gateway_keeps(session, gpt, script):
    script[""] = THOUGHT + CALLS
    script["seven"] = "It is 7."
    tool = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": False}
    with gpt.responses.stream(model="any", input="What is 1 + 2?", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    calls = [item for item in first.output if item.type == "function_call"]
    assert [json.loads(c.arguments) for c in calls] == [{"a": 1, "b": 2}, {"a": 3, "b": 2}]
    results = [{"type": "function_call_output", "call_id": c.call_id, "output": "seven"} for c in calls]
    kept = gpt.responses.create(model="any", input=results, previous_response_id=first.id, tools=[tool])
    resent = [{"role": "user", "content": "What is 1 + 2?"}, *[i.model_dump() for i in first.output], *results]
    sent = gpt.responses.create(model="any", input=resent, tools=[tool])
    assert kept.output_text == sent.output_text == "It is 7."
    assert rows(session) == [None, 0, 0]
    with pytest.raises(openai.BadRequestError, match="no stored response"):
        gpt.responses.create(model="any", input="x", previous_response_id="resp_0")


def test_a_response_has_the_logprobs_of_its_text_where_they_are_to_be_included(
    running, session, gpt, script, tokenizer
):
    for said, thought, called in (("Hi yöu", "", ""), ("think 漢 So:", THOUGHT, CALLS)):
        script[""] = thought + said + called
        tool = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": False}
        asked = {"model": "any", "input": said, "tools": [tool], "include": ["message.output_text.logprobs"]}
        whole, plain = gpt.responses.create(**asked), gpt.responses.create(**{**asked, "include": []})
        with gpt.responses.stream(**asked) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
        (done,) = [event for event in events if event.type == "response.output_text.done"]
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        for response in (whole, streamed):
            (text,) = [part for item in response.output if item.type == "message" for part in item.content]
            assert text.text.strip() == said and len([i for i in response.output if i.type == "function_call"]) == (
                2 if called else 0
            )
            assert [(p.logprob, p.token) for p in text.logprobs][: len(ids)] == [
                (-1.0, tokenizer.decode(i)) for i in ids
            ]
            assert bytes(byte for p in text.logprobs for byte in p.bytes).decode().strip() == said
        assert [p.token for p in done.logprobs] == [p.token for p in text.logprobs]
        assert len([event for event in events if event.type == "response.output_text.delta"]) > 1, "as they come"
        assert not [
            p for item in plain.output if item.type == "message" for part in item.content for p in part.logprobs
        ]
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        gpt.responses.create(**asked, top_logprobs=2)


def test_messages_with_thoughts_and_calls(session, claude, script):
    script[""] = THOUGHT + "So:" + CALLS
    script["seven"] = "It is 7."
    tools = [{"name": "add", "input_schema": PARAMETERS}]
    asked = {"model": "any", "max_tokens": 200, "tools": tools, "system": "Be brief."}
    with claude.messages.stream(messages=[USER], **asked) as stream:
        for _ in stream:
            pass
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use" and message.usage.output_tokens > 10
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[0].thinking == "I should add." and message.content[3].input == {"a": 3, "b": 2}
    results = [{"type": "tool_result", "tool_use_id": b.id, "content": "seven"} for b in message.content[2:]]
    content = [block.model_dump(exclude_none=True) for block in message.content]
    messages = [USER, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
    last = claude.messages.create(messages=messages, **asked)
    assert last.content[0].text == "It is 7." and last.stop_reason == "end_turn"
    assert rows(session) == [None, 0]
    count = claude.messages.count_tokens(messages=messages, model="any", tools=tools, system="Be brief.")
    assert count.input_tokens == session.turns[1].answer.num_prompt_tokens
    assert len(session.turns) == 2, "counting is no turn"


def test_completions_choices_and_models(session, gpt, claude):
    assert gpt.completions.create(model="any", prompt="Once").choices[0].text == "Hello there"
    chunks = gpt.completions.create(model="any", prompt=[504, 2], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello there"
    several = gpt.chat.completions.create(model="any", messages=[USER], n=2, max_tokens=3)
    assert [choice.finish_reason for choice in several.choices] == ["stop", "stop"]
    assert len(session.turns) == 4
    assert [m.id for m in gpt.models.list()] == [m.id for m in claude.models.list()] == ["policy"]
    assert gpt.models.retrieve("org/some-model").id == "org/some-model"


def test_what_is_asked_of_sampling_is_recorded_and_the_runs_own_is_done(session, gpt, script):
    script[""] = "one two three four five"
    short = gpt.chat.completions.create(model="any", messages=[USER], max_tokens=2, temperature=0.3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    long = gpt.chat.completions.create(model="any", messages=[USER], max_tokens=64000, extra_body={"future": {}})
    assert long.choices[0].finish_reason == "stop"
    assert session.turns[0].ask.sampling == {"temperature": 0.3, "max_new_tokens": 2}


def test_tokens_leave_as_they_come(running, session, gpt, script):
    script[""] = text = "one two three four five six seven eight"
    running.engine.held[text] = running.call(asyncio.Event)
    stream = gpt.chat.completions.create(model="any", messages=[USER], stream=True)
    got = ""
    for chunk in stream:
        got += chunk.choices[0].delta.content or ""
        if "three" in got and not running.engine.held[text].is_set():
            assert session.turns[0].completion is None and "eight" not in got
            running.call(running.engine.held[text].set)
    assert got == text


def test_a_client_that_goes_away_and_asks_again(running, session, gpt, script):
    script[""] = text = "two three four five six seven eight nine"
    held = running.engine.held[text] = running.call(asyncio.Event)
    stream = gpt.chat.completions.create(model="any", messages=[USER], stream=True)
    next(iter(stream))
    stream.close()
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(gpt.chat.completions.create, model="any", messages=[USER])
        deadline = time.monotonic() + WAIT_S
        while len(running.engine.requests) < 2 and time.monotonic() < deadline and len(session.turns) < 2:
            time.sleep(0.01)
        running.call(held.set)
        assert again.result(WAIT_S).choices[0].message.content == text
    assert rows(session) == [None, None], "a new sample; the first was sampled to its end"


def test_retries_are_one_turn(running, session, script):
    script[""] = text = "three four five six seven"
    held = running.engine.held[text] = running.call(asyncio.Event)
    body = json.dumps({"messages": [USER]}).encode()

    def post(count):
        headers = {"x-api-key": session.key, "x-stainless-retry-count": str(count)}
        request = urllib.request.Request(session.base_url + "/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return json.loads(answer.read())["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(24) as pool:
        first = pool.submit(post, 0)
        while not session.turns:
            time.sleep(0.01)
        copies = [pool.submit(post, 1 + i % 3) for i in range(20)]
        running.call(held.set)
        assert {task.result(WAIT_S) for task in [first, *copies]} == {text}
    assert post(2) == text and len(session.turns) == 1
    assert post(0) == text and len(session.turns) == 2, "the same body anew is a new sample"
    for content in ("a", "b", "a"):
        body = {"messages": [{"role": "user", "content": content}]}
        call(session.base_url + "/v1/chat/completions", body, session.key, headers={"Idempotency-Key": "one"})
    assert len(session.turns) == 4, "a key of another body is another call"


def test_errors_of_an_engine(running, session, gpt, claude, script):
    script[""] = "no"
    write = running.engine.write
    running.engine.write = lambda request: 1 / 0
    try:
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError in the gateway"):
            gpt.chat.completions.create(model="any", messages=[USER])
        with pytest.raises(anthropic.InternalServerError, match="ZeroDivisionError"):
            claude.messages.create(model="any", max_tokens=9, messages=[USER])
    finally:
        running.engine.write = write
    assert gpt.chat.completions.create(model="any", messages=[USER]).choices[0].message.content == "no"


def test_keys(running, session):
    other = running.new_session()
    url = session.base_url + "/v1/chat/completions"
    body = {"messages": [USER]}
    plain = running.gateway.address + "/v1/chat/completions"
    assert call(url, body, session.key)[0] == call(plain, body, session.key)[0] == 200
    for key, status in (("", 401), ("forged", 401), (session.key[:-1], 401), (ADMIN, 401), (other.key, 403)):
        assert call(url, body, key)[0] == status, key
        assert call(session.base_url + "/v1/models", None, key)[0] == status, key
    control = f"{running.gateway.address}/sessions"
    for key in ("", "forged", session.key):
        assert call(control, {}, key)[0] == call(f"{control}/{session.id}/trace", None, key)[0] == 401
    running.call(session.finish)
    status, answer = call(url, body, session.key)
    assert status == 410 and answer["error"]["code"] == "session_ended"
    assert len(session.turns) == 2 and not other.turns
    assert session.key not in json.dumps(session.trace())


def test_control(running, gpt, script):
    control = f"{running.gateway.address}/sessions"
    status, made = call(control, {"name": "a task/1"}, ADMIN)
    assert status == 200 and made["id"] == "a_task_1" and made["base_url"].endswith("/s/a_task_1")
    here = f"{control}/{made['id']}"
    _, answer = call(made["base_url"] + "/v1/messages", {"messages": [USER], "max_tokens": 9}, made["key"])
    assert call(f"{here}/reward", {"value": 0.5, "turn": answer["id"]}, ADMIN)[0] == 200
    assert call(f"{here}/reward", {"value": 1}, ADMIN)[0] == 200
    assert call(f"{here}/reward", {"value": 0.25, "lineage": answer["id"], "name": "sub-agent"}, ADMIN)[0] == 200
    for wrong in (
        {"value": 1, "turn": 0, "lineage": 0},
        {"value": 1, "lineage": 7},
        {"value": "much"},
        {"value": 1, "turn": 7},
        {"value": 1, "turn": "msg_0"},
        {"value": True, "turn": -1},
        {"value": 1, "name": {}},
    ):
        assert call(f"{here}/reward", wrong, ADMIN)[0] == 400, wrong
    assert call(f"{here}/finish", {"state": "lost"}, ADMIN)[0] == 400
    assert call(f"{here}/finish", {}, ADMIN)[0] == 200
    _, trace = call(f"{here}/trace", None, ADMIN)
    (turn,) = trace["turns"]
    assert (
        trace["state"] == "finished"
        and turn["ask"]["messages"] == [USER]
        and turn["answer"]["content"] == "Hello there"
    )
    assert len(turn["sampled_ids"]) == len(turn["logprobs"]) == 3
    assert (turn["rewards"], turn["lineage_rewards"]) == ({"outcome": 0.5}, {"sub-agent": 0.25})
    assert [state for id, state in running.changes if id == made["id"]] == ["open", "finished"]
    assert call(here, None, ADMIN, "DELETE")[0] == 200
    assert call(f"{here}/trace", None, ADMIN)[0] == 404


def test_a_session_that_is_finished_gives_up_what_is_sampled(running, session, script):
    script[""] = text = "four five six seven"
    running.engine.held[text] = running.call(asyncio.Event)
    statuses = []
    asking = threading.Thread(
        target=lambda: statuses.append(
            call(session.base_url + "/v1/chat/completions", {"messages": [USER]}, session.key)
        )
    )
    asking.start()
    while not session.turns:
        time.sleep(0.01)
    running.call(session.finish, "failed", "its agent died")
    asking.join(WAIT_S)
    assert statuses[0][0] == 410 and session.turns[0].completion is None


def test_a_stream_that_broke_off_is_asked_for_again(running, session, script, monkeypatch):
    monkeypatch.setattr(exchange, "BEAT_S", 0.05)
    monkeypatch.setattr(exchange, "HEADERS_S", 0.1)
    script[""] = text = "five six seven eight nine ten"
    held = running.engine.held[text] = running.call(asyncio.Event)
    body = json.dumps({"messages": [USER], "stream": True}).encode()

    def post():
        headers = {"x-api-key": session.key, "Idempotency-Key": "one"}
        request = urllib.request.Request(session.base_url + "/v1/chat/completions", body, headers)
        return urllib.request.urlopen(request, timeout=WAIT_S)

    with post() as broken:
        assert b"assistant" in broken.readline()
    again = post()
    running.call(held.set)
    with again:
        events = [json.loads(line[6:]) for line in again.read().splitlines() if line.startswith(b"data: {")]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == text and len(session.turns) == 1


def test_a_slow_first_token_is_waited_for_with_signs_of_life(running, session, script, monkeypatch):
    monkeypatch.setattr(exchange, "BEAT_S", 0.05)
    monkeypatch.setattr(exchange, "HEADERS_S", 0.1)
    script[""] = text = "six"  # held before its first token is told
    held = running.engine.held[text] = running.call(asyncio.Event)
    for path, sign in (("chat/completions", b": waiting\n"), ("messages", b"event: ping\n")):
        running.call(held.clear)
        body = json.dumps({"messages": [USER], "stream": True, "max_tokens": 9}).encode()
        headers = {"x-api-key": session.key}
        request = urllib.request.Request(f"{session.base_url}/v1/{path}", body, headers)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            lines = [answer.readline()]
            while sign not in lines:
                lines.append(answer.readline())
            running.call(held.set)
            assert b"six" in answer.read() and not any(b"six" in line for line in lines)
