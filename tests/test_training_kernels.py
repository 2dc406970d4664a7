"""The compiled kernels of the trainer: gradients against PyTorch's in float32, and models that are fused with them."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.kernels import each_vector_kind, model_of, needs_kernels, normal
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from arealite.algorithm.packing import prefix_tree
from arealite.engine import attention
from arealite.engine.attention import ATTENTION, Layout, tree_attention
from arealite.engine.logprobs import token_logprobs
from arealite.kernels import cpu, functions
from arealite.kernels.modules import fuse

pytestmark = needs_kernels
ROUNDING = 2**-8  # of bf16, relative


def gradients(function: Any, *inputs: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    return list(torch.autograd.grad(function(*inputs), inputs, up))


def assert_near(got: list[torch.Tensor], wanted: list[torch.Tensor], roundings: float = 2) -> None:
    """Within so many roundings of the largest entries."""
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == torch.bfloat16 and x.shape == y.shape
        assert float((x.float() - y).abs().max()) <= roundings * ROUNDING * float(y.abs().max())


@each_vector_kind
@pytest.mark.parametrize("width", [32, 576])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("num", [1, 7, 300])
def test_norm(lib, width, plus_one, num):
    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (width,), weight + plus_one, 1e-5)

    x, weight, up = normal(2, num, width), normal(width, seed=1), normal(2, num, width, seed=2)
    got = gradients(lambda x, w: functions.rms_norm(lib, x, w, 1e-5, plus_one), x, weight, up=up)
    assert_near(got, gradients(plain, x.float(), weight.float(), up=up.float()))


@each_vector_kind
@pytest.mark.parametrize("num", [1, 50, 3000])
def test_gated_unit(lib, num):
    gate, up, above = normal(num, 64) * 4, normal(num, 64, seed=1), normal(num, 64, seed=2)
    gate[0, :4] = torch.tensor([200.0, -200.0, 0.0, -90.0])
    got = gradients(lambda g, u: functions.silu_times(lib, g, u), gate, up, up=above)
    plain = gradients(lambda g, u: torch.nn.functional.silu(g) * u, gate.float(), up.float(), up=above.float())
    assert_near(got, plain)


@each_vector_kind
@pytest.mark.parametrize(("heads", "tokens", "dim"), [(4, 5, 32), (9, 700, 64), (1, 3, 128)])
def test_rotation(lib, heads, tokens, dim):
    x, up = (normal(1, tokens, heads, dim, seed=s).transpose(1, 2) for s in (0, 1))
    cos, sin = normal(2, 1, tokens, dim, seed=2)  # halves that differ, which real ones do not

    def plain(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x, cos.float(), sin.float())[0]

    got = gradients(lambda x: functions.rotate(lib, x, cos, sin), x, up=up)
    assert_near(got, gradients(plain, x.float(), up=up.float()))
    with torch.no_grad():
        given = x.clone()
        assert functions.rotate(lib, given, cos, sin) is given, "in place where no gradient is wanted"


@each_vector_kind
@pytest.mark.parametrize("vocabulary", [37, 8200])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_logprobs(lib, vocabulary, temperature, with_entropy, monkeypatch):
    """Rows that are asked for no token, for several, and for one token twice; over several chunks."""
    monkeypatch.setattr(cpu, "load", lambda: lib)
    hidden, weight = normal(41, 32) * 0.5, normal(vocabulary, 32, seed=1)
    rng = np.random.default_rng(0)
    row_of = torch.from_numpy(np.sort(np.append(rng.integers(0, 41, 60), [9, 9, 9])))
    targets = torch.from_numpy(rng.integers(0, vocabulary, 63))
    targets[row_of == 9] = 5
    up_logp, up_entropy = normal(63, seed=3).float(), normal(41, seed=4).float() * with_entropy

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logp, entropy = token_logprobs(hidden, weight, row_of, targets, temperature, 16)
        return (logp * up_logp).sum() + (entropy * up_entropy).sum()

    logits = lib.product(hidden, lib.pack([weight]), None, vocabulary).double() / temperature
    logp, entropy = token_logprobs(hidden, weight, row_of, targets, temperature, 16)
    exact = logits.log_softmax(-1)
    assert float((logp - exact[row_of, targets]).abs().max()) < 5e-6
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=2e-5, rtol=1e-5)
    found = gradients(ours, hidden, weight, up=torch.ones(()))
    monkeypatch.setattr(cpu, "load", lambda: None)
    assert_near(found, [g.float() for g in gradients(ours, hidden, weight, up=torch.ones(()))], 1)


def test_a_logit_that_is_no_number_is_seen():
    hidden, weight = normal(3, 32), normal(40, 32, seed=1)
    hidden[1, 3] = math.nan
    logp, entropy = token_logprobs(hidden, weight, torch.arange(3), torch.arange(3), 1.0, 16)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


@each_vector_kind
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("lengths", "shared", "heads", "kv_heads", "dim", "window"),
    [
        ([15, 39, 27, 27, 1], 35, 9, 3, 64, None),  # answers to one prompt
        ([1, 2, 63, 64, 65, 128, 700], 0, 4, 2, 32, None),
        ([600, 130], 70, 5, 1, 96, None),
        ([300, 5], 40, 2, 2, 128, 37),
        ([700], 0, 6, 2, 64, 100),
        ([40], 3, 260, 1, 32, 7),  # more heads than a block has rows
    ],
)
def test_attention_over_a_tree(
    lib,
    lengths,
    shared,
    heads,
    kv_heads,
    dim,
    window,
    threads,
    monkeypatch,
):
    monkeypatch.setattr(cpu, "load", lambda: lib)
    monkeypatch.setattr(attention, "MAX_QUERIES", 256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 9999, shared)
    layout = Layout(prefix_tree([np.append(prompt, rng.integers(0, 9999, n)) for n in lengths]), torch.device("cpu"))
    num = len(layout.tree.tokens)
    q, k, v, up = (normal(1, h, num, dim, seed=i) for i, h in enumerate([heads, kv_heads, kv_heads, heads]))
    up = up.transpose(1, 2)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(torch.nn.Identity(), q, k, v, None, tree_layout=layout, sliding_window=window)[0]

    kept = attention._CompiledAttention.apply
    calls: list[int] = []
    monkeypatch.setattr(attention._CompiledAttention, "apply", lambda *args: calls.append(1) or kept(*args))
    out, found = run(q, k, v), gradients(run, q, k, v, up=up)
    assert len(calls) == 2
    exact = gradients(run, q.float(), k.float(), v.float(), up=up.float())
    monkeypatch.setattr(cpu, "load", lambda: None)
    plain_out, plain = run(q, k, v), gradients(run, q, k, v, up=up)
    assert_near([out], [plain_out.float()], 2)
    for x, y, z in zip(found, plain, exact, strict=True):
        assert float((x.float() - z).norm()) <= 1.1 * float((y.float() - z).norm())


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows = [np.arange(3, 40), np.arange(5, 80)]
    tree = prefix_tree(rows)
    tokens, positions = (torch.from_numpy(x)[None] for x in (tree.tokens % 120, tree.depth))
    hidden = model.base_model(
        input_ids=tokens, position_ids=positions, use_cache=False, tree_layout=Layout(tree, torch.device("cpu"))
    ).last_hidden_state.float()
    loss = (hidden * torch.sin(torch.arange(hidden.numel()).view_as(hidden))).sum()
    named = {name: p for name, p in model.named_parameters() if "lm_head" not in name}
    return hidden.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, GemmaConfig], ids=lambda c: c.__name__)
def test_a_fused_model_has_the_results_of_the_plain_one(config, lib):
    exact = model_of(config, attn_implementation=ATTENTION)
    plain = copy.deepcopy(exact).bfloat16()
    model = copy.deepcopy(exact)
    fuse(model, lib)  # before its weights get their type, as the trainer does it
    wanted, wanted_gradients = loss_and_gradients(exact)
    assert torch.equal(loss_and_gradients(model)[0], wanted), "in float32 nothing changes"
    model.bfloat16()
    hidden, found = loss_and_gradients(model)
    plain_hidden, plain_found = loss_and_gradients(plain)
    error, usual = ((x - wanted).norm() for x in (hidden, plain_hidden))
    assert error <= 1.5 * usual
    for name, gradient in wanted_gradients.items():
        size = float(gradient.norm()) + 1e-6
        error, usual = (float((g[name].float() - gradient).norm()) / size for g in (found, plain_found))
        assert error <= max(1.5 * usual, 2 * ROUNDING), f"{name}: {error} off, and {usual} without kernels"


def test_norms_and_gates_are_computed_again(lib):
    unit = torch.nn.Sequential(LlamaRMSNorm(64), LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=256)))
    unit.bfloat16()
    x = normal(100, 64)
    names = [name for name, _ in unit.named_parameters()]
    inputs = x, *(p.detach() for p in unit.parameters())
    made = {"rms_norm": 0, "silu_times": 0}

    class Counted:
        def __getattr__(self, name: str) -> Any:
            function = lib.__getattribute__(name)

            def counted(*args: Any, **setting: Any) -> Any:
                made[name] += 1
                return function(*args, **setting)

            return counted if name in made else function

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(unit, dict(zip(names, weights, strict=True)), (x,))

    def run_recomputing(*inputs: torch.Tensor) -> torch.Tensor:
        with functions.recomputing():
            return run(*inputs)

    fuse(unit, Counted())  # type: ignore[arg-type]
    made.update(dict.fromkeys(made, 0))
    wanted = gradients(run, *inputs, up=x)
    assert made["rms_norm"] == made["silu_times"] == 1
    found = gradients(run_recomputing, *inputs, up=x)
    assert made["rms_norm"] == made["silu_times"] == 3, "once forward and once backward, for two layers that ask"
    assert all(map(torch.equal, found, wanted))
    assert not functions._made


def test_a_result_that_was_changed_in_place_is_kept(lib):
    weight = normal(64, 64)

    def run(gate: torch.Tensor) -> torch.Tensor:
        with functions.recomputing():
            product = functions.silu_times(lib, gate, gate)
            product.mul_(2)
            return product @ weight * (product @ weight)

    found = gradients(run, normal(5, 64), up=normal(5, 64))
    plain = gradients(lambda g: (2 * torch.nn.functional.silu(g) * g @ weight.float()) ** 2,
                      normal(5, 64).float(), up=normal(5, 64).float())  # fmt: skip
    assert_near(found, plain, 4)


def test_activations_of_fused_modules_are_computed_again_by_checkpointing(lib):
    unit = torch.nn.Sequential(LlamaRMSNorm(64), LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=256)))
    unit.bfloat16()
    fuse(unit, lib)
    x = normal(100, 64)
    kept: dict[int, int] = {}  # bytes that autograd keeps, by storage

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = gradients(lambda x: checkpoint(unit, x, use_reentrant=False), x, up=x)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(unit, x, up=x), strict=True))
    assert sum(kept.values()) <= 2 * 100 * 64
