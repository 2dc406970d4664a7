"""`--strict-sglang`: what SGLang 0.5.23 refuses is refused, in its words; one row per fact of its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.inference import LocalServer, fetch, save_tiny_llama, served, wait_until

from arealite.inference.strict import VERSION

IDS = {"input_ids": [1, 2, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def server(folder: Path) -> Iterator[LocalServer]:
    with LocalServer(served(folder), strict_sglang=True, health_limit_s=0.1) as running:
        yield running


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LocalServer]:
    with LocalServer(served(folder), strict_sglang=True) as running:
        yield running


SCHEMA = "schema"  # {"error": "<string>"}
VALUE = "value"  # {"error": {"message": "..."}}
REQUEST = "request"  # {"object": "error", ...}, of FastAPI's checks
CONTROL = "control"  # {"success": false, "message": "..."}


def form_of(answer: Any) -> str:
    if set(answer) == {"error"}:
        return SCHEMA if isinstance(answer["error"], str) else VALUE
    if set(answer) == {"object", "message", "type", "param", "code"}:
        return REQUEST
    return CONTROL if set(answer) == {"success", "message"} and answer["success"] is False else "unknown"


@pytest.mark.parametrize(
    ("path", "body", "form"),
    [
        ("/generate", {**IDS, "sampling_params": {"max_tokens": 5}}, SCHEMA),
        ("/generate", {**IDS, "sampling_params": {"max_new_tokens": 5.0}}, SCHEMA),
        ("/generate", {**IDS, "sampling_params": {"max_new_tokens": "5"}}, SCHEMA),
        ("/generate", {**IDS, "sampling_params": {"temperature": "1"}}, SCHEMA),
        ("/generate", {**IDS, "sampling_params": {"ignore_eos": 1}}, SCHEMA),
        ("/generate", {**IDS, "sampling_params": {"stop_token_ids": 5}}, SCHEMA),
        ("/generate", {**IDS, "stream": "yes"}, SCHEMA),
        ("/generate", {**IDS, "return_logprob": 1}, SCHEMA),
        ("/generate", {**IDS, "sampling_params": {"temperature": -1}}, VALUE),
        ("/generate", {**IDS, "sampling_params": {"top_p": 0}}, VALUE),
        ("/generate", {**IDS, "sampling_params": {"top_k": 0}}, VALUE),
        ("/generate", {**IDS, "sampling_params": {"repetition_penalty": 2.5}}, VALUE),
        ("/generate", {**IDS, "sampling_params": {"min_new_tokens": 6, "max_new_tokens": 5}}, VALUE),
        ("/generate", {"input_ids": []}, VALUE),
        ("/generate", {"input_ids": [1, 10_000_000]}, VALUE),
        ("/generate", {"text": "a", "input_ids": [1]}, VALUE),
        ("/generate", {}, VALUE),
        ("/generate", {"input_ids": [1] * 500, "sampling_params": {"max_new_tokens": 13}}, VALUE),
        ("/generate", {"input_ids": [1] * 400}, VALUE),  # 128 new tokens by default, not what fits
        ("/generate", {"input_ids": [[1], [2]], "rid": ["a", "a"]}, VALUE),
        ("/generate", {**IDS, "lora_path": "nobody"}, VALUE),
        ("/v1/chat/completions", {"messages": []}, REQUEST),
        ("/v1/completions", {"prompt": 3}, REQUEST),
        ("/pause_generation", {"mode": "softly"}, REQUEST),
        ("/update_weights_from_disk", {}, REQUEST),
        ("/update_weights_from_disk", {"model_path": "nowhere"}, CONTROL),
        ("/update_weight_version", {"new_version": 5}, REQUEST),
        ("/update_weights_from_disk", {"model_path": "nowhere", "weight_version": 5}, REQUEST),
        ("/update_weights_from_distributed", {"names": [], "dtypes": [], "shapes": []}, CONTROL),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["x"]}, CONTROL),
        ("/end_weight_update", {}, CONTROL),
        ("/destroy_weights_update_group", {"group_name": "nobody"}, CONTROL),
    ],
)
def test_refusals_have_sglangs_form(shared: LocalServer, path: str, body: Any, form: str) -> None:
    status, answer = shared.post(path, body)
    assert (status, form_of(answer)) == (400, form), answer


@pytest.mark.parametrize("path", ["/get_load", "/get_weight_version", "/weight_version", "/update_weights_from_shm"])
def test_what_sglang_has_not_is_not_found(shared: LocalServer, path: str) -> None:
    status, answer = shared.post(path, {}) if path.endswith("shm") else shared.get(path)
    assert status == 404 and form_of(answer) == REQUEST and answer["code"] == 404


def test_the_version_is_told_where_clients_look(shared: LocalServer) -> None:
    for path in ("/server_info", "/get_server_info", "/v1/loads?include=core"):
        assert shared.get(path)[1]["version"] == VERSION
    assert shared.get("/v1/models")[1]["data"][0]["owned_by"] == "sglang"


def test_tensors_are_taken_in_a_session_only(server: LocalServer) -> None:
    none = {"names": [], "dtypes": [], "shapes": []}
    status, answer = server.post("/update_weights_from_distributed", none)
    assert status == 400 and "begin_weight_update" in answer["message"]
    assert server.post("/begin_weight_update", {"selector": "all"})[0] == 200
    assert server.post("/begin_weight_update", {})[0] == 400, "one session at a time"
    status, answer = server.post("/update_weights_from_distributed", {**none, "group_name": "nobody"})
    assert "begin_weight_update" not in answer["message"]
    assert server.post("/end_weight_update", {})[0] in (200, 400)
    assert server.post("/end_weight_update", {})[0] == 400


def test_a_flush_is_refused_while_requests_are_frozen(server: LocalServer, folder: Path) -> None:
    server.step_delay_s = 0.02
    body = {**IDS, "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}
    future = server.pool.submit(server.post, "/generate", body)
    wait_until(lambda: server.batcher.scheduler.running)
    assert server.post("/pause_generation", {"mode": "in_place"})[0] == 200
    assert server.get("/flush_cache")[0] == 400
    update = {"model_path": str(folder), "weight_version": "1"}
    status, answer = server.post("/update_weights_from_disk", update)
    assert status == 400 and form_of(answer) == CONTROL
    assert server.post("/update_weights_from_disk", {**update, "flush_cache": False})[1]["success"]
    server.step_delay_s = 0.0
    server.post("/continue_generation", {})
    assert future.result()[1]["meta_info"]["weight_version"] == "1"


def test_health_fails_while_paused(server: LocalServer) -> None:
    """SGLang generates a token for it; `/ping` does not, and `/ready` tells of the pause."""
    assert server.post("/pause_generation", {})[0] == 200
    for path in ("/health", "/health_generate", "/ready"):
        status, answer = server.get(path)
        assert status == 503 and answer["type"] == "503", path
    assert server.get("/ping")[0] == 200
    server.post("/continue_generation", {})
    assert server.get("/health")[0] == server.get("/ready")[0] == 200


def test_nothing_to_generate_has_a_logprob_without_a_token(shared: LocalServer) -> None:
    body = {**IDS, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    answer = shared.post("/generate", body)[1]
    assert answer["output_ids"] == [] and len(answer["meta_info"]["output_token_logprobs"]) == 1
    assert len(answer["meta_info"]["input_token_logprobs"]) == 3


def test_an_abort_in_the_queue_tells_little(folder: Path) -> None:
    with LocalServer(served(folder), max_running=1, strict_sglang=True) as server:
        server.step_delay_s = 0.02
        long = {"sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
        futures = [server.pool.submit(server.post, "/generate", {**long, "input_ids": [i]}) for i in (1, 2)]
        wait_until(lambda: server.batcher.scheduler.running and server.batcher.scheduler.waiting)
        server.post("/abort_request", {"abort_all": True})
        accounts = [future.result()[1]["meta_info"] for future in futures]
        waited = next(a for a in accounts if a["finish_reason"]["message"] == "Abort in waiting queue")
        assert "prompt_tokens" not in waited and "cached_tokens" not in waited and waited["completion_tokens"] == 0


def test_a_stream_is_cumulative_and_its_errors_are_events(shared: LocalServer) -> None:
    body = {**IDS, "stream": True, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    status, text = fetch(shared.url + "/generate", body)
    events = text.split("\n\n")
    assert status == 200 and events[-2:] == ["data: [DONE]", ""] and all(e.startswith("data: {") for e in events[:-2])
