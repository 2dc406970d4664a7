"""Streams of /generate: cumulative, incremental, of batches, aborted, failing; metrics and tokens."""

import asyncio
import json
import socket
from functools import partial
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.inference import WAIT_S, LocalServer, fetch, output_logprobs, served, wait_until

from arealite.inference.core.answers import ShownAnswer
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.core.sequence import Sequence
from arealite.observe import waits


@pytest.fixture
def model(folder):
    return served(folder)


def events(server: LocalServer, body: dict[str, Any]) -> list[Any]:
    status, text = fetch(server.url + "/generate", {**body, "stream": True})
    assert status == 200 and text.endswith("data: [DONE]\n\n"), text
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]


def asked(**params: Any) -> dict[str, Any]:
    return {
        "input_ids": [1, 2, 3],
        "return_logprob": True,
        "sampling_params": {"max_new_tokens": 20, "sampling_seed": 3, "ignore_eos": True, **params},
    }


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    account = {k: v for k, v in answer["meta_info"].items() if k not in ("id", "e2e_latency", "cached_tokens")}
    return {**answer, "meta_info": account}


def test_a_stream_is_cumulative_and_ends_with_the_whole(server):
    whole = server.post("/generate", asked())[1]
    server.post("/flush_cache", {})  # so that the prompt is computed in the same pieces
    parts = events(server, asked())
    assert without_times(parts[-1]) == without_times(whole)
    for part, following in pairwise(parts):
        assert part["meta_info"]["finish_reason"] is None and following["text"].startswith(part["text"])
        num = len(part["output_ids"])
        assert following["output_ids"][:num] == part["output_ids"] and len(following["output_ids"]) > num
        assert part["meta_info"]["completion_tokens"] == num == len(part["meta_info"]["output_token_logprobs"])
        assert part["meta_info"]["weight_version"] == "0"


@pytest.mark.parametrize("of_server", [True, False])
def test_increments_add_up_to_the_whole(model, of_server):
    with LocalServer(model, incremental_streaming=of_server) as server:
        whole = server.post("/generate", asked())[1]
        server.post("/flush_cache", {})
        parts = events(server, asked() | ({} if of_server else {"stream_only_new": True}))
    assert len(parts) > 1
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [i for part in parts for i in part["output_ids"]] == whole["output_ids"]
    assert [p for part in parts for p in output_logprobs(part)] == output_logprobs(whole)


def test_a_batch_streams_each_answer_under_its_index(server):
    body = {**asked(n=2), "input_ids": [[1, 2, 3], [4, 5]]}
    whole = server.post("/generate", body)[1]
    last = {part["index"]: part for part in events(server, body)}
    assert [last[i]["output_ids"] for i in range(4)] == [answer["output_ids"] for answer in whole]
    assert all(part["meta_info"]["finish_reason"] for part in last.values())


def test_a_stop_string_is_never_shown(server):
    free = server.post("/generate", asked(max_new_tokens=60))[1]["text"]
    position = next(i for i in range(10, 50) if free[i : i + 3].isascii() and free.find(free[i : i + 3]) == i)
    stop = free[position : position + 3]
    parts = events(server, asked(max_new_tokens=60, stop=stop))
    assert parts[-1]["text"] == free[:position] and parts[-1]["meta_info"]["finish_reason"]["matched"] == stop
    assert all(free[:position].startswith(part["text"]) for part in parts)


def test_a_character_is_shown_when_it_is_whole(model):
    ids = model.tokenizer("h\u00e9\U0001f600!").input_ids
    sequence = Sequence(GenerateRequest("r", [1], SamplingParams(20)))
    answer = ShownAnswer(model.tokenizer, sequence)
    texts = []
    for token in ids:
        sequence.tokens.append(token)
        answer.num_known += 1
        answer.advance()
        texts.append(answer.text)
    assert texts == ["h", "h", "h\u00e9", "h\u00e9", "h\u00e9", "h\u00e9", "h\u00e9\U0001f600", "h\u00e9\U0001f600!"]


def test_top_and_named_tokens_are_rendered(server):
    body = {**asked(temperature=0, max_new_tokens=3), "logprob_start_len": 0, "top_logprobs_num": 2}
    body |= {"token_ids_logprob": [7, 8], "return_text_in_logprobs": True, "return_prompt_token_ids": True}
    answer = server.post("/generate", body)[1]
    about = answer["meta_info"]
    assert answer["prompt_token_ids"] == [1, 2, 3]
    for entry, top, named in zip(about["output_token_logprobs"], about["output_top_logprobs"],
                                 about["output_token_ids_logprobs"], strict=True):  # fmt: skip
        assert top[0][1:] == entry[1:] and top[0][0] == pytest.approx(entry[0], abs=1e-4) and top[0][0] >= top[1][0]
        assert [token for _, token, _ in named] == [7, 8]
        assert entry[2] == server.batcher.model.tokenizer.decode([entry[1]])
    assert len(about["input_top_logprobs"]) == 3 and about["input_top_logprobs"][0] is None
    assert about["input_token_logprobs"][0][0] is None


def test_a_stream_survives_a_pause_and_an_abort_ends_it(server):
    server.step_delay_s = 0.01
    future = server.pool.submit(events, server, {**asked(max_new_tokens=400), "rid": "x"})
    wait_until(lambda: server.batcher.counters.num_generated_tokens > 3)
    server.post("/pause_generation", {"mode": "retract"})
    server.post("/update_weight_version", {"new_version": "1", "abort_all_requests": False})
    made = server.batcher.counters.num_generated_tokens
    server.post("/continue_generation", {})
    wait_until(lambda: server.batcher.counters.num_generated_tokens > made + 3)
    server.post("/abort_request", {"rid": "x"})
    last = future.result()[-1]
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert [span["version"] for span in last["meta_info"]["weight_versions"]] == ["0", "1"]


def test_a_failure_in_the_middle_is_the_last_event(server, monkeypatch):
    server.step_delay_s = 0.01
    future = server.pool.submit(events, server, asked(max_new_tokens=400))
    wait_until(lambda: server.batcher.counters.num_generated_tokens > 3)

    def broken() -> None:
        raise RuntimeError("the cable is unplugged")

    monkeypatch.setattr(server.batcher, "step", broken)
    *good, last = future.result()
    assert all("error" not in event for event in good)
    assert last["error"]["code"] == 503 and "the cable is unplugged" in last["error"]["message"]


def test_metrics_tell_the_load_in_prometheus_form(model):
    with LocalServer(model, max_running=1) as server:
        server.step_delay_s = 0.01
        futures = [server.pool.submit(server.post, "/generate", asked(max_new_tokens=300)) for _ in range(2)]
        wait_until(lambda: server.batcher.scheduler.running and server.batcher.scheduler.waiting)
        text = server.get("/metrics")[1]
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
        assert found["sglang:num_running_reqs"] == found["sglang:num_queue_reqs"] == 1
        assert found["sglang:num_paused_reqs"] == 0 < found["sglang:token_usage"] < 1
        assert found["process_resident_memory_bytes"] > 1e7
        server.post("/pause_generation", {"mode": "in_place"})
        held = server.pool.submit(server.post, "/generate", asked(max_new_tokens=1))
        wait_until(lambda: 'num_paused_reqs{model_name="tiny"} 3' in server.get("/metrics")[1])
        assert "\n# TYPE sglang:num_paused_reqs gauge\n" in text
        server.post("/continue_generation", {})
        server.post("/abort_request", {"abort_all": True})
        for future in [*futures, held]:
            future.result()
        info = server.get("/server_info")[1]
        assert info["resident_bytes"] > info["kv_cache_bytes"] > 0


def test_a_chat_is_held_while_paused_and_aborted_by_its_id(model):
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    body = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "max_tokens": 400, "rid": "chat"}
    with LocalServer(model) as server:
        server.step_delay_s = 0.01
        server.post("/pause_generation", {})
        future = server.pool.submit(server.post, "/v1/chat/completions", body)
        wait_until(lambda: 'num_paused_reqs{model_name="tiny"} 1' in server.get("/metrics")[1])
        server.post("/continue_generation", {})
        wait_until(lambda: server.batcher.counters.num_generated_tokens > 3)
        server.post("/abort_request", {"rid": "chat"})
        status, answer = future.result()
    [choice] = answer["choices"]
    assert status == 200 and answer["id"] == "chat" and choice["finish_reason"] == "abort"
    assert 3 < answer["usage"]["completion_tokens"] < 400 and choice["message"]["content"]


def test_a_chat_stream_that_finds_no_place_is_refused_by_its_status(server):
    server.engine._max_queued = 0
    status, answer = server.post("/v1/chat/completions", {"input_ids": [1], "stream": True})
    assert status == 503 and "would pass 0" in answer["message"]


def test_the_bytes_of_tokens_are_those_of_the_text(server):
    """Also of characters that several tokens make up."""
    text = "h\u00e9\U0001f600 "
    tokens = server.batcher.model.tokenizer(text).input_ids
    bias = {"logprobs": True, "max_tokens": 1, "temperature": 0}
    named = []
    for token in tokens:
        body = {"input_ids": [1], "logit_bias": {str(token): 1e6}, **bias}
        [choice] = server.post("/v1/chat/completions", body)[1]["choices"]
        named += choice["logprobs"]["content"][0]["bytes"]
    assert len(tokens) == 8 and bytes(named).decode() == text


def test_a_streamed_tokens_offset_is_that_of_the_whole(server):
    body = {"prompt": [1, 2], "max_tokens": 24, "logprobs": 0, "seed": 3, "ignore_eos": True}
    whole = server.post("/v1/completions", body)[1]["choices"][0]["logprobs"]["text_offset"]
    _, text = server.post("/v1/completions", {**body, "stream": True})
    parts = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert [o for part in parts for o in part["choices"][0]["logprobs"]["text_offset"]] == whole


def test_an_echo_has_no_special_tokens_that_the_answer_has_not(server):
    prompt = [257, *server.batcher.model.tokenizer("abc").input_ids]
    for skip, text in ((True, "abc"), (False, "<bos>abc")):
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "skip_special_tokens": skip}
        assert server.post("/v1/completions", body)[1]["choices"][0]["text"] == text


def test_a_client_that_stops_reading_is_cut_off(model):
    body = {**asked(max_new_tokens=400), "top_logprobs_num": 200, "stream": True}
    with LocalServer(model, request_limit_s=3.0) as server:
        place = urlsplit(server.url)
        with socket.create_connection((str(place.hostname), int(place.port or 0)), WAIT_S) as opened:
            raw = json.dumps(body).encode()
            opened.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(raw), raw))
            wait_until(lambda: any("reading of a stream" in line for line in waits.lines()))
            wait_until(lambda: not any("_handle" in str(task) for task in asyncio.all_tasks(server._loop)))
            pieces = list(iter(partial(opened.recv, 1 << 20), b""))
            assert b"data: {" in b"".join(pieces[:2]) and b"[DONE]" not in b"".join(pieces)
        assert server.get("/health")[0] == 200
