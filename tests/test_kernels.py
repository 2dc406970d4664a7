"""The compiled kernels compute what PyTorch does, to rounding, and each row alone what it is among others: for every
instruction set, those that this CPU lacks in emulation."""

import copy
import logging
import os
import subprocess
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.inference import VOCAB, save_random, save_tiny_llama, served
from support.kernels import KINDS, each_kind, each_vector_kind, model_of, needs_kernels, normal
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from arealite.algorithm.packing import prefix_tree
from arealite.engine.attention import ATTENTION, Layout
from arealite.engine.logprobs import token_logprobs
from arealite.engine.packed_model import PackedModel
from arealite.inference.core.cache import PAGE_TOKENS, pages_for
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.core.sampler import sample, uniform_numbers
from arealite.inference.core.sequence import Sequence, Span
from arealite.kernels import build, cpu
from arealite.kernels.cpu import Kernels, PagedSpans, TreeRuns
from arealite.kernels.linears import PackedLinears
from arealite.kernels.modules import fuse

ROUNDING = 2**-8  # of bf16, relative


@each_kind
@pytest.mark.parametrize("width", [34, 576])
@pytest.mark.parametrize("sizes", [[576], [160, 64, 64], [37, 100], [1]])
def test_products_are_right_and_a_row_is_the_same_among_any_others(lib, width, sizes):
    weights = [normal(n, width, seed=i) for i, n in enumerate(sizes)]
    bias, x = normal(sum(sizes), seed=9), normal(131, width, seed=8)
    packed = lib.pack(weights)
    for shift in (None, bias):
        whole = lib.product(x, packed, shift, sum(sizes))
        exact = x.double() @ torch.cat(weights).double().t() + (0 if shift is None else shift.double())
        error = (whole.double() - exact).abs() - ROUNDING * exact.abs()
        assert float(error.max()) <= 1e-6 * width
        for num in (1, 2, 5, 8, 13, 16, 17, 31, 32, 33, 64):
            assert torch.equal(lib.product(x[-num:], packed, shift, sum(sizes)), whole[-num:]), f"{num} rows"
    changed = [2 * weight for weight in weights]
    assert lib.pack(changed, packed) is packed
    assert torch.equal(
        lib.product(x, packed, None, sum(sizes)), 2 * lib.product(x, lib.pack(weights), None, sum(sizes))
    )


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """In float64, but for scores and probabilities, which are rounded: q [H, n, D], k and v [K, n, D]; [n, H, D]."""
    heads, n, dim = q.shape
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.bmm(q.reshape(len(k), -1, dim), k.transpose(1, 2)).bfloat16().double().mul_(dim**-0.5)
    at = torch.arange(n)
    hidden = (at[None] > at[:, None]) | (at[None] <= at[:, None] - (window or n))
    scores.view(len(k), -1, n, n).masked_fill_(hidden, -torch.inf)
    return torch.bmm(torch.softmax(scores, -1).bfloat16().double(), v).view(heads, n, dim).transpose(0, 1)


def tree_attention(lib: Kernels, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The trainer's kernel on one sequence; [n, H, D]."""
    num = q.shape[1]
    runs = np.array([(0, num, num)], np.int32)
    seen = TreeRuns(runs, np.arange(num, dtype=np.int32), window)
    return lib.tree_attention(*(x.transpose(0, 1) for x in (q, k, v)), seen, q.shape[2] ** -0.5)


@each_vector_kind
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(9, 3, 64, 0), (4, 4, 32, 0), (8, 1, 128, 0), (2, 1, 256, 0), (6, 2, 96, 37), (5, 5, 160, 64), (14, 2, 64, 16)],
)
def test_attention_over_pages_is_the_trainers_over_the_whole_sequence(lib, heads, kv_heads, dim, window):
    """Sequences of odd lengths enter in chunks and single tokens, several at a time, into shuffled pages."""
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
    wanted = [tree_attention(lib, *args, window) for args in zip(q, k, v, strict=True)]
    for got, args in zip(wanted, zip(q, k, v, strict=True), strict=True):
        exact = plain_attention(*args, window)
        assert float((got.double() - exact).abs().max()) <= 4 * ROUNDING * float(exact.abs().max())
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


def near(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    """As far from the logits in float32 as PyTorch's own bf16 pass is."""
    error, usual = (float((x.float() - exact).norm()) for x in (got, plain))
    return error <= 1.3 * usual + ROUNDING * float(exact.norm())


@needs_kernels
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config, GemmaConfig], ids=lambda c: c.__name__)
def test_fused_and_packed_modules_are_those_of_the_plain_model(config, lib):
    model = model_of(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 1))
    ids = torch.arange(1, 71)[None] % 120
    exact = copy.deepcopy(model).float()
    with torch.inference_mode():
        wanted = model(ids).logits, exact(ids).logits
        linears = PackedLinears(model, lambda: model(ids[:, :1]))
        fuse(model, lib)
        assert near(model(ids).logits, *wanted)
        layer = model.model.layers[0]
        replaced = [layer.self_attn, layer.input_layernorm, *([layer.mlp] if config is not GemmaConfig else [])]
        assert all("forward" in vars(part) for part in replaced)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        linears.refresh()
        changed = model(ids).logits
        assert not near(changed, *wanted)
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert near(changed, fresh(ids).logits, fresh.float()(ids).logits)


@needs_kernels
@pytest.mark.parametrize(("vocab", "dtype"), [(49152, torch.bfloat16), (1000, torch.bfloat16), (257, torch.float32)])
def test_sampled_tokens_are_those_of_the_pytorch_path(vocab, dtype, monkeypatch):
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype)
    params = [SamplingParams(1, temperature=[0.0, 1.0, 0.6, 1.4][i % 4], top_k=5 * (i % 8 == 7)) for i in range(64)]
    uniforms = uniform_numbers([3] * 64, range(64))
    drawn = sample(logits, params, uniforms)
    monkeypatch.setattr(cpu, "load", lambda: None)
    plain = sample(logits, params, uniforms)
    assert drawn.tokens == plain.tokens
    assert drawn.logprobs == pytest.approx(plain.logprobs, abs=1e-6)


def logits_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A prompt of 40 tokens in two pieces, then single tokens."""
    model = served(folder, dtype)
    with torch.inference_mode():
        pool = model.make_pool(64)
        sequence = Sequence(GenerateRequest("", [(7 * t) % 250 for t in range(50)], SamplingParams(1)))
        sequence.pages = array("i", pool.take(4))
        spans = [(0, 23), (23, 17), *((t, 1) for t in range(40, 50))]
        return torch.cat([model.logits(model.forward(pool, [Span(sequence, *span)])) for span in spans])


@needs_kernels
def test_a_machine_without_kernels_serves_the_same(tmp_path, monkeypatch):
    folder = save_tiny_llama(tmp_path, head_dim=32)
    fast, exact = logits_of(folder), logits_of(folder, torch.float32)
    monkeypatch.setattr(cpu, "load", lambda: None)
    assert near(fast, logits_of(folder), exact)


def choose(environment: dict[str, str], tmp_path: Path) -> str:
    """What a process with this environment says of its kernels."""
    code = "from arealite.kernels import build; print(build.description())"
    env = {"AREALITE_CACHE": str(tmp_path), "PATH": os.environ["PATH"], **environment}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    return ran.stdout.strip() or ran.stderr.strip().splitlines()[-1]


@needs_kernels
@pytest.mark.any_cpu
def test_the_instruction_set_can_be_forced(tmp_path):
    assert choose({}, tmp_path) == f"compiled kernels, {build.available()[0]}"
    assert choose({"AREALITE_KERNELS": "plain"}, tmp_path) == "compiled kernels, plain"
    assert choose({"AREALITE_KERNELS": "off"}, tmp_path) == "PyTorch, without compiled kernels (AREALITE_KERNELS=off)"
    assert "there is no such instruction set; here it may be" in choose({"AREALITE_KERNELS": "mmx"}, tmp_path)
    for lacking in set(KINDS) - set(build.available()):
        assert "this CPU does not have it" in choose({"AREALITE_KERNELS": lacking}, tmp_path)


@pytest.mark.any_cpu
def test_without_a_compiler_the_reason_is_told(tmp_path):
    said = choose({"PATH": str(tmp_path), "CC": "no-such-compiler"}, tmp_path)
    assert said.startswith("PyTorch, without compiled kernels (") and "no C compiler" in said


@needs_kernels
@pytest.mark.any_cpu
def test_a_library_that_cannot_be_loaded_is_done_without(tmp_path):
    """As where the cache lies on a file system that runs no programs."""
    choose({"AREALITE_KERNELS": "plain"}, tmp_path)
    [library] = (tmp_path / "kernels").iterdir()
    library.write_bytes(b"no library")
    said = choose({"AREALITE_KERNELS": "plain"}, tmp_path)
    assert said.startswith("PyTorch, without compiled kernels (plain: ")


@needs_kernels
@pytest.mark.any_cpu
def test_processes_that_compile_at_the_same_time_all_get_a_library(tmp_path):
    with ThreadPoolExecutor() as racing:
        said = list(racing.map(lambda _: choose({}, tmp_path), range(2)))
    assert said == [f"compiled kernels, {build.available()[0]}"] * 2
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@needs_kernels
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config], ids=lambda c: c.__name__)
def test_no_module_of_common_models_is_left_to_pytorch(config, caplog):
    """Newer versions of transformers wrap and rename: what is no longer found would be slower without a word."""
    model = model_of(config, num_layers=1, heads=2)
    with caplog.at_level(logging.INFO):
        fuse(model, cpu.load())
    assert "left to PyTorch" not in caplog.text
    layer = model.model.layers[0]
    parts = [layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm, model.model.norm]
    assert all("forward" in vars(part) for part in parts)


def save_partly_rotated(folder: Path) -> Path:
    """Its layers have the parts of Llama's, but half of each head is not rotated."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Glm4MoeConfig(vocab_size=VOCAB, num_hidden_layers=2, first_k_dense_replace=2, head_dim=64, **sizes)
    return save_random(config, folder, 5)


@pytest.mark.parametrize("kernels_on", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("save", [lambda folder: save_tiny_llama(folder, head_dim=32), save_partly_rotated])
def test_server_and_trainer_have_the_same_logprobs(save, kernels_on, tmp_path, monkeypatch):
    """Prefill in pieces, decode of single rows, and the trainer's packed pass with another sequence beside, in bf16."""
    rotate = Kernels.rotate

    def checked(self: Kernels, x: torch.Tensor, cos: torch.Tensor, *others: torch.Tensor) -> None:
        assert cos.shape[-1] == x.shape[-1], "the kernel would read past the ends of the angles"
        rotate(self, x, cos, *others)

    monkeypatch.setattr(Kernels, "rotate", checked)
    if not kernels_on:
        monkeypatch.setattr(cpu, "load", lambda: None)
    folder = save(tmp_path)
    served_logprobs = logits_of(folder).float().log_softmax(-1)[:-1]
    tokens = [(7 * t) % 250 for t in range(50)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    PackedModel(model)  # which replaces its modules
    tree = prefix_tree([np.arange(3, 120), np.array(tokens)])
    ids, positions = (torch.from_numpy(x)[None] for x in (tree.tokens, tree.depth))
    with torch.no_grad():
        hidden = model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, tree_layout=Layout(tree, torch.device("cpu"))
        ).last_hidden_state[0]
        [path] = [tree.paths[i] for i, row in enumerate(tree.order) if row == 1]
        rows, targets = torch.from_numpy(path[:-1]), torch.tensor(tokens[1:])
        logp, _ = token_logprobs(hidden[rows], model.lm_head.weight, torch.arange(49), targets, 1.0, 16)
    wanted = served_logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    difference = (logp - wanted).abs()
    assert float(difference.max()) <= (2e-5 if kernels_on else 0.2)
