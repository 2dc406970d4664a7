"""Losses and KL against plain loops; gradients against the quantities they stand for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.algorithm.losses import (
    Denominators,
    behaviour_weight,
    clipped_loss,
    clipped_value_loss,
    kl_loss,
    kl_value,
    pair_loss,
    policy_ratio,
    token_weights,
)

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def columns(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    logp, prox, behaviour, advantages = (torch.randn(total, generator=g, dtype=torch.float64) for _ in range(4))
    sample_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return logp, prox, behaviour, advantages, sample_of


def plain_loss(lengths, logp, prox, behaviour, advantages, *, level, correction, cap, dual, aggregation, max_tokens):
    """The whole objective, token by token."""
    per_sequence, at = [], 0
    for length in lengths:
        span = range(at, at + length)
        at += length
        mean_ratio = math.exp(sum(logp[t] - prox[t] for t in span) / length)
        mean_weight = math.exp(sum(prox[t] - behaviour[t] for t in span) / length)
        losses = []
        for t in span:
            r = mean_ratio if level == "sequence" else math.exp(logp[t] - prox[t])
            w = mean_weight if level == "sequence" else math.exp(prox[t] - behaviour[t])
            if correction == "mask" and w > cap:
                w = 0.0
            if correction == "truncate":
                w = min(w, cap)
            a = advantages[t]
            loss = max(-a * r, -a * min(max(r, 0.8), 1.3))
            if dual is not None and a < 0:
                loss = min(loss, -dual * a)
            losses.append(w * loss)
        per_sequence.append(losses)
    n = len(lengths)
    if aggregation == "token-mean":
        return sum(map(sum, per_sequence)) / sum(lengths)
    if aggregation == "seq-mean-token-mean":
        return sum(sum(losses) / len(losses) for losses in per_sequence) / n
    return sum(map(sum, per_sequence)) / (n * max_tokens)


def loss_of(logp, prox, behaviour, advantages, sample_of, tokens, over, *, level, correction, cap, dual, aggregation):
    ratio = policy_ratio(logp, prox, sample_of, level)
    weight = behaviour_weight(prox, behaviour, sample_of, level, correction, cap)
    loss, _ = clipped_loss(ratio, advantages, 0.2, 0.3, dual)
    return (weight * loss * token_weights(tokens, aggregation, over)).sum()


@settings(deadline=None, max_examples=60)
@given(
    LENGTHS,
    st.integers(0, 99),
    st.sampled_from(["token", "sequence"]),
    st.sampled_from(["none", "mask", "truncate"]),
    st.sampled_from([None, 1.5]),
    st.sampled_from(AGGREGATIONS),
)
def test_policy_loss_equals_the_plain_loop(lengths, seed, level, correction, dual, aggregation):
    *x, sample_of = columns(lengths, seed)
    choice = {"level": level, "correction": correction, "cap": 1.2, "dual": dual, "aggregation": aggregation}
    over = Denominators(sum(lengths), len(lengths), 7)
    got = loss_of(*x, sample_of, torch.bincount(sample_of)[sample_of], over, **choice)
    expected = plain_loss(lengths, *[v.tolist() for v in x], **choice, max_tokens=7)
    assert got.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(0, 99), st.sampled_from(["token", "sequence"]), st.sampled_from(AGGREGATIONS), st.data())
def test_micro_batches_add_up(lengths, seed, level, aggregation, data):
    """Cutting the samples into micro-batches, in any order, changes neither loss nor gradient; at the level of tokens
    a sample may be cut as well."""
    *x, sample_of = columns(lengths, seed)
    x[0].requires_grad_()
    over = Denominators(sum(lengths), len(lengths), 7)
    choice = {"level": level, "correction": "truncate", "cap": 2.0, "dual": None, "aggregation": aggregation}
    tokens = torch.bincount(sample_of)[sample_of]
    whole = loss_of(*x, sample_of, tokens, over, **choice)
    (slope,) = torch.autograd.grad(whole, x[0])
    num = len(lengths) if level == "sequence" else len(sample_of)
    part_of = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num)))
    part_of = part_of[sample_of] if level == "sequence" else part_of
    total = torch.zeros((), dtype=torch.float64)
    for part in range(3):
        at = torch.nonzero(part_of == part)[:, 0]
        at = at[torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))]
        _, local = torch.unique(sample_of[at], return_inverse=True)
        total = total + loss_of(*[v[at] for v in x], local, tokens[at], over, **choice)
    (cut_slope,) = torch.autograd.grad(total, x[0])
    assert total.item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(cut_slope, slope, atol=1e-12)


def test_sequence_ratio_has_the_gradient_of_every_token():
    """GSPO-token: value s_i, and d s_i,t / d logp_t = s_i."""
    logp = torch.tensor([0.1, 0.5, -0.3], dtype=torch.float64, requires_grad=True)
    ratio = policy_ratio(logp, torch.zeros(3, dtype=torch.float64), torch.tensor([0, 0, 1]), "sequence")
    expected = [math.exp(0.3), math.exp(0.3), math.exp(-0.3)]
    assert ratio.tolist() == pytest.approx(expected)
    (slope,) = torch.autograd.grad(ratio.sum(), logp)
    assert slope.tolist() == pytest.approx(expected)


def test_extreme_ratios_stay_finite():
    logp = torch.tensor([0.0, -2000.0], requires_grad=True)
    ratio = policy_ratio(logp, torch.tensor([-3000.0, 0.0]), torch.tensor([0, 1]), "token")
    loss, is_clipped = clipped_loss(ratio, torch.zeros(2), 0.2, 0.2)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all()
    assert not is_clipped.any()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["none", "mask", "truncate"])
def test_no_correction_hides_a_nan(correction, level):
    """A server's NaN logprob must reach the loss, where it stops the update; it must not look like a masked token."""
    zeros, behaviour = torch.zeros(3), torch.tensor([0.0, math.nan, -9.0])
    weight = behaviour_weight(zeros, behaviour, torch.tensor([0, 1, 2]), level, correction, 2.0)
    assert [math.isnan(w) for w in weight.tolist()] == [False, True, False]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_values_and_gradients_are_those_of_the_divergence(estimator):
    """Over all tokens of a small distribution, weighed by their probability: value (k1, k3) and gradient of KL."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.4, -0.5, 0.2], dtype=torch.float64).log_softmax(0)
    exact = (logits.softmax(0) * (logits.log_softmax(0) - ref)).sum()
    (slope,) = torch.autograd.grad(exact, logits)
    logp = logits.log_softmax(0)
    weights = logits.softmax(0).detach()
    loss = (weights * kl_loss(logp, ref, estimator)).sum()
    (loss_slope,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(loss_slope, slope, atol=1e-12)
    assert loss.item() == pytest.approx((weights * kl_value(logp, ref, estimator)).sum().item())
    if estimator != "k2":
        assert loss.item() == pytest.approx(exact.item())


def test_kl_of_tokens_from_an_older_policy():
    """Weighed by policy / behaviour, samples of the behaviour policy give the policy's KL and its gradient."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([-0.5, 0.6, 0.1], dtype=torch.float64).log_softmax(0)
    ref = torch.tensor([0.1, 0.4, -0.5], dtype=torch.float64).log_softmax(0)
    exact = (logits.softmax(0) * (logits.log_softmax(0) - ref)).sum()
    logp = logits.log_softmax(0)
    importance = (logp - behaviour).exp().detach()
    loss = (behaviour.exp() * kl_loss(logp, ref, "k1", importance)).sum()
    assert loss.item() == pytest.approx(exact.item())
    slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, exact)]
    assert torch.allclose(*slopes, atol=1e-12)


def test_kl_formulas():
    d = torch.tensor([0.5, -1.0], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    assert kl_value(d, zero, "k1").tolist() == [0.5, -1.0]
    assert kl_value(d, zero, "k2").tolist() == [0.125, 0.5]
    assert kl_value(d, zero, "k3").tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2])
    assert torch.isfinite(kl_value(torch.tensor([-5000.0]), torch.tensor([0.0]), "k3")).all()
    close = torch.logspace(-9, -2, 500) * torch.tensor([1.0, -1.0]).repeat(250)
    found = kl_value(close - 2.0, torch.tensor(-2.0), "k3")
    exact = ((close - 2.0) - torch.tensor(-2.0)).double()
    torch.testing.assert_close(found, (exact**2 / 2 - exact**3 / 6 + exact**4 / 24).float(), rtol=1e-5, atol=0)
    assert (found >= 0).all()


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
    assert found.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-2)), 200.0])
