"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter (float32 and float16).

Memory that nobody has written is full of NaN, so that a result which was left out is seen.
"""

# ruff: noqa: E402
import copy
import os
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("no GPU, and Triton's interpreter needs numpy < 2.4", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
pytest.importorskip("triton", reason="no triton")

from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config

from arealite.algorithm.packing import prefix_tree
from arealite.engine import logprobs
from arealite.engine.attention import ATTENTION, Layout
from arealite.kernels import functions, gpu, modules
from arealite.kernels.cpu import Scores

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
LIB = gpu.GpuKernels(DEVICE)
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative to the largest entry
each_dtype = pytest.mark.parametrize("dtype", list(ROUNDING)[: 3 if HAS_GPU else 2], ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(got: torch.Tensor, wanted: torch.Tensor, rounding: float) -> None:
    assert got.shape == wanted.shape
    assert float((got.double() - wanted).detach().abs().max()) <= rounding * float(wanted.detach().abs().max())


def gradients(function, *inputs: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    exact = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*exact), exact, up.double())


@each_dtype
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 40), (2, 50, 3, 64), (0, 8), (2, 5000)])
def test_norm(dtype, plus_one, shape, monkeypatch):
    monkeypatch.setattr(gpu, "NUM_SUMS", 2)
    n = shape[-1]

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (n,), weight + plus_one, 1e-5)

    x, up = (normal(*shape[:-1], n + 8, seed=seed, dtype=dtype)[..., :n] for seed in (0, 2))  # rows with gaps
    weight = normal(n, seed=1, dtype=dtype)
    out = LIB.rms_norm(x, weight, 1e-5, plus_one)
    by_x, by_weight = LIB.rms_norm_grad(x, weight, up, 1e-5, plus_one)
    if not x.numel():
        assert out.shape == by_x.shape == x.shape and not by_weight.any()
        return
    assert_near(out, plain(x.double(), weight.double()), 2 * ROUNDING[dtype])
    summed, normed = LIB.add_rms_norm(x, up, weight, 1e-5, plus_one)
    assert torch.equal(summed, x + up) and torch.equal(normed, LIB.rms_norm(x + up, weight, 1e-5, plus_one))
    for got, wanted in zip((by_x, by_weight), gradients(plain, x, weight, up=up), strict=True):
        assert got.dtype == dtype
        assert_near(got, wanted, 4 * ROUNDING[dtype])
    assert all(map(torch.equal, (by_x, by_weight), LIB.rms_norm_grad(x, weight, up, 1e-5, plus_one)))


@each_dtype
@pytest.mark.parametrize(("num", "n"), [(1, 1), (50, 64), (3, 1500), (0, 8)])
def test_gated_unit(dtype, num, n):
    both, above = normal(1, num, 2 * n, dtype=dtype) * 4, normal(1, num, n, seed=2, dtype=dtype)
    gate, up = both[..., :n], both[..., n:]
    if num > 1:
        gate[0, 0, :4] = torch.tensor([200.0, -200.0, 0.0, -90.0])
    wanted = (
        torch.nn.functional.silu(gate.double()) * up.double(),
        *gradients(lambda g, u: torch.nn.functional.silu(g) * u, gate, up, up=above),
    )
    for got, exact in zip((LIB.silu_times(gate, up), *LIB.silu_times_grad(gate, up, above)), wanted, strict=True):
        assert got.shape == exact.shape
        if num:
            assert_near(got, exact, 2 * ROUNDING[dtype])


@each_dtype
@pytest.mark.parametrize(("heads", "tokens", "dim"), [(4, 5, 32), (9, 70, 64), (1, 3, 80), (2, 1, 256)])
def test_rotation(dtype, heads, tokens, dim):
    x, up = (normal(1, tokens, heads + 2, dim, seed=s, dtype=dtype)[:, :, 1:-1].transpose(1, 2) for s in (0, 1))
    cos, sin = normal(2, 1, tokens, dim, seed=2, dtype=dtype)  # halves that differ, which real ones do not

    def plain(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos.double() + torch.cat([-b, a], -1) * sin.double()

    out, back = torch.empty_like(x), torch.empty(x.shape, dtype=dtype, device=DEVICE)
    LIB.rotate(x, cos, sin, out)
    LIB.rotate(up, cos, sin, back, back=True)
    assert_near(out, plain(x.double()), 2 * ROUNDING[dtype])
    assert_near(back, gradients(plain, x, up=up)[0], 2 * ROUNDING[dtype])
    LIB.rotate(x, cos, sin, x)
    assert torch.equal(x, out), "in place"


@each_dtype
@pytest.mark.parametrize(("vocab", "temperature"), [(37, 1.0), (9001, 0.6)])
def test_logprobs(dtype, vocab, temperature):
    """Rows that are asked for no token, for several, and for one token twice; over two slices of the vocabulary."""
    logits = (normal(7, vocab) * 3).to(dtype)
    logits[3, vocab // 2 :] = -torch.inf
    row_of = torch.tensor([0, 0, 1, 3, 4, 4, 4, 6], device=DEVICE)
    targets = torch.randint(0, vocab // 2, (8,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[5] = targets[4]
    edges = torch.searchsorted(row_of, torch.arange(8, device=DEVICE))
    logp_grad, entropy_grad = normal(8, seed=1), normal(7, seed=2)
    logsum, entropy, logp = (torch.empty(num, device=DEVICE) for num in (7, 7, 8))
    scores = Scores(edges, targets, logsum, entropy, logp)
    for first, last in ((0, 4), (4, 7)):
        LIB.score(logits[first:last], first, scores, temperature)
    z = (logits.double() / temperature).requires_grad_()
    exact = z.log_softmax(-1)
    asked, disorder = exact[row_of, targets], -(exact.exp() * exact.clamp(min=-1e4)).sum(-1)
    for got, wanted in ((logsum, z.logsumexp(-1)), (logp, asked), (entropy, disorder)):
        assert_near(got, wanted, 2e-6)
    (wanted,) = torch.autograd.grad((asked * logp_grad).sum() + (disorder * entropy_grad).sum(), z)
    wanted = wanted.nan_to_num() / temperature
    for first, last in ((0, 20), (20, vocab)):
        part = logits[:, first:last].contiguous()
        out = torch.empty_like(part, dtype=torch.float32)
        slope = Scores(edges, targets - first, logsum, entropy, logp, logp_grad, entropy_grad)
        LIB.score_grad(part, 0, slope, temperature, out)
        assert_near(out, wanted[:, first:last], 2e-6)
        LIB.score_grad(part, 0, slope, temperature, part)
        assert torch.equal(part, out.to(dtype)), "in place"
    logits[1, 5] = torch.nan
    LIB.score(logits, 0, scores, temperature)
    assert logsum.isnan().tolist() == entropy.isnan().tolist() == [row == 1 for row in range(7)]


def attention(q, k, v, pool, tables, lens, window, scale) -> torch.Tensor:
    """What decode computes, in float64; stores nothing."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=DEVICE)
    for row, length in enumerate(lens.tolist()):
        place = torch.arange(length, device=DEVICE)
        page = tables[row][place // 16].long()
        keys, values = (x[:, page, place % 16].double() for x in pool)
        if length:
            keys[:, -1], values[:, -1] = k[row].double(), v[row].double()
        first = max(0, length - window) if window else 0
        keys, values = (x.repeat_interleave(len(q[row]) // len(k[row]), 0)[:, first:] for x in (keys, values))
        weights = (torch.einsum("hd,hnd->hn", q[row].double(), keys) * scale).softmax(-1)
        out[row] = torch.einsum("hn,hnd->hd", weights, values)
    return out


@each_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"), [(12, 2, 128, 0), (9, 3, 64, 0), (4, 4, 80, 40), (16, 1, 256, 17)]
)
def test_decode(dtype, heads, kv_heads, dim, window):
    lens = torch.tensor([1, 17, 0, 530, 16], dtype=torch.int32, device=DEVICE)
    tables = torch.randperm(200, generator=torch.Generator().manual_seed(0)).view(5, 40).to(DEVICE, torch.int32)
    pool = normal(2, kv_heads, 210, 16, dim, dtype=dtype)
    for row, length in enumerate(lens.tolist()):  # what was never written, and a page of nobody, must not be seen
        for place in range(max(length - 1, 0), 40 * 16):
            pool[:, :, tables[row, place // 16].long(), place % 16] = torch.nan
    pool[:, :, 200:] = torch.nan
    packed = normal(5, heads + 2 * kv_heads, dim, seed=1, dtype=dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], 1)
    before, scale = pool.clone(), dim**-0.5
    out = LIB.decode(q, k, v, pool, tables, lens, window, scale, 600)
    assert_near(out, attention(q, k, v, before, tables, lens, window, scale), 2 * ROUNDING[dtype])
    assert not out[2].any()
    for row, last in enumerate((lens - 1).tolist()):
        if last >= 0:
            before[:, :, tables[row, last // 16].long(), last % 16] = torch.stack([k[row], v[row]])
    assert torch.equal(pool.nan_to_num(7), before.nan_to_num(7)), "the newest keys and values are stored, nothing else"
    for some in (slice(3, 4), slice(3, 5)):
        alone = LIB.decode(q[some], k[some], v[some], pool, tables[some], lens[some], window, scale, 1500)
        assert torch.equal(alone, out[some]), "the same bits with other rows beside it"
    short = LIB.decode(q, k, v, pool, tables, lens, window, scale, 30)
    assert_near(short, out.double(), 2 * ROUNDING[dtype])


@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_decode_of_many_rows_sees_what_it_stores():
    """The newest key is stored by some threads and read by others of the same program."""
    lens = torch.randint(0, 900, (300,), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int32)
    tables = torch.randperm(300 * 64, generator=torch.Generator().manual_seed(0)).view(300, 64).to(DEVICE, torch.int32)
    pool = normal(2, 2, 300 * 64, 16, 128, dtype=torch.bfloat16)
    before = pool.clone()
    rows = (lens > 0).nonzero()[:, 0]
    last = lens[rows].long() - 1
    for _ in range(20):
        pool[:, :, tables[rows, last // 16].long(), last % 16] = torch.nan
        q, k, v = (normal(300, heads, 128, seed=heads, dtype=torch.bfloat16) for heads in (12, 2, 2))
        out = LIB.decode(q, k, v, pool, tables, lens, 0, 0.1, 900)
        assert not out.isnan().any()
    assert_near(out, attention(q, k, v, before, tables, lens, 0, 0.1), 2 * ROUNDING[torch.bfloat16])


@each_dtype
@pytest.mark.parametrize("vocab", [5, 2048, 5003])
def test_sample(dtype, vocab):
    logits = (normal(20, vocab) * 3).to(dtype)
    logits[1, 2:] = -torch.inf
    logits[2, :-1] = -torch.inf
    temperature = torch.full((20,), 0.8, device=DEVICE)
    temperature[::8] = 0
    uniform = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    uniform[1] = 1 - 2**-53
    token, logprob, ok = LIB.sample(logits, temperature, uniform)
    exact = logits.double() / torch.where(temperature > 0, temperature, 1.0).double()[:, None]
    upto = (exact - exact.amax(-1, keepdim=True)).exp().cumsum(-1)
    drawn = torch.searchsorted(upto, uniform[:, None] * upto[:, -1:], right=True)[:, 0]
    wanted = torch.where(temperature > 0, drawn, exact.argmax(-1))
    assert (token.dtype, logprob.dtype, ok.dtype) == (torch.int64, torch.float32, torch.bool)
    assert ok.all() and token[1] < 2 and token[2] == vocab - 1
    assert int((token != wanted).sum()) <= 1, "but for a number within rounding of an edge"
    assert_near(logprob, exact.log_softmax(-1).gather(1, token[:, None])[:, 0], 4e-6)
    alone = LIB.sample(logits[7:9], temperature[7:9], uniform[7:9])
    assert all(torch.equal(x, y[7:9]) for x, y in zip(alone, (token, logprob, ok), strict=True))
    for row, wrong in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row, vocab // 2 if row < 2 else slice(None)] = wrong
    token, _, ok = LIB.sample(logits, temperature, uniform)
    assert ok.tolist() == [False] * 3 + [True] * 17 and int(token.min()) >= 0 and int(token.max()) < vocab


@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_in_a_cuda_graph():
    """Lengths that change between replays, of tensors that stay."""
    pool, tables = normal(2, 2, 40, 16, 64), torch.arange(40, device=DEVICE, dtype=torch.int32).view(2, 20)
    q, k, v = normal(2, 8, 64), normal(2, 2, 64, seed=1), normal(2, 2, 64, seed=2)
    lens = torch.tensor([0, 3], device=DEVICE, dtype=torch.int32)
    logits, temperature = normal(2, 5000), torch.ones(2, device=DEVICE)
    uniform = torch.zeros(2, dtype=torch.float64, device=DEVICE)

    def step() -> list[torch.Tensor]:
        return [LIB.decode(q, k, v, pool, tables, lens, 0, 0.1, 320), *LIB.sample(logits, temperature, uniform)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for length in (1, 17, 300):
        lens.fill_(length)
        uniform.fill_(length / 301)
        graph.replay()
        assert all(map(torch.equal, found, step()))


@pytest.fixture
def with_kernels(monkeypatch):
    """The type that models compute in; in the interpreter, whose bf16 is not that of a GPU, float32 on the CPU."""
    if HAS_GPU:
        return torch.bfloat16
    monkeypatch.setattr(logprobs, "_kernels_for", lambda *_: LIB)
    monkeypatch.setattr(modules, "fits", lambda *_, on: True)
    monkeypatch.setattr(modules, "_agree", lambda a, b: bool((a - b).norm() < 0.012 * b.norm()))  # of probes in bf16
    return torch.float32


@pytest.mark.parametrize("with_entropy", [True, False])
def test_logprobs_of_the_trainer(with_kernels, with_entropy, monkeypatch):
    monkeypatch.setattr(logprobs, "GPU_LOGITS", 1)
    hidden, weight = (normal(*s, seed=i, dtype=with_kernels) for i, s in enumerate([(41, 32), (3000, 32)]))
    row_of = torch.cat([torch.arange(0, 41, 2), torch.tensor([9, 9, 9])]).sort().values.to(DEVICE)
    targets = torch.randint(0, 3000, (24,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[row_of == 9] = 5
    up_logp, up_entropy = normal(24, seed=3), normal(41, seed=4) * with_entropy

    def exact(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logp = (hidden @ weight.t() / 0.7).log_softmax(-1)
        return (logp[row_of, targets] * up_logp).sum() - ((logp.exp() * logp).sum(-1) * up_entropy).sum()

    given = hidden.requires_grad_(), weight.requires_grad_()
    logp, entropy = logprobs.token_logprobs(*given, row_of, targets, 0.7, 16)
    plain = (hidden.double() @ weight.double().t() / 0.7).log_softmax(-1)
    assert_near(logp, plain[row_of, targets], 1e-5)
    assert_near(entropy, -(plain.exp() * plain).sum(-1), 1e-5)
    found = torch.autograd.grad((logp * up_logp).sum() + (entropy * up_entropy).sum(), given)
    for got, wanted in zip(found, gradients(exact, hidden, weight, up=torch.ones(())), strict=True):
        assert got.dtype == with_kernels
        assert_near(got, wanted, 4 * ROUNDING[with_kernels])


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, GemmaConfig], ids=lambda c: c.__name__)
def test_a_fused_model(config, with_kernels, caplog):
    """Hidden states and gradients as near to those of float32 as the plain model's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        config(vocab_size=120, num_key_value_heads=2, head_dim=32, **sizes), attn_implementation=ATTENTION
    )
    exact, plain = model.to(DEVICE), copy.deepcopy(model).to(DEVICE, with_kernels)
    fused = copy.deepcopy(plain)
    with caplog.at_level("INFO"):
        modules.fuse(fused, LIB)
    assert ("left to PyTorch" in caplog.text) == (config is GemmaConfig), "but for its gates, all is replaced"
    tree = prefix_tree([np.arange(3, 40), np.arange(5, 80)])
    tokens, places = (torch.from_numpy(x)[None].to(DEVICE) for x in (tree.tokens % 120, tree.depth))

    def run(model: Any) -> tuple[torch.Tensor, ...]:
        with functions.recomputing():
            hidden = model.base_model(
                input_ids=tokens, position_ids=places, use_cache=False, tree_layout=Layout(tree, DEVICE)
            ).last_hidden_state.float()
        loss = (hidden * torch.sin(torch.arange(hidden.numel(), device=DEVICE).view_as(hidden))).sum()
        weights = [p for name, p in model.named_parameters() if "lm_head" not in name]
        return hidden.detach(), *torch.autograd.grad(loss, weights)

    for got, usual, wanted in zip(run(fused), run(plain), run(exact), strict=True):
        error, limit = (float((x.float() - wanted).norm() / wanted.norm()) for x in (got, usual))
        assert error <= max(1.5 * limit, 2 * ROUNDING[with_kernels])


def test_kernels_can_be_switched_off(monkeypatch, caplog):
    monkeypatch.setenv("AREALITE_KERNELS", "off")
    assert functions._tried("cuda") is None
    assert "AREALITE_KERNELS=off" in caplog.text
