"""Advantages of packed tokens against the plain backward loop over padded rows, and the losses on values and pairs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.algorithm.advantage import gae
from arealite.algorithm.losses import clipped_value_loss, pair_loss


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


def test_clipped_value_loss():
    values = torch.tensor([1.0, 3.0, 3.0, -2.0], requires_grad=True)
    old, returns = torch.tensor([0.8, 0.0, 0.0, 0.0]), torch.tensor([2.0, 4.0, 0.0, -9.0])
    loss, is_clipped = clipped_value_loss(values, old, returns, 0.5)
    # The third one has moved away from its return, so the plain loss is the larger one and pulls it back.
    assert loss.tolist() == pytest.approx([0.5, 3.5**2 / 2, 4.5, 8.5**2 / 2])
    assert is_clipped.tolist() == [False, True, False, True]
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-1.0, 0.0, 3.0, 0.0])


def test_pair_loss():
    found = pair_loss(torch.tensor([0.0, 3.0, -200.0]), torch.tensor([0.0, 1.0, 0.0]))
    assert found.tolist() == pytest.approx([np.log(2), np.log1p(np.exp(-2)), 200.0])
