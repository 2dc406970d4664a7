"""Rewards, their normalisation, sums to go and advantages of packed tokens, against plain loops over padded rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.algorithm.advantage import gae, normalise, overlong_penalty, shape_rewards, sum_to_go

LEVELS = ("group", "batch", "none")
REWARDS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 0.7, 1 / 3, -2.5])), min_size=1, max_size=14)
LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def plain_scales(values, groups, mean, std, leave_one_out, eps):
    """(what is subtracted, what divides), one entry at a time, in Python floats."""
    for x, group in zip(values, groups, strict=True):
        own = {"group": [v for v, g in zip(values, groups, strict=True) if g == group], "batch": list(values)}
        centre, spread = 0.0, 1.0
        if mean != "none":
            pool = own[mean]
            others = (math.fsum(pool) - x) / max(len(pool) - 1, 1)
            centre = x if max(pool) == min(pool) else others if leave_one_out else math.fsum(pool) / len(pool)
        if std != "none":
            pool = own[std]
            middle = math.fsum(pool) / len(pool)
            spread = math.sqrt(math.fsum((v - middle) ** 2 for v in pool) / max(len(pool) - 1, 1)) + eps
            spread = math.inf if max(pool) == min(pool) else spread
        yield centre, spread


def plain_norm(values, *args):
    return [(x - centre) / spread for x, (centre, spread) in zip(values, plain_scales(values, *args), strict=True)]


@settings(deadline=None, max_examples=80)
@given(REWARDS, st.sampled_from(LEVELS), st.sampled_from(LEVELS), st.booleans())
def test_normalisation_equals_the_plain_loop(rows, mean, std, leave_one_out):
    groups, values = [g for g, _ in rows], [x for _, x in rows]
    got = normalise(torch.tensor(values, dtype=torch.float64), torch.tensor(groups), mean, std, leave_one_out)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(plain_norm(values, groups, mean, std, leave_one_out, 1e-6), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(REWARDS, st.randoms(use_true_random=False))
def test_the_order_of_rewards_does_not_matter(rows, shuffle):
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    groups, values = torch.tensor([g for g, _ in rows]), torch.tensor([x for _, x in rows], dtype=torch.float64)
    straight = normalise(values, groups, "group", "batch")
    assert torch.allclose(normalise(values[order], groups[order], "group", "batch"), straight[order], atol=1e-12)


@pytest.mark.parametrize("value", [0.7, 0.9, 1 / 3, 1e-9, 1e9])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("size", [1, 2, 8, 13])
def test_equal_rewards_have_advantage_exactly_zero(value, leave_one_out, size):
    x = torch.full((size,), value, dtype=torch.float32)
    for mean, std in (("group", "group"), ("batch", "batch"), ("group", "none"), ("none", "group")):
        assert normalise(x, torch.zeros(size, dtype=torch.int64), mean, std, leave_one_out).tolist() == [0.0] * size


def test_group_of_grpo():
    got = normalise(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]), torch.zeros(8, dtype=torch.int64))
    assert got[0].item() == pytest.approx(2.4749, abs=1e-4)
    assert got[1].item() == pytest.approx(-0.3536, abs=1e-4)


@pytest.mark.parametrize(
    "values", [[0.0, 1.0, 5.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0, 1.0]], ids=["mixed", "each constant"]
)
def test_batch_statistics_span_ranks(values):
    """Two ranks that exchange their partial sums get what one rank gets with all the entries."""
    x = torch.tensor(values, dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2])
    whole = normalise(x, groups, "batch", "batch", leave_one_out=True)
    parts = [slice(0, 2), slice(2, 5)]
    sent: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def run(rank, answers):
        calls = iter(answers)

        def all_reduce(tensor, op):
            sent[rank].append(tensor)
            other = next(calls, None)
            if other is None:
                return tensor
            return tensor + other if op == "sum" else torch.maximum(tensor, other)

        return normalise(x[parts[rank]], groups[parts[rank]], "batch", "batch", True, all_reduce=all_reduce)

    for _ in range(8):  # each pass makes one more partial result of the other rank right
        before = {rank: list(sent[rank]) for rank in sent}
        sent = {0: [], 1: []}
        halves = [run(0, before[1]), run(1, before[0])]
    assert torch.allclose(torch.cat(halves), whole, atol=1e-12) and bool(whole.any())


def plain_gae(rewards, values, mask, gamma, lam):
    """One row, backwards over all its tokens; those outside the mask carry what comes after them unchanged."""
    out = np.zeros(len(mask))
    next_value = next_advantage = 0.0
    for t in range(len(mask) - 1, -1, -1):
        if not mask[t]:
            continue
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[t]
        out[t] = next_advantage
    return out


ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(0, 99), st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from([1.0, 0.95, 0.0]))
def test_packed_estimates_equal_the_plain_loop(masks, seed, gamma, lam):
    rng = np.random.default_rng(seed)
    rows = [(rng.normal(size=len(m)), rng.normal(size=len(m)), np.asarray(m)) for m in masks]
    expected = np.concatenate([plain_gae(*row, gamma, lam)[row[2]] for row in rows])
    rewards, values = (torch.from_numpy(np.concatenate([row[i][row[2]] for row in rows])) for i in (0, 1))
    owner = torch.from_numpy(np.repeat(np.arange(len(rows)), [row[2].sum() for row in rows]))
    np.testing.assert_allclose(gae(rewards, values, owner, gamma, lam).numpy(), expected, atol=1e-12)


def test_order_of_sequences_does_not_matter():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(2, n)) for n in (3, 1, 5)]

    def of(order):
        packed = torch.from_numpy(np.concatenate([rows[i] for i in order], axis=1))
        owner = torch.repeat_interleave(torch.arange(3), torch.tensor([rows[i].shape[1] for i in order]))
        found = gae(packed[0], packed[1], owner, 0.9, 0.8)
        return dict(zip(order, found.split([rows[i].shape[1] for i in order]), strict=True))

    one, other = of([0, 1, 2]), of([2, 0, 1])
    for i in range(3):
        torch.testing.assert_close(one[i], other[i], rtol=0, atol=1e-12)


def test_limits_of_lambda():
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.2, 0.7])
    owner = torch.zeros(3, dtype=torch.int64)
    returns = gae(rewards, values, owner, 1.0, 1.0) + values
    assert returns.tolist() == pytest.approx([1.0, 1.0, 1.0])  # Monte Carlo
    assert gae(rewards, values, owner, 1.0, 0.0).tolist() == pytest.approx([-0.3, 0.5, 0.3])  # one step
    assert gae(rewards[:0], values[:0], owner[:0], 1.0, 1.0).tolist() == []


def test_reward_shaping():
    assert shape_rewards(torch.tensor([0.0, 1.0, -3.0]), 0.5, 2.0, 2.5).tolist() == [1.0, 2.5, -2.5]
    assert shape_rewards(torch.tensor([0.0, 1.0]), 0.0, 1.0, None).tolist() == [0.0, 1.0]
    lengths = torch.tensor([0, 80, 90, 100, 140])
    assert overlong_penalty(lengths, 100, 20, 2.0).tolist() == pytest.approx([0.0, 0.0, -1.0, -2.0, -2.0])


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(0, 99), st.sampled_from([1.0, 0.9, 0.0]))
def test_sum_to_go_equals_the_plain_loop(lengths, seed, gamma):
    rewards = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sequence_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected, at = [], 0
    for length in lengths:
        own = rewards[at : at + length].tolist()
        at += length
        expected += [sum(gamma ** (k - t) * own[k] for k in range(t, length)) for t in range(length)]
    assert sum_to_go(rewards, sequence_of, gamma).tolist() == pytest.approx(expected, abs=1e-12)


def test_sum_to_go_of_sequences_without_tokens():
    assert sum_to_go(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 1.0).tolist() == []
    got = sum_to_go(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, 4]), 0.5)
    assert got.tolist() == [2.0, 2.0, 4.0]
