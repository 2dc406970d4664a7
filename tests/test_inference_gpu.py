"""The server as it is on a GPU, with plain kernels in the place of the GPU's; test_gpu_server.py has the rest."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gpu import PlainKernels, plain_varlen
from support.inference import LocalServer, output_logprobs, save_random, served, wait_until
from test_inference_spans import ARCHITECTURES, LENGTH, MIXTURE, ROWS, in_passes, plain_logits, tokens_of

from arealite.inference.core import layout, sampler, served_model, weight_updates
from arealite.inference.core.batcher import Batcher
from arealite.inference.core.engine import Engine
from arealite.inference.core.layout import Transfer
from arealite.inference.core.requests import SamplingParams, UpdateOptions
from arealite.inference.core.sampler import NUM_LIKELIEST, uniform_numbers
from arealite.kernels.linears import Joined
from arealite.weights.wire import checksum

CHOSEN = ["llama, tied", "qwen2, two layers with a window", "qwen3", "gemma3", "mixtral"]


@pytest.fixture
def on_gpu(monkeypatch):
    for module in (served_model, sampler):
        monkeypatch.setattr(module, "for_device", lambda _: PlainKernels())


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("has_varlen", [False, True])
@pytest.mark.parametrize("name", CHOSEN)
def test_any_mix_of_spans_gives_the_plain_result(name, has_varlen, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "_has_varlen", lambda _: has_varlen)
    monkeypatch.setattr(layout, "varlen_attention", plain_varlen)
    folder = save_random(ARCHITECTURES[name](), tmp_path)
    model = served(folder)
    hidden = in_passes(model, MIXTURE, ROWS)
    with torch.inference_mode():
        for row, states in zip(ROWS, hidden, strict=True):
            torch.testing.assert_close(
                model.logits(states), plain_logits(folder, row)[: len(states)], rtol=2e-4, atol=2e-4
            )


@pytest.mark.usefixtures("on_gpu")
def test_joined_weights_are_the_layers_own(tmp_path):
    """Of one product; an update in place reaches it, and names and values are those of the checkpoint."""
    folder = save_random(ARCHITECTURES["qwen2, two layers with a window"](), tmp_path)
    model = served(folder)
    assert isinstance(model._linears._groups[0]._products, Joined)
    attn = model.module.model.layers[0].self_attn
    shared = {layer.weight.untyped_storage().data_ptr() for layer in (attn.q_proj, attn.k_proj, attn.v_proj)}
    assert len(shared) == 1
    rows = [tokens_of(0)]
    for name, tensor in model.tensors.items():
        if name.endswith(("proj.weight", "proj.bias")):
            tensor.mul_(0.5)
    hidden = in_passes(model, [[(0, LENGTH)]], rows)[0]
    model.module.save_pretrained(tmp_path / "changed")
    with torch.inference_mode():
        torch.testing.assert_close(
            model.logits(hidden), plain_logits(tmp_path / "changed", rows[0]), rtol=2e-4, atol=2e-4
        )


def test_rows_with_and_without_restrictions_are_drawn_together(monkeypatch):
    kinds = [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}, {"min_p": 0.1, "temperature": 0.7}]
    kinds.append({"top_p": 1 - 1e-6})
    params = [SamplingParams(1, **kind) for kind in kinds for _ in range(8)]
    logits = torch.randn(len(params), 3 * NUM_LIKELIEST, generator=torch.Generator().manual_seed(1))
    uniforms = uniform_numbers([5] * len(params), range(len(params)))
    wanted = sampler.sample(logits, params, uniforms)
    monkeypatch.setattr(sampler, "for_device", lambda _: PlainKernels())
    drawn = sampler.sample(logits, params, uniforms)
    assert drawn.tokens == wanted.tokens and drawn.ok == wanted.ok
    assert drawn.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
    assert drawn.cut == pytest.approx(wanted.cut, abs=1e-6)


PARAMS = [
    {"max_new_tokens": 40, "temperature": 0},
    {"max_new_tokens": 9, "temperature": 0},
    {"max_new_tokens": 60, "temperature": 1.0, "sampling_seed": 5},
    {"max_new_tokens": 33, "temperature": 0, "stop": ["a", "b"]},
]
ODD = [{"top_p": 0.7, "sampling_seed": 3}, {"frequency_penalty": 0.5, "temperature": 0}]


def answers_of(folder: Path, bodies: list[dict[str, Any]], max_running: int = 3) -> tuple[list[Any], Batcher]:
    """Of a server of `max_running` places, to requests that come while others run."""
    with LocalServer(served(folder), max_running=max_running, kv_tokens=1024) as server:
        answers = server.generate_many(bodies)
        return answers, server.batcher


@pytest.mark.parametrize("is_odd", [False, True])
def test_passes_begun_ahead_change_no_answer(is_odd, folder, monkeypatch):
    """Those of a CPU, of a GPU pass by pass, and of one whose next pass begins before the last one's tokens are known;
    with ends by length, by stop tokens and strings, and requests that join."""
    kinds = PARAMS + (ODD if is_odd else [])
    bodies = [{"input_ids": tokens_of(i, 20 + 7 * i), "sampling_params": kinds[i % len(kinds)]} for i in range(8)]
    plain, _ = answers_of(folder, bodies)
    monkeypatch.setattr(served_model, "for_device", lambda _: PlainKernels())
    monkeypatch.setattr(sampler, "for_device", lambda _: PlainKernels())
    monkeypatch.setenv("AREALITE_GRAPHS", "0")
    eager, batcher = answers_of(folder, bodies)
    assert batcher._graphs is None
    monkeypatch.delenv("AREALITE_GRAPHS")
    ahead, batcher = answers_of(folder, bodies)
    assert batcher._graphs is not None and batcher._graphs._graphs and batcher._started is None
    for wanted, *others in zip(plain, eager, ahead, strict=True):
        for other in others:
            assert other["output_ids"] == wanted["output_ids"]
            assert other["meta_info"]["finish_reason"] == wanted["meta_info"]["finish_reason"]
            assert output_logprobs(other) == pytest.approx(output_logprobs(wanted), abs=1e-4)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_pause_takes_in_what_was_begun(mode, folder):
    """No token is lost or doubled, whatever the pause does with those who run."""
    wanted = answers_of(
        folder, [{"input_ids": tokens_of(1), "sampling_params": {"max_new_tokens": 50, "temperature": 0}}]
    )
    with LocalServer(served(folder)) as server:
        server.step_delay_s = 0.01
        running = server.pool.submit(server.generate, tokens_of(1), max_new_tokens=50, temperature=0)
        wait_until(lambda: server.batcher.counters.num_generated_tokens > 5)
        assert server.post("/pause_generation", {"mode": mode})[0] == 200
        assert server.batcher._started is None
        assert server.post("/continue_generation", {})[0] == 200
        ids = running.result(60)["output_ids"]
    assert ids == wanted[0][0]["output_ids"][: len(ids)] and (mode == "abort" or len(ids) == 50)


@pytest.mark.usefixtures("on_gpu")
def test_a_full_cache_retracts_as_ever(folder):
    bodies = [
        {"input_ids": tokens_of(i), "sampling_params": {"max_new_tokens": 80, "temperature": 0, "ignore_eos": True}}
        for i in range(3)
    ]
    wanted, _ = answers_of(folder, bodies)
    with LocalServer(served(folder), max_running=3, kv_tokens=320) as server:
        answers = server.generate_many(bodies)
        assert server.batcher.scheduler.num_retractions > 0
    assert [a["output_ids"] for a in answers] == [w["output_ids"] for w in wanted]


def test_arrays_of_any_kind_travel_in_one_copy():
    arrays = [np.arange(5), np.zeros((0, 16), np.int32), np.arange(12, dtype=np.int32).reshape(3, 4)[:, 1:3]]
    arrays += [np.array([[True], [False]]), np.array([0.5, -1.0])]
    transfer = Transfer([np.zeros_like(array) for array in arrays], torch.device("cpu"))
    kept = [tensor.data_ptr() for tensor in transfer.tensors]
    transfer.fill(arrays)
    for tensor, array in zip(transfer.tensors, arrays, strict=True):
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
    assert [tensor.data_ptr() for tensor in transfer.tensors] == kept


def test_what_did_not_become_live_is_not_confirmed(folder, monkeypatch):
    """The checksum is then that of the live tensor; a NaN that is the same NaN is confirmed."""
    model = served(folder)
    name, other = model.tensor_names[:2]
    staged = {name: model.tensors[name].detach().clone(), other: model.tensors[other].detach() + 1}
    staged[name].view(-1)[0] = model.tensors[name].data.view(-1)[0] = torch.nan
    assert weight_updates.confirmed(model, staged, [name, other, model.tensor_names[2]]) == {name}
    monkeypatch.setattr(weight_updates, "load", lambda *_: None)
    engine = Engine(Batcher(model, 1, 64, "0"), seed=0)
    found = weight_updates.make_live(engine, staged, UpdateOptions(checksum_names=[name, other]))
    assert found == {other: checksum(model.tensors[other])}
