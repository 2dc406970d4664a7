"""The compiled kernels give, bit for bit, what PyTorch gives; a machine without them serves the same."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_support import save_tiny_llama, served
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen2Config, Qwen3Config

from arealite.inference.cache import PAGE_TOKENS, pages_for
from arealite.inference.requests import GenerateRequest, SamplingParams
from arealite.inference.sampler import sample, uniform
from arealite.inference.sequence import Sequence, Span
from arealite.kernels import cpu
from arealite.kernels.cpu import Kernels, PagedSpans
from arealite.kernels.linears import PackedLinears
from arealite.kernels.modules import fuse

compiled = pytest.mark.skipif(
    cpu.load() is None or not cpu.load().exact_products,
    reason="no compiled kernels here: the CPU has no AVX512-BF16, or there is no C compiler",
)


@pytest.fixture
def lib() -> Kernels:
    found = cpu.load()
    assert found is not None
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@compiled
@pytest.mark.parametrize("width", [64, 576, 1536, 2560])
@pytest.mark.parametrize("sizes", [[576], [576, 192, 192], [37, 100], [1]])
def test_products_are_those_of_pytorch(lib: Kernels, width: int, sizes: list[int]) -> None:
    weights = [normal(n, width, seed=i) for i, n in enumerate(sizes)]
    bias = normal(sum(sizes), seed=9)
    packed = lib.pack(weights)
    for num in (1, 2, 5, 8, 13, 64, 131):
        x = normal(2, num, width, seed=num)[:1]
        for shift in (None, bias):
            got = lib.product(x, packed, shift, sum(sizes))
            # Not one by one: for a single row PyTorch may take a product that adds in another order.
            wanted = linear(torch.cat([x, x], 1), torch.cat(weights), shift)[:, :num]
            assert torch.equal(got, wanted), f"{num} rows, bias {shift is not None}"


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """As the trainer computes it: q [H, n, D], k and v [K, n, D]; [n, H, D]."""
    heads, n, dim = q.shape
    scores = torch.bmm(q.reshape(len(k), -1, dim), k.transpose(1, 2)).float().mul_(dim**-0.5)
    at = torch.arange(n)
    hidden = (at[None] > at[:, None]) | (at[None] <= at[:, None] - (window or n))
    scores.view(len(k), -1, n, n).masked_fill_(hidden, -torch.inf)
    return torch.bmm(torch.softmax(scores, -1).bfloat16(), v).view(heads, n, dim).transpose(0, 1)


@compiled
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(9, 3, 64, 0), (4, 4, 32, 0), (8, 1, 128, 0), (2, 1, 256, 0), (6, 2, 96, 37), (5, 5, 160, 64), (14, 2, 64, 16)],
)
def test_attention_over_pages_is_that_of_the_whole_sequence(
    lib: Kernels, heads: int, kv_heads: int, dim: int, window: int
) -> None:
    """Sequences of odd lengths enter in chunks and single tokens, several at a time, into shuffled pages full of NaN
    beyond what is written."""
    lengths = [77, 16, 130, 33]
    rng = np.random.default_rng(0)
    num_pages = sum(map(pages_for, lengths)) + 1
    pool = torch.full((2, kv_heads, num_pages, PAGE_TOKENS, dim), 7.0).bfloat16()
    free = list(rng.permutation(np.arange(1, num_pages)))
    pages = [[int(free.pop()) for _ in range(pages_for(n))] for n in lengths]
    q, k, v = (
        [normal(h, n, dim, seed=10 * i + j) * 2 for i, n in enumerate(lengths)]
        for j, h in enumerate([heads, kv_heads, kv_heads])
    )
    wanted = [plain_attention(*args, window) for args in zip(q, k, v, strict=True)]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        pieces, tables, parts, first = [], [], [], 0
        for i, n in enumerate(lengths):
            count = min(int(rng.choice([1, 1, 1, 2, 19, 64])), n - done[i])
            if count:
                pieces.append((first, done[i], count, len(tables)))
                tables += pages[i]
                parts.append((i, done[i], done[i] + count))
                first, done[i] = first + count, done[i] + count
        spans = PagedSpans(np.array(pieces, np.int32), np.array(tables, np.int32), first, max(done))
        given = [torch.cat([x[i][:, a:b] for i, a, b in parts], 1) for x in (q, k, v)]
        strided = torch.cat([x.transpose(0, 1) for x in given], 1)  # as slices of one product
        split = [x.transpose(0, 1) for x in strided.split([heads, kv_heads, kv_heads], 1)]
        padded = [torch.cat([x, x[:, :3]], 1) if x is split[0] else x for x in split]
        out = lib.attention(*padded, pool, spans, window, dim**-0.5)
        assert not out[first:].any(), "padding gets zeros"
        assert torch.equal(out[:first], torch.cat([wanted[i][a:b] for i, a, b in parts]))


@compiled
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config, GemmaConfig], ids=lambda c: c.__name__)
def test_fused_and_packed_modules_change_no_bit(config: Any, lib: Kernels) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(vocab_size=120, num_key_value_heads=2, head_dim=32, **sizes),
        dtype=torch.bfloat16,
        attn_implementation="eager",
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 1))
    ids = torch.arange(1, 71)[None] % 120
    with torch.inference_mode():
        plain = model(ids).logits
        linears = PackedLinears(model, lambda: model(ids[:, :1]))
        fuse(model, lib)
        assert torch.equal(model(ids).logits, plain)
        layer = model.model.layers[0]
        replaced = [layer.self_attn, layer.input_layernorm, *([layer.mlp] if config is not GemmaConfig else [])]
        assert all("forward" in vars(part) for part in replaced)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(model(ids).logits, plain)
        linears.refresh()
        changed = model(ids).logits
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(changed, fresh(ids).logits)


@compiled
@pytest.mark.parametrize(("vocab", "dtype"), [(49152, torch.bfloat16), (1000, torch.bfloat16), (257, torch.float32)])
def test_sampled_tokens_are_those_of_the_pytorch_path(
    vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype)
    params = [SamplingParams(1, temperature=[0.0, 1.0, 0.6, 1.4][i % 4], top_k=5 * (i % 8 == 7)) for i in range(64)]
    uniforms = [uniform(3, i) for i in range(64)]
    drawn = sample(logits, params, uniforms)
    monkeypatch.setattr(cpu, "load", lambda: None)
    plain = sample(logits, params, uniforms)
    assert drawn.tokens == plain.tokens
    assert drawn.logprobs == pytest.approx(plain.logprobs, abs=1e-6)


def logits_of(folder: Path) -> torch.Tensor:
    """A prompt of 40 tokens in two pieces, then single tokens; bf16."""
    model = served(folder, torch.bfloat16)
    with torch.inference_mode():
        pool = model.make_pool(64)
        sequence = Sequence(GenerateRequest("", [(7 * t) % 250 for t in range(50)], SamplingParams(1)))
        sequence.pages = pool.take(4)
        spans = [(0, 23), (23, 17), *((t, 1) for t in range(40, 50))]
        return torch.cat([model.logits(model.forward(pool, [Span(sequence, *span)])) for span in spans])


@compiled
def test_a_machine_without_kernels_serves_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_llama(tmp_path, head_dim=32)
    fast = logits_of(folder)
    monkeypatch.setattr(cpu, "load", lambda: None)
    assert torch.equal(logits_of(folder), fast)


def test_without_a_compiler_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        assert cpu.load.__wrapped__() is None
    assert len(caplog.records) == 1 and "PyTorch computes instead" in caplog.text


def test_a_library_that_cannot_be_loaded_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where the cache lies on a file system that runs no programs."""
    (tmp_path / "kernels.so").write_bytes(b"no library")
    monkeypatch.setattr(cpu, "_library", lambda: tmp_path / "kernels.so")
    assert cpu.load.__wrapped__() is None


@compiled
def test_processes_that_compile_at_the_same_time_all_get_a_library(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from arealite.kernels import cpu; print(cpu.load() is not None)"]
    env = {"AREALITE_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    racing = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in racing] == ["True"] * 2
    assert len(list((tmp_path / "kernels").iterdir())) == 1
