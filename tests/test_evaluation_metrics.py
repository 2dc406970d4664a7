"""pass@k against plain enumeration of all draws."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.evaluation.evaluator import mean_and_stderr, pass_at_k


def share_of_draws(verdicts, k):
    """Share of the draws of k out of all that hold a correct one."""
    draws = list(combinations(verdicts, k))
    return sum(any(draw) for draw in draws) / len(draws)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_equals_enumeration(verdicts, data):
    k = data.draw(st.integers(1, len(verdicts)))
    assert pass_at_k(len(verdicts), sum(verdicts), k) == pytest.approx(share_of_draws(verdicts, k))


def test_pass_at_k_is_unbiased():
    p, n, k, rng = 0.3, 8, 4, np.random.default_rng(1)
    estimates = [pass_at_k(n, int(rng.binomial(n, p)), k) for _ in range(20_000)]
    assert np.mean(estimates) == pytest.approx(1 - (1 - p) ** k, abs=0.006)


def test_pass_at_k_is_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 1, 5) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_nonsense(n, c, k):
    with pytest.raises(ValueError, match="expected"):
        pass_at_k(n, c, k)


def test_mean_and_stderr():
    assert mean_and_stderr([1.0, 0.0, 1.0, 0.0]) == pytest.approx((0.5, np.sqrt((1 / 3) / 4)))
    assert mean_and_stderr([2.0]) == (2.0, 0.0)
