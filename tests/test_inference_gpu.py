"""The server as it is on a GPU, with plain kernels in the place of the GPU's; test_gpu_server.py has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_support import PlainKernels, plain_varlen
from test_inference_spans import ARCHITECTURES, LENGTH, MIXTURE, in_passes, plain_logits, save, tokens_of

from arealite.inference import gpu_layout, sampler
from arealite.inference import model as served_model
from arealite.inference.model import ServedModel
from arealite.inference.requests import SamplingParams
from arealite.inference.sampler import NUM_LIKELIEST, uniform_numbers
from arealite.kernels.linears import Joined

CHOSEN = ["llama, tied", "qwen2, two layers with a window", "qwen3", "gemma3", "mixtral"]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "for_device", lambda _: PlainKernels())


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ServedModel:
    return ServedModel.load(str(folder), dtype, torch.device("cpu"), None, deterministic=False)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("has_varlen", [False, True])
@pytest.mark.parametrize("name", CHOSEN)
def test_any_mix_of_spans_gives_the_plain_result(
    name: str, has_varlen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_layout, "_has_varlen", lambda _: has_varlen)
    monkeypatch.setattr(gpu_layout, "varlen_attention", plain_varlen)
    folder = save(ARCHITECTURES[name](), tmp_path)
    rows = [tokens_of(0), tokens_of(1, LENGTH + 7), tokens_of(2, 5)]
    model = load(folder)
    hidden = in_passes(model, MIXTURE, rows)
    with torch.inference_mode():
        for row, states in zip(rows, hidden, strict=True):
            torch.testing.assert_close(
                model.logits(states), plain_logits(folder, row)[: len(states)], rtol=2e-4, atol=2e-4
            )


@pytest.mark.usefixtures("on_gpu")
def test_joined_weights_are_the_layers_own(tmp_path: Path) -> None:
    """Of one product; an update in place reaches it, and names and values are those of the checkpoint."""
    folder = save(ARCHITECTURES["qwen2, two layers with a window"](), tmp_path)
    model = load(folder)
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


def test_rows_with_and_without_restrictions_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 0.0},
        {"min_p": 0.1, "temperature": 0.7},
        {"top_p": 1 - 1e-6},
    ]
    params = [SamplingParams(1, **kind) for kind in kinds for _ in range(8)]
    logits = torch.randn(len(params), 3 * NUM_LIKELIEST, generator=torch.Generator().manual_seed(1))
    uniforms = uniform_numbers([5] * len(params), range(len(params)))
    wanted = sampler.sample(logits, params, uniforms)
    monkeypatch.setattr(sampler, "for_device", lambda _: PlainKernels())
    drawn = sampler.sample(logits, params, uniforms)
    assert drawn.tokens == wanted.tokens and drawn.ok == wanted.ok
    assert drawn.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
    assert drawn.cut == pytest.approx(wanted.cut, abs=1e-6)
