"""Abort, the three pause modes, and what a weight update does to requests in flight."""

import http.client
import threading
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.inference import WAIT_S, LocalServer, output_logprobs, served, wait_until

LONG = {"max_new_tokens": 480, "ignore_eos": True, "sampling_seed": 1}


@pytest.fixture
def server(folders):
    with LocalServer(served(folders[0]), max_running=2) as running:
        yield running


def begin(server: LocalServer, rid: str, **params: Any) -> Future[Any]:
    """Send a request, on a slow engine until an answer is looked for."""
    body = {"rid": rid, "input_ids": [5, 6, 7], "sampling_params": {**LONG, **params}, "return_logprob": True}
    server.step_delay_s = 0.02
    return server.pool.submit(server.post, "/generate", body)


def known(server: LocalServer) -> set[str]:
    return {s.request.rid for s in server.batcher.in_flight()}


def generating(server: LocalServer) -> bool:
    return bool(server.batcher.scheduler.running) and server.batcher.scheduler.running[0].num_output > 3


def begun(server: LocalServer, rid: str = "r") -> Future[Any]:
    """One that has some tokens already."""
    future = begin(server, rid)
    wait_until(lambda: generating(server))
    return future


def answered(server: LocalServer, future: Future[Any]) -> Any:
    server.step_delay_s = 0.0
    status, answer = future.result(WAIT_S)
    assert status == 200, answer
    return answer


def num_tokens(server: LocalServer) -> int:
    return server.batcher.counters.num_generated_tokens


def test_abort_takes_all_requests_with_the_prefix_and_keeps_their_tokens(server):
    futures = {rid: begin(server, rid) for rid in ("ab1", "ab2", "ab3", "x")}
    wait_until(lambda: len(known(server)) == 4 and generating(server))
    assert server.post("/abort_request", {"rid": "ab"}) == (200, None)
    for rid in ("ab1", "ab2", "ab3"):
        answer = answered(server, futures[rid])
        reason = answer["meta_info"]["finish_reason"]
        assert reason["type"] == "abort" and answer["meta_info"]["prompt_tokens"] == 3
        begun = len(answer["output_ids"]) > 0
        assert reason["message"] == ("Aborted" if begun else "Abort in waiting queue")
        assert len(output_logprobs(answer)) == len(answer["output_ids"]) < 480
    assert answered(server, futures["x"])["meta_info"]["finish_reason"]["type"] == "length"
    assert server.post("/abort_request", {"rid": "", "abort_all": False}) == (200, None)
    assert server.post("/abort_request", {"rid": 3})[0] == 400


def test_abort_all(server):
    futures = [begin(server, str(i)) for i in range(4)]
    wait_until(lambda: len(known(server)) == 4)
    server.post("/abort_request", {"abort_all": True})
    assert {answered(server, f)["meta_info"]["finish_reason"]["type"] for f in futures} == {"abort"}


def test_pause_abort_ends_requests_and_holds_new_ones(server):
    running = [begin(server, str(i)) for i in range(3)]
    wait_until(lambda: len(known(server)) == 3 and generating(server))
    assert server.post("/pause_generation", {})[1]["status"] == "ok"
    assert {answered(server, f)["meta_info"]["finish_reason"]["type"] for f in running} == {"abort"}
    held = begin(server, "held", max_new_tokens=3)
    assert server.get("/health")[0] == 200
    assert server.post("/generate", {"input_ids": []})[0] == 400, "a bad request is refused at once, not held"
    assert not held.done()
    server.post("/continue_generation", {})
    assert len(answered(server, held)["output_ids"]) == 3


def test_an_aborted_request_resumes_with_its_tokens_as_if_nothing_had_happened(server):
    whole = server.generate([5, 6, 7], **LONG)
    cut = begun(server, "cut")
    server.post("/pause_generation", {"mode": "abort"})
    head = answered(server, cut)
    server.post("/continue_generation", {})
    num = len(head["output_ids"])
    assert 0 < num < 480
    tail = server.generate([5, 6, 7, *head["output_ids"]], **{**LONG, "max_new_tokens": 480 - num})
    assert head["output_ids"] + tail["output_ids"] == whole["output_ids"]
    assert output_logprobs(head) + output_logprobs(tail) == pytest.approx(output_logprobs(whole), abs=1e-4)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_paused_request_stands_still_and_goes_on(server, mode):
    wanted = server.generate([5, 6, 7], **LONG)
    server.post("/flush_cache", {})
    future = begun(server)
    server.post("/pause_generation", {"mode": mode})
    still = num_tokens(server)
    assert bool(server.batcher.scheduler.running) == (mode == "in_place")
    assert server.post("/flush_cache", {})[0] == (200 if mode == "retract" else 400)
    assert server.get("/health")[0] == 200 and num_tokens(server) == still and not future.done()
    server.post("/continue_generation", {})
    answer = answered(server, future)
    assert answer["output_ids"] == wanted["output_ids"]
    assert output_logprobs(answer) == pytest.approx(output_logprobs(wanted), abs=1e-4)
    assert answer["meta_info"]["num_retractions"] == (1 if mode == "retract" else 0)


def test_requests_can_be_aborted_while_paused(server):
    future = begun(server)
    server.post("/pause_generation", {"mode": "in_place"})
    server.post("/abort_request", {"rid": "r"})
    assert answered(server, future)["meta_info"]["finish_reason"]["message"] == "Aborted"
    server.post("/continue_generation", {})


def test_holding_has_a_limit(folders):
    with LocalServer(served(folders[0]), hold_limit_s=0.2) as server:
        server.post("/pause_generation", {})
        status, answer = server.post("/generate", {"input_ids": [1]})
        assert status == 503 and "continue_generation" in answer["error"]["message"]


def test_a_client_that_leaves_while_it_continues_generation_holds_up_nobody(folders):
    with LocalServer(served(folders[0]), hold_limit_s=1.0) as server:
        server.post("/pause_generation", {"mode": "retract"})
        busy = threading.Event()
        server.engine.call(lambda: busy.wait(WAIT_S))
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=WAIT_S)
        connection.request("POST", "/continue_generation", "{}")
        wait_until(lambda: not server.engine._inbox.empty())
        connection.close()
        for _ in range(5):  # the event loop learns of the closed connection
            server.get("/health")
        busy.set()
        assert len(server.generate([1], max_new_tokens=2, ignore_eos=True)["output_ids"]) == 2


def test_a_control_call_to_a_busy_engine_has_a_limit(server, monkeypatch):
    monkeypatch.setattr("arealite.inference.core.engine.CALL_LIMIT_S", 0.1)
    busy = threading.Event()
    server.engine.call(lambda: busy.wait(WAIT_S))
    status, answer = server.post("/flush_cache", {})
    assert status == 503 and "flush_cache" in answer["error"]["message"]
    busy.set()
    assert server.get("/health")[0] == 200


def test_unknown_pause_mode(server):
    status, answer = server.post("/pause_generation", {"mode": "freeze"})
    assert status == 400 and "in_place" in answer["error"]["message"]
    assert len(server.generate([1], max_new_tokens=2, ignore_eos=True)["output_ids"]) == 2


@pytest.mark.parametrize("mode", [None, "retract"], ids=["not paused", "retract"])
def test_after_an_update_tokens_come_from_the_new_weights(server, folders, mode):
    """Every token's logprob is that of the weights that its span names, its keys and values included."""
    future = begun(server)
    if mode:
        server.post("/pause_generation", {"mode": mode})
    body = {"model_path": str(folders[1]), "weight_version": "1"}
    assert server.post("/update_weights_from_disk", body)[1]["success"]
    if mode:
        server.post("/continue_generation", {})
    answer = answered(server, future)
    tokens, about = answer["output_ids"], answer["meta_info"]
    old, new = about["weight_versions"]
    assert (old["version"], new["version"]) == ("0", "1") and about["weight_version"] == "1"
    assert old["start"] == 0 and old["end"] == new["start"] and new["end"] == len(tokens) == 480
    for span, folder in ((old, folders[0]), (new, folders[1])):
        with LocalServer(served(folder)) as fresh:
            score = fresh.generate([5, 6, 7, *tokens], max_new_tokens=0, top={"logprob_start_len": 2})
        wanted = [entry[0] for entry in score["meta_info"]["input_token_logprobs"][1:]]
        part = slice(span["start"], span["end"])
        assert output_logprobs(answer)[part] == pytest.approx(wanted[part], abs=1e-4)


def test_in_place_keeps_keys_and_values_over_an_update_only_when_asked(server, folders):
    future = begun(server)
    server.post("/pause_generation", {"mode": "in_place"})
    body = {"model_path": str(folders[1]), "weight_version": "1"}
    status, answer = server.post("/update_weights_from_disk", body)
    assert status == 400 and not answer["success"] and "flush_cache" in answer["message"]
    assert server.get("/model_info")[1]["weight_version"] == "0"
    assert server.post("/update_weights_from_disk", {**body, "flush_cache": False})[1]["success"]
    server.post("/continue_generation", {})
    about = answered(server, future)["meta_info"]
    assert [span["version"] for span in about["weight_versions"]] == ["0", "1"] and about["num_retractions"] == 0


def test_an_update_may_abort_all(server, folders):
    future = begun(server)
    body = {"model_path": str(folders[1]), "weight_version": "1", "abort_all_requests": True}
    assert server.post("/update_weights_from_disk", body)[1]["success"]
    about = answered(server, future)["meta_info"]
    assert about["finish_reason"]["type"] == "abort" and [s["version"] for s in about["weight_versions"]] == ["0"]


def test_a_prompt_computed_with_old_weights_is_not_shared_after_an_update(server, folders):
    prompt = list(range(20))
    server.generate(prompt, max_new_tokens=2)
    body = {"model_path": str(folders[1]), "weight_version": "1", "flush_cache": False}
    assert server.post("/update_weights_from_disk", body)[1]["success"]
    answer = server.generate(prompt, max_new_tokens=8, temperature=0)
    with LocalServer(served(folders[1])) as fresh:
        wanted = fresh.generate(prompt, max_new_tokens=8, temperature=0)
    assert answer["meta_info"]["cached_tokens"] == 0
    assert (answer["output_ids"], output_logprobs(answer)) == (wanted["output_ids"], output_logprobs(wanted))
