"""Memory of the server: the KV cache given up and taken back, and steps for which there is not enough."""

import pytest
import torch
from support.inference import served, wait_until

from arealite.inference.core.batcher import Batcher
from arealite.inference.core.served_model import ServedModel

PROMPT = list(range(40))


def test_the_kv_cache_gives_its_memory_back_while_nothing_runs(server):
    before = server.generate(PROMPT, max_new_tokens=8, temperature=0)["output_ids"]
    assert server.post("/release_memory_occupation", {"tags": ["weights"]}) == (200, None)
    assert server.get("/server_info")[1]["kv_cache_bytes"] > 0, "weights stay, and so does the rest"
    for _ in range(2):
        assert server.post("/release_memory_occupation", {"tags": ["kv_cache"]}) == (200, None)
    assert server.get("/server_info")[1]["kv_cache_bytes"] == 0
    waiting = server.pool.submit(server.generate, PROMPT, max_new_tokens=8, temperature=0)
    wait_until(lambda: server.batcher.scheduler.waiting)
    for _ in range(2):
        assert server.post("/resume_memory_occupation", {}) == (200, None)
    assert waiting.result(60)["output_ids"] == before


def test_keys_and_values_in_use_are_not_given_up(server):
    server.step_delay_s = 0.02
    running = server.pool.submit(server.generate, PROMPT, max_new_tokens=60, ignore_eos=True)
    wait_until(lambda: server.batcher.scheduler.running)
    status, answer = server.post("/release_memory_occupation", {})
    assert status == 400 and "pause_generation" in answer["message"]
    assert server.post("/pause_generation", {"mode": "retract"})[0] == 200
    assert server.post("/release_memory_occupation", {}) == (200, None)
    assert server.post("/resume_memory_occupation", {}) == (200, None)
    assert server.post("/continue_generation", {})[0] == 200
    server.step_delay_s = 0
    assert len(running.result(60)["output_ids"]) == 60


def test_a_step_without_memory_is_made_with_fewer(server, monkeypatch, caplog):
    """What runs begins anew and gives the same answers; a single request for which there is none ends the engine."""
    bodies = [
        {"input_ids": PROMPT[: 20 + i], "sampling_params": {"max_new_tokens": 6, "temperature": 0}} for i in range(4)
    ]
    forward, most = ServedModel.forward, 100

    def scarce(self, pool, spans, num_rows=0):  # type: ignore[no-untyped-def]
        if len(spans) > most:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return forward(self, pool, spans, num_rows)

    monkeypatch.setattr(ServedModel, "forward", scarce)
    wanted = [answer["output_ids"] for answer in server.generate_batch(bodies)]
    server.post("/flush_cache", {})
    most = 2
    assert [answer["output_ids"] for answer in server.generate_batch(bodies)] == wanted
    assert server.batcher.scheduler.max_running == 2 and "--kv-cache-tokens" in caplog.text
    most = 0
    status, answer = server.post("/generate", bodies[0])
    assert status == 503 and "no memory for a step of 1 requests" in str(answer)


def test_what_a_card_has_free_sizes_the_kv_cache(folder, monkeypatch):
    from arealite.api.errors import ConfigError
    from arealite.inference import serve

    model = served(folder)
    assert serve._kv_cache_tokens(model, 8) == 8 * 512
    assert model.kv_bytes_per_token * 512 == Batcher(model, 8, 496, "0").scheduler.pool.tensor.nbytes
    model.device, model.context_length = torch.device("cuda"), 1 << 20
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 << 30, 80 << 30))
    room = (17 - 3) << 30
    assert serve._kv_cache_tokens(model, 256) == room // model.kv_bytes_per_token
    monkeypatch.setenv("AREALITE_COLOCATED", "1")
    assert serve._kv_cache_tokens(model, 256) == int(room * 0.45) // model.kv_bytes_per_token
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 80 << 30))
    with pytest.raises(ConfigError, match="3.0 GiB are free"):
        serve._kv_cache_tokens(model, 256)
