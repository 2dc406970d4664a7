"""pass@k and maj@k against plain enumeration of all draws."""

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.evaluation.metrics import majority_at_k, mean_and_stderr, pass_at_k


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


def slow_majority(answers, right, k):
    shares = []
    for draw in combinations(range(len(answers)), k):
        votes = Counter(answers[i] for i in draw if answers[i] is not None).most_common()
        tied = [answer for answer, n in votes if n == votes[0][1]]
        shares.append(np.mean([answer == right for answer in tied]) if tied else 0.0)
    return np.mean(shares)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["5", "6", "7", None]), min_size=1, max_size=7), st.data())
def test_majority_equals_enumeration(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    correct = [answer == "5" for answer in answers]
    assert majority_at_k(answers, correct, k) == pytest.approx(slow_majority(answers, "5", k))


def test_majority_of_many_samples_is_close_to_exact():
    answers = ["a"] * 60 + ["b"] * 40
    sampled = majority_at_k(answers, [a == "a" for a in answers], 5)
    exact = sum(comb(60, n) * comb(40, 5 - n) for n in (3, 4, 5)) / comb(100, 5)
    assert sampled == pytest.approx(exact, abs=0.02)


def test_majority_refuses_nonsense():
    with pytest.raises(ValueError, match="equally many"):
        majority_at_k(["a"], [], 1)
    with pytest.raises(ValueError, match="expected 1 .. 1"):
        majority_at_k(["a"], [True], 2)


def test_mean_and_stderr():
    assert mean_and_stderr([1.0, 0.0, 1.0, 0.0]) == pytest.approx((0.5, np.sqrt((1 / 3) / 4)))
    assert mean_and_stderr([2.0]) == (2.0, 0.0)
