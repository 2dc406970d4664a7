"""Normalisation against a plain loop, and what must not change it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.algorithm.advantage import normalise

LEVELS = ("group", "batch", "none")
REWARDS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 0.7, 1 / 3, -2.5])), min_size=1, max_size=14)


def plain(values, groups, mean, std, leave_one_out, eps):
    """One entry at a time, in Python floats."""
    out = []
    for x, group in zip(values, groups, strict=True):
        own = {"group": [v for v, g in zip(values, groups, strict=True) if g == group], "batch": list(values)}
        y, used = x, []
        if mean != "none":
            pool = own[mean]
            used.append(pool)
            if leave_one_out:
                y = x - (math.fsum(pool) - x) / max(len(pool) - 1, 1)
            else:
                y = x - math.fsum(pool) / len(pool)
        if std != "none":
            pool = own[std]
            used.append(pool)
            centre = math.fsum(pool) / len(pool)
            y /= math.sqrt(math.fsum((v - centre) ** 2 for v in pool) / max(len(pool) - 1, 1)) + eps
        out.append(0.0 if any(max(p) == min(p) for p in used) else y)
    return out


@settings(deadline=None, max_examples=80)
@given(REWARDS, st.sampled_from(LEVELS), st.sampled_from(LEVELS), st.booleans())
def test_equals_the_plain_loop(rows, mean, std, leave_one_out):
    groups, values = [g for g, _ in rows], [x for _, x in rows]
    got = normalise(torch.tensor(values, dtype=torch.float64), torch.tensor(groups), mean, std, leave_one_out)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(plain(values, groups, mean, std, leave_one_out, 1e-6), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(REWARDS, st.randoms(use_true_random=False))
def test_order_does_not_matter(rows, shuffle):
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
