"""The server over real sockets: generation, sharing, the cache budget, stopping, errors, determinism."""

import http.client
import json
import random
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from support.inference import EOS, WAIT_S, LocalServer, output_logprobs, save_tiny_llama, served, wait_until
from transformers import AutoTokenizer

from arealite.inference.core.batcher import Batcher
from arealite.inference.core.engine import Engine, EngineFailure
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.http.generation import version_spans


def bodies(num: int, seed: int = 0, **params: Any) -> list[dict[str, Any]]:
    """Requests of mixed lengths, each with a seed of its own."""
    rng = random.Random(seed)
    return [
        {
            "input_ids": [rng.randrange(256) for _ in range(rng.randint(1, 70))],
            "sampling_params": {"max_new_tokens": rng.randint(1, 50), "sampling_seed": i, "ignore_eos": True, **params},
        }
        for i in range(num)
    ]


def results(answers: list[Any]) -> list[tuple[list[int], list[float]]]:
    return [(a["output_ids"], output_logprobs(a)) for a in answers]


def test_the_answer_has_every_field_of_the_protocol(server):
    body = {"rid": "abc", "input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}, "return_logprob": True}
    status, answer = server.post("/generate", {**body, "logprob_start_len": 1})
    assert status == 200 and set(answer) == {"text", "output_ids", "meta_info"}
    about = answer["meta_info"]
    assert about["id"] == "abc" and about["prompt_tokens"] == 3 and about["completion_tokens"] == 4
    assert about["finish_reason"] == {"type": "length", "length": 4}
    assert about["weight_version"] == "0" and about["weight_versions"] == [{"version": "0", "start": 0, "end": 4}]
    assert about["output_token_logprobs_length"] == 4 and about["num_retractions"] == 0 and about["e2e_latency"] > 0
    assert [entry[1:] for entry in about["output_token_logprobs"]] == [[t, None] for t in answer["output_ids"]]
    assert [entry[1] for entry in about["input_token_logprobs"]] == [2, 3]
    assert about["input_token_logprobs"][0][0] is None and about["input_token_logprobs"][1][0] < 0


def test_a_batch_answers_in_order_and_text_is_tokenised(server):
    params = {"max_new_tokens": 3, "temperature": 0}
    _, many = server.post("/generate", {"text": ["abc", "xy"], "sampling_params": params})
    singles = [server.post("/generate", {"text": text, "sampling_params": params})[1] for text in ("abc", "xy")]
    assert [a["output_ids"] for a in many] == [a["output_ids"] for a in singles]
    assert [a["meta_info"]["prompt_tokens"] for a in many] == [3, 2]


def test_a_group_shares_one_prefill_of_its_prompt(folder):
    with LocalServer(served(folder), max_running=16) as server:
        prompt = list(range(37))
        requests = [
            {"input_ids": prompt, "routing_key": "g", "sampling_params": {"max_new_tokens": 20, "sampling_seed": i}}
            for i in range(8)
        ]
        answers = server.generate_many(requests)
        assert server.batcher.counters.num_prefill_tokens == len(prompt) + 7, "the others compute its last token"
        assert sorted(a["meta_info"]["cached_tokens"] for a in answers) == [0] + [36] * 7
        assert server.post("/flush_cache", {})[0] == 200
        alone = []
        for request in requests:
            alone += server.generate_many([request])
            server.post("/flush_cache", {})
    for (tokens, logprobs), (own_tokens, own_logprobs) in zip(results(answers), results(alone), strict=True):
        assert tokens == own_tokens and logprobs == pytest.approx(own_logprobs, abs=1e-5)


def test_a_full_cache_makes_requests_wait_or_retract_and_changes_nothing(folder):
    model = served(folder)
    requests = bodies(24, seed=1)
    with LocalServer(model, max_running=8, kv_tokens=4096) as server:
        wanted = server.generate_many(requests)
        assert server.batcher.scheduler.num_retractions == 0
    with LocalServer(model, max_running=8, kv_tokens=160) as server:
        answers = server.generate_batch(requests)
        assert server.batcher.scheduler.num_retractions > 0, "the budget must have been exhausted in this test"
        assert sum(a["meta_info"]["num_retractions"] for a in answers) == server.batcher.scheduler.num_retractions
        server.post("/flush_cache", {})
        assert server.batcher.scheduler.num_used_tokens == 0, "every page comes back"
    for (tokens, logprobs), (own_tokens, own_logprobs) in zip(results(answers), results(wanted), strict=True):
        assert tokens == own_tokens and logprobs == pytest.approx(own_logprobs, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_results_do_not_depend_on_company(folder, dtype):
    """Bit for bit: alone, together, in another order, and with a cache so small that requests are retracted."""
    model = served(folder, dtype, deterministic=True)
    requests = bodies(12, seed=2) + [{**body, "input_ids": list(range(20))} for body in bodies(4, seed=3)]
    with LocalServer(model, max_running=8) as server:
        alone = [server.generate_many([body])[0] for body in requests]
        together = server.generate_many(requests)
        backwards = server.generate_many(requests[::-1])[::-1]
    with LocalServer(model, max_running=8, kv_tokens=144) as server:
        squeezed = server.generate_batch(requests)
        assert server.batcher.scheduler.num_retractions > 0
    assert results(alone) == results(together) == results(backwards) == results(squeezed)


def test_a_seed_gives_one_stream_that_resumption_continues(server):
    prompt = list(range(30))
    whole = server.generate(prompt, max_new_tokens=20, sampling_seed=9, ignore_eos=True)["output_ids"]
    head = server.generate(prompt, max_new_tokens=7, sampling_seed=9, ignore_eos=True)["output_ids"]
    tail = server.generate(prompt + head, max_new_tokens=13, sampling_seed=9, ignore_eos=True)["output_ids"]
    assert head + tail == whole
    other = server.generate(prompt, max_new_tokens=20, sampling_seed=10, ignore_eos=True)["output_ids"]
    assert other != whole


def test_stop_strings_match_across_tokens_and_trim_the_text(server):
    params = {"max_new_tokens": 60, "sampling_seed": 4, "ignore_eos": True}
    free = server.generate(list(b"abc"), **params)
    text = free["text"]
    position = next(i for i in range(20, 50) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i)
    stop = text[position : position + 3]
    answer = server.generate(list(b"abc"), **params, stop=["never there", stop])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == text[:position]
    assert answer["output_ids"] == free["output_ids"][: len(answer["output_ids"])]
    kept = server.generate(list(b"abc"), **params, stop=stop, no_stop_trim=True)
    assert kept["text"] == text[:position] + stop and kept["output_ids"] == answer["output_ids"]


def test_a_stop_string_that_comes_before_min_new_tokens_is_no_end(server, folder):
    [a] = AutoTokenizer.from_pretrained(folder)("a", add_special_tokens=False).input_ids
    params = {"max_new_tokens": 9, "logit_bias": {str(a): 100.0}, "stop": "aa", "temperature": 0.0}
    answers = [server.generate([5], **params, min_new_tokens=n) for n in (0, 5, 9)]
    assert [a["text"] for a in answers] == ["", "aaaa", "a" * 9]
    assert [a["meta_info"]["completion_tokens"] for a in answers] == [2, 6, 9]
    reasons = [a["meta_info"]["finish_reason"]["type"] for a in answers]
    assert reasons == ["stop", "stop", "length"]
    resumed = server.generate(
        [5, a, a, a], **{**params, "max_new_tokens": 6}, min_new_tokens=5, top={"num_prompt_tokens": 1}
    )
    assert resumed["text"] == "a" and len(resumed["output_ids"]) == 3


def test_stop_tokens_end_unless_ignored_or_too_early(server):
    params = {"max_new_tokens": 30, "sampling_seed": 5}
    free = server.generate([7, 8], **params, ignore_eos=True)["output_ids"]
    at = next(i for i in range(5, 30) if free.index(free[i]) == i)
    answer = server.generate([7, 8], **params, stop_token_ids=[free[at]])
    assert answer["output_ids"] == free[: at + 1] and answer["meta_info"]["finish_reason"] == {
        "type": "stop",
        "matched": free[at],
    }
    assert server.generate([7, 8], **params, stop_token_ids=[free[at]], ignore_eos=True)["output_ids"] == free
    late = server.generate([7, 8], **params, stop_token_ids=[free[at]], min_new_tokens=at + 3)["output_ids"]
    assert len(late) >= at + 3 and free[at] not in late[: at + 3]


def test_the_end_of_sequence_token_ends(server):
    answers = [server.generate([i], max_new_tokens=400, temperature=5.0, sampling_seed=i) for i in range(8)]
    ended = [a for a in answers if a["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}]
    assert ended and all(a["output_ids"].index(EOS) == len(a["output_ids"]) - 1 for a in ended)
    assert all("<eos>" not in a["text"] for a in ended)
    assert all(EOS not in a["output_ids"] for a in answers if a not in ended)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "text and input_ids"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"input_ids": [' + b"9" * 5000 + b"]}", "JSON"),
        (b"[1]", "body"),
        (b'{"text": "\\ud800"}', "hex escape"),
        (json.dumps({"input_ids": [1] * 500, "sampling_params": {"max_new_tokens": 13}}).encode(), "max_new_tokens"),
    ],
)
def test_malformed_requests_get_400_and_the_server_goes_on(server, raw, named):
    status, answer = server.post("/generate", raw)
    assert status == 400 and named in answer["error"]["message"]
    assert len(server.generate([1, 2], max_new_tokens=3, ignore_eos=True)["output_ids"]) == 3


def test_unknown_paths_methods_and_models_answer_json(server):
    assert server.get("/nowhere")[0] == 404 and server.get("/generate")[0] == 405
    assert "error" in server.get("/nowhere")[1]
    assert "use POST" in server.get("/generate")[1]["message"]
    assert server.get("/v1/models/tiny") == (200, server.get("/v1/models")[1]["data"][0])
    status, answer = server.get("/v1/models/no/thing")
    assert status == 404 and "'no/thing'" in answer["message"] and "served are tiny" in answer["message"]


def test_a_body_that_cannot_be_unpacked_is_the_clients_error(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=WAIT_S)
    connection.request("POST", "/generate", b"{}" * 100_000, {"Content-Encoding": "gzip"})
    response = connection.getresponse()
    assert response.status == 400 and b"content-encoding: gzip" in response.read()
    connection.close()


def test_introspection_endpoints(server):
    assert server.get("/health") == (200, None)
    _, about = server.get("/model_info")
    assert about["weight_version"] == "0" and about["vocab_size"] == 260
    _, state = server.get("/server_info")
    assert state["max_total_num_tokens"] == 2048 and state["version"].startswith("arealite")
    assert server.get("/v1/models")[1]["data"][0]["max_model_len"] == 512
    assert server.get("/flush_cache")[0] == 200
    for path in ("/begin_weight_update", "/end_weight_update"):
        assert server.post(path, {})[1]["success"]
    for path in ("/release_memory_occupation", "/resume_memory_occupation"):
        assert server.post(path, {}) == (200, None)


LONG = {
    "/generate": {"sampling_params": {"max_new_tokens": 500, "ignore_eos": True}},
    "/v1/chat/completions": {"max_tokens": 500, "ignore_eos": True},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", LONG)
def test_a_client_that_goes_away_frees_its_place(folder, path, stream):
    body = {"input_ids": [1], "stream": stream, **LONG[path]}
    with LocalServer(served(folder), max_running=1) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=WAIT_S)
        server.step_delay_s = 0.02
        connection.request("POST", path, json.dumps(body))
        wait_until(lambda: server.batcher.scheduler.running)
        assert not stream or connection.getresponse().read(6) == b"data: "
        connection.close()
        wait_until(lambda: not server.batcher.scheduler.running)
        assert server.batcher.counters.num_generated_tokens < 500


def test_logits_that_are_not_finite_end_the_request_only(server):
    module, request = server.batcher.model.module.model, {"max_new_tokens": 20, "sampling_seed": 1, "ignore_eos": True}
    weights = module.norm.weight, module.layers[0].input_layernorm.weight
    good = server.generate(list(range(40)), **request)
    with torch.no_grad():
        for weight in weights:
            weight.fill_(torch.nan)
    server.post("/flush_cache", {})
    answer = server.generate(list(range(40)), max_new_tokens=5)
    assert answer["output_ids"] == [] and answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert "not finite" in answer["meta_info"]["finish_reason"]["message"]
    assert 'num_nan_reqs{model_name="tiny"} 1' in server.get("/metrics")[1]
    with torch.no_grad():
        for weight in weights:
            weight.fill_(1)
    again = server.generate(list(range(40)), **request)
    assert results([again]) == results([good]), "nothing of it is left in the cache"


def test_numbers_that_are_not_finite_do_not_reach_those_who_share_the_prompt(tmp_path):
    """The first to compute a prompt goes on writing to the page that its end is copied from."""
    model = served(save_tiny_llama(tmp_path, tied=False))
    request = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    prompt = list(range(20))
    with LocalServer(model) as server:
        good = server.generate(prompt, **request)
        server.post("/flush_cache", {})
        row = model.module.model.embed_tokens.weight[good["output_ids"][2]]
        kept = row.clone()
        with torch.no_grad():
            row.fill_(torch.nan)
        assert server.generate(prompt, **request)["meta_info"]["finish_reason"]["type"] == "abort"
        with torch.no_grad():
            row.copy_(kept)
        assert results([server.generate(prompt, **request)]) == results([good])


def test_the_longest_trajectory_can_be_scored(server):
    answer = server.generate([5] * 400, max_new_tokens=112, ignore_eos=True)
    whole = [5] * 400 + answer["output_ids"]
    assert len(whole) == 512
    scored = server.generate(whole, max_new_tokens=0, top={"logprob_start_len": 0})["meta_info"]
    assert [entry[0] for entry in scored["input_token_logprobs"]][400:] == pytest.approx(
        output_logprobs(answer), abs=1e-4
    )


def test_an_engine_failure_answers_everyone_and_shows_in_health(server, monkeypatch):

    def broken() -> None:
        raise RuntimeError("the cable is unplugged")

    monkeypatch.setattr(server.batcher, "step", broken)
    futures = [server.pool.submit(server.post, "/generate", {"input_ids": [i]}) for i in range(3)]
    for future in futures:
        status, answer = future.result(WAIT_S)
        assert status == 503 and "the cable is unplugged" in answer["error"]["message"]
    status, answer = server.get("/health")
    assert status == 503 and "the cable is unplugged" in answer["error"]["message"]
    assert server.post("/generate", {"input_ids": [1]})[0] == 503


def test_whoever_hears_of_a_failure_finds_it_in_health(folder):
    def broken() -> None:
        raise RuntimeError("the cable is unplugged")

    engine = Engine(Batcher(served(folder), 2, 64, "0"), seed=0)
    heard: list[bool] = []
    [sequence] = engine.submit_all([GenerateRequest("r", [1], SamplingParams(1))])
    for future in (engine.call(broken), sequence.future):
        future.add_done_callback(lambda _: heard.append(engine.stopped.is_set()))
    engine.start()
    with pytest.raises(EngineFailure, match="the cable is unplugged"):
        future.result(WAIT_S)
    assert heard == [True, True] and "the cable is unplugged" in engine.failure


def test_spans_are_runs_of_equal_versions():
    assert version_spans([]) == []
    assert version_spans(["3", "3", "4"]) == [
        {"version": "3", "start": 0, "end": 2},
        {"version": "4", "start": 2, "end": 3},
    ]
