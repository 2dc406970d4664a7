"""The sampler draws from the right distribution, whatever the restriction, and every row for itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.inference.core.requests import SamplingParams
from arealite.inference.core.sampler import NUM_LIKELIEST, sample, uniform_numbers

NUM_DRAWS = 20_000


def reference_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The restricted distribution, the slow and plain way."""
    probs = torch.softmax(logits.double() / params.temperature, -1)
    order = probs.argsort(descending=True)
    kept = torch.zeros_like(probs)
    mass = 0.0
    for rank, token in enumerate(order.tolist()):
        p = float(probs[token])
        if (params.top_k and rank >= params.top_k) or mass >= params.top_p or p < params.min_p * float(probs.max()):
            break
        kept[token] = p
        mass += p
    return kept / kept.sum()


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean; draws outside of the support are infinitely far."""
    support = probs > 0
    if bool(counts[~support].any()):
        return math.inf
    expected = probs[support] * counts.sum()
    statistic = float(((counts[support] - expected) ** 2 / expected).sum())
    freedom = max(int(support.sum()) - 1, 1)
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=0.5),
        SamplingParams(1, temperature=1.7, top_k=7),
        SamplingParams(1, top_p=0.6),
        SamplingParams(1, min_p=0.2),
        SamplingParams(1, top_k=20, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 1.5
    uniforms = uniform_numbers([7] * NUM_DRAWS, range(NUM_DRAWS))
    drawn = sample(logits.expand(NUM_DRAWS, -1), [params] * NUM_DRAWS, uniforms)
    full = torch.softmax(logits.double() / params.temperature, -1)
    left_out = float(full[reference_probs(logits, params) == 0].sum())
    assert set(drawn.cut) == (set(range(NUM_DRAWS)) if left_out else set())
    assert all(cut == pytest.approx(left_out, abs=1e-6) for cut in drawn.cut.values())
    counts = torch.bincount(torch.tensor(drawn.tokens), minlength=300).double()
    probs = reference_probs(logits, params)
    likely = probs * NUM_DRAWS >= 5  # the statistic needs a few expected draws in each cell
    rest = torch.tensor([float(counts[~likely].sum()), float(probs[~likely].sum())])
    assert not bool(counts[probs == 0].any())
    assert chi_square(torch.cat([counts[likely], rest[:1]]), torch.cat([probs[likely], rest[1:].double()])) < 4
    full = torch.log_softmax(logits.double() / params.temperature, -1)
    error = max(abs(lp - float(full[t])) for t, lp in zip(drawn.tokens, drawn.logprobs, strict=True))
    assert error < 1e-5, "the logprob is that of the full vocabulary after temperature"


@pytest.mark.parametrize("wide", [{"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 4000}], ids=str)
def test_a_nucleus_wider_than_the_sorted_head_is_exact(wide):
    logits, params = -torch.linspace(0, 1, 4 * NUM_LIKELIEST), SamplingParams(1, **wide)
    uniforms = [(i + 0.5) / 64 for i in range(64)]
    drawn = sample(logits.expand(64, -1), [params] * 64, uniforms)
    wanted = torch.searchsorted(reference_probs(logits, params).cumsum(0), torch.tensor(uniforms).double()).tolist()
    assert drawn.tokens == pytest.approx(wanted, abs=1) and wanted[-1] > 2 * NUM_LIKELIEST


def test_greedy_is_argmax_with_logprobs_at_temperature_one():
    logits = torch.randn(5, 1000)
    drawn = sample(logits, [SamplingParams(1, temperature=0.0)] * 5, [0.0] * 5)
    assert drawn.tokens == logits.argmax(-1).tolist()
    wanted = torch.log_softmax(logits, -1).max(-1).values.tolist()
    assert drawn.logprobs == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("at", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("vocab", [3, 256, 257, 1000])
def test_extreme_uniforms_never_reach_impossible_tokens(at, vocab):
    logits = torch.full((1, vocab), -torch.inf)
    logits[0, vocab // 2] = 1.0
    drawn = sample(logits, [SamplingParams(1)], [at])
    assert (drawn.tokens, drawn.logprobs, drawn.ok) == ([vocab // 2], [0.0], [True])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(bad):
    logits = torch.randn(3, 50)
    alone = sample(logits[2:], [SamplingParams(1)], [0.3])
    logits[1, 7] = bad
    drawn = sample(logits, [SamplingParams(1)] * 3, [0.1, 0.2, 0.3])
    assert drawn.ok == [True, False, True]
    assert (drawn.tokens[2], drawn.logprobs[2]) == (alone.tokens[0], alone.logprobs[0])


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    vocab=st.sampled_from([5, 255, 256, 1000, 49152 // 16]),
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_the_others(num_rows, vocab, seed, temperature, top_p, dtype):
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)).to(dtype)
    params = [SamplingParams(1, temperature=temperature, top_p=top_p)] * num_rows
    uniforms = uniform_numbers([seed] * num_rows, range(num_rows))
    together = sample(logits, params, uniforms)
    for i in {0, num_rows // 2, num_rows - 1}:
        alone = sample(logits[i : i + 1], params[:1], uniforms[i : i + 1])
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[i], together.logprobs[i])


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1])
def test_uniform_numbers_are_splitmix64_of_seed_and_position(seed):
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    positions = [0, 1, 2047, 2**31]
    state = mix((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    wanted = [(mix((state + position * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53 for position in positions]
    assert uniform_numbers([seed] * len(positions), positions) == wanted


def test_uniforms_are_uniform_and_differ_between_seeds_and_positions():
    grid = torch.tensor([uniform_numbers([seed] * 200, range(200)) for seed in (*range(49), -1)], dtype=torch.float64)
    assert len(set(grid.flatten().tolist())) == grid.numel()
    counts = torch.histc(grid.flatten(), bins=20, min=0, max=1)
    assert chi_square(counts.double(), torch.full((20,), 0.05, dtype=torch.float64)) < 4
    along = torch.corrcoef(torch.stack([grid[:, :-1].flatten(), grid[:, 1:].flatten()]))[0, 1]
    across = torch.corrcoef(torch.stack([grid[:-1].flatten(), grid[1:].flatten()]))[0, 1]
    assert abs(float(along)) < 0.04 and abs(float(across)) < 0.04
