"""Chunked logprobs against the whole [rows, vocabulary] computation, and the memory that they must not use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from arealite.engine.logprobs import token_logprobs

HIDDEN, VOCABULARY = 6, 37


def naive(hidden, weight, row_of, targets, temperature):
    logp = ((hidden @ weight.t()).float() / temperature).log_softmax(-1)
    return logp[row_of, targets], -(logp.exp() * logp).sum(-1)


def inputs(rows, pairs, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=g).to(dtype).requires_grad_()
    row_of = torch.randint(rows, (pairs,), generator=g).sort().values
    targets = torch.randint(VOCABULARY, (pairs,), generator=g)
    upstream = torch.randn(pairs, generator=g), torch.randn(rows, generator=g)
    return hidden, weight, row_of, targets, upstream


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 90),
    st.integers(0, 120),
    st.integers(0, 99),
    st.sampled_from([1, 7, 32, 40, 1000]),
    st.sampled_from([1.0, 0.6, 2.0]),
    st.booleans(),
)
def test_equals_the_whole_computation(rows, pairs, seed, chunk, temperature, with_entropy):
    hidden, weight, row_of, targets, (up_logp, up_entropy) = inputs(rows, pairs, seed)
    results = []
    for chunked in (True, False):
        if chunked:
            logp, entropy = token_logprobs(hidden, weight, row_of, targets, temperature, chunk)
        else:
            logp, entropy = naive(hidden, weight, row_of, targets, temperature)
        loss = (logp * up_logp).sum() + (entropy * up_entropy).sum() * with_entropy
        results.append([logp, entropy, *torch.autograd.grad(loss, (hidden, weight))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_gradients_by_finite_differences():
    hidden, weight, row_of, targets, (up_logp, up_entropy) = inputs(5, 7, 1)

    def loss(h):
        logp, entropy = token_logprobs(h, weight, row_of, targets, 0.8, 2)
        return (logp * up_logp).sum() + (entropy * up_entropy).sum()

    (slope,) = torch.autograd.grad(loss(hidden), hidden)
    step = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)) * 1e-2
    change = (loss(hidden + step) - loss(hidden - step)).item() / 2
    assert change == pytest.approx((slope * step).sum().item(), rel=1e-2)


def test_bfloat16_logits_are_those_of_the_head():
    hidden, weight, row_of, targets, _ = inputs(20, 20, 2, torch.bfloat16)
    got = token_logprobs(hidden, weight, row_of, targets, 1.0, 8)
    for x, expected in zip(got, naive(hidden, weight, row_of, targets, 1.0), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_never_exist_beyond_a_chunk():
    hidden, weight, row_of, targets, _ = inputs(200, 200, 3)
    with Largest() as largest:
        logp, entropy = token_logprobs(hidden, weight, row_of, targets, 1.0, 10)
        (logp.sum() + entropy.sum()).backward()
    assert largest.numel <= max(10 * VOCABULARY, hidden.numel(), weight.numel())
    with Largest() as largest:
        naive(hidden, weight, row_of, targets, 1.0)
    assert largest.numel == 200 * VOCABULARY
