"""Statistics of evaluations against slow plain references: pass@k and maj@k by enumeration, intervals and verdicts by
simulation. Larger simulations: benchmarks/evaluation_statistics.py."""

from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.evaluation import statistics
from arealite.evaluation.statistics import (
    ALPHA,
    estimate,
    estimate_difference,
    is_decided,
    looks,
    majority_at_k,
    order,
    p_value,
    pass_at_k,
)

# -- pass@k and maj@k -------------------------------------------------------------------------------------------------


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


def majority_of_draws(samples, k):
    """Mean over all draws of k: the answers with the most votes share one point; each is worth its share of correct
    samples among all that gave it."""
    worth = {vote: np.mean([right for other, right in samples if other == vote]) for vote, _ in samples}
    total = 0.0
    draws = list(combinations(samples, k))
    for draw in draws:
        votes = Counter(vote for vote, _ in draw if vote is not None)
        best = [vote for vote, count in votes.items() if count == max(votes.values())]
        total += np.mean([worth[vote] for vote in best]) if best else 0.0
    return total / len(draws)


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.booleans()), min_size=1, max_size=8), st.data())
def test_majority_at_k_equals_enumeration(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    given_votes = Counter(vote for vote, _ in samples if vote is not None)
    votes = [(count, sum(right for other, right in samples if other == vote)) for vote, count in given_votes.items()]
    silent = sum(vote is None for vote, _ in samples)
    assert majority_at_k(votes, silent, k) == pytest.approx(majority_of_draws(samples, k))


def test_majority_at_1_is_the_mean_and_ties_are_shared():
    assert majority_at_k([(3, 3), (5, 0)], 0, 1) == pytest.approx(3 / 8)
    assert majority_at_k([(2, 2), (2, 0)], 0, 4) == pytest.approx(0.5)
    assert majority_at_k([(2, 2), (1, 0)], 5, 8) == pytest.approx(1.0)
    assert majority_at_k([], 4, 2) == 0.0


def test_majority_of_many_samples_stays_a_number():
    assert majority_at_k([(400, 400), (300, 0), (324, 0)], 0, 1024) == pytest.approx(1.0)
    assert 0.5 < majority_at_k([(600, 600), (424, 0)], 0, 64) < 1.0
    with pytest.raises(ValueError, match="k is 5"):
        majority_at_k([(4, 0)], 0, 5)


# -- intervals --------------------------------------------------------------------------------------------------------

RATES = (0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)


def problems(rng, size, rate, concentration):
    """Chances to solve each of `size` problems, drawn from a Beta distribution of mean `rate`."""
    return rng.beta(rate * concentration, (1 - rate) * concentration, size)


@pytest.mark.parametrize(("num_problems", "n", "concentration"), [(10, 1, 3), (30, 8, 0.5), (30, 32, 3), (100, 4, 1)])
def test_intervals_cover_95_percent(num_problems, n, concentration, monkeypatch):
    """On average over rates, few problems and rates near 0 and 1 among them: 0.95 within 1 point, and what 2,100
    evaluations leave to chance (half a point)."""
    monkeypatch.setattr(statistics, "NUM_DRAWS", 1500)
    rng = np.random.default_rng(5)
    covered = []
    for rate in RATES:
        for _ in range(300):
            found = estimate(rng.binomial(n, problems(rng, num_problems, rate, concentration)) / n)
            covered.append(found.low <= rate <= found.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_one_answer_per_problem_is_the_jeffreys_interval():
    """Quantiles of Beta(7.5, 23.5): 0.1090, 0.4074 (Brown, Cai and DasGupta 2001, for 7 of 30)."""
    found = estimate([1.0] * 7 + [0.0] * 23)
    rng = np.random.default_rng(9)
    low, high = np.quantile(rng.beta(7.5, 23.5, 400_000), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert found.mean == pytest.approx(7 / 30)


def test_intervals_at_the_ends_say_how_little_few_problems_tell():
    none, all_of_four = estimate([0.0] * 10), estimate([1.0] * 4)
    assert none.low == 0.0 and 0.15 < none.high < 0.30
    assert all_of_four.high == 1.0 and 0.4 < all_of_four.low < 0.75
    assert estimate([0.0] * 1000).high < 0.005


def test_samples_of_one_problem_are_not_problems():
    """32 answers to each of 10 problems, solved always or never, tell as little as one answer to each."""
    one, many = estimate([1.0] * 5 + [0.0] * 5), estimate([32 / 32] * 5 + [0 / 32] * 5)
    assert one == many and one.high - one.low > 0.5


def test_estimates_are_reproducible_and_refuse_nonsense():
    assert estimate([0.2, 0.4, 1.0]) == estimate([0.2, 0.4, 1.0])
    for values in ([], [0.5, 1.5]):
        with pytest.raises(ValueError, match="expected at least one value"):
            estimate(values)
    assert estimate([0.5, 1.5], high=2.0).high > 1.0


@pytest.mark.parametrize(("num_problems", "n"), [(20, 1), (50, 8)])
def test_intervals_of_differences_cover_95_percent(num_problems, n, monkeypatch):
    monkeypatch.setattr(statistics, "NUM_DRAWS", 1500)
    rng = np.random.default_rng(6)
    covered = []
    for rate in (0.1, 0.5, 0.9):
        for _ in range(500):
            first = problems(rng, num_problems, rate, 2)
            second = problems(rng, num_problems, rate, 2)  # another model, equally good on average
            found = estimate_difference((rng.binomial(n, first) - rng.binomial(n, second)) / n)
            covered.append(found.low <= 0 <= found.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


# -- which is better --------------------------------------------------------------------------------------------------


def all_signs(differences):
    """The p-value by plain enumeration of all signs."""
    d = np.array([x for x in differences if x])
    sums = np.array([np.dot(signs, d) for signs in product((-1, 1), repeat=len(d))])
    return np.mean(np.abs(sums) >= abs(d.sum()) - 1e-9)


@pytest.mark.parametrize(
    "differences",
    [[1, 1, 1, 1, 1, 1, -1, 0, 0], [0.25, -0.5, 0.75, 0.25, 1, 0.5, 0.25, 0.125], [0.1] * 9 + [-0.3], [1.0], [1, -1]],
)
def test_p_value_equals_enumeration(differences):
    assert p_value(differences) == pytest.approx(all_signs(differences), abs=0.012)


def test_p_value_of_many_problems():
    assert p_value([0.0] * 50) == 1.0
    assert p_value([1.0] * 300) == pytest.approx(1e-4)
    assert p_value([0.01] * 40 + [-0.01] * 40) == 1.0


def equal_pair(rng, num_problems, n):
    chances = problems(rng, num_problems, rng.uniform(0.05, 0.95), rng.choice([0.5, 2, 20]))
    return (rng.binomial(n, chances) - rng.binomial(n, chances)) / n


def test_wrong_verdicts_about_equal_pairs_are_at_most_5_percent(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_FLIPS", 1999)
    rng = np.random.default_rng(7)
    wrong = [
        p_value(equal_pair(rng, int(rng.choice([10, 40, 120])), int(rng.choice([1, 8])))) <= ALPHA for _ in range(1000)
    ]
    assert 0.01 < np.mean(wrong) <= 0.05


def decide(rng, first, second, n):
    """One sequential comparison of models with these chances per problem: (verdict or 0, share of the answers)."""
    size = len(first)
    right = [rng.random((size, n)) < chances[:, None] for chances in (first, second)]
    plan = list(order(size, n, seed=0))
    stops = looks(len(plan))
    for stop in stops:
        sums, counts = np.zeros(size), np.zeros(size)
        problem, sample = np.array(plan[:stop]).T
        np.add.at(sums, problem, right[1][problem, sample].astype(float) - right[0][problem, sample])
        np.add.at(counts, problem, 1)
        seen = counts > 0
        if is_decided(sums[seen] / counts[seen], len(stops)):
            return float(np.sign(sums.sum())), stop / len(plan)
    return 0.0, 1.0


def test_wrong_verdicts_under_sequential_stopping_are_at_most_5_percent(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_FLIPS", 1999)
    rng = np.random.default_rng(8)
    verdicts = []
    for _ in range(300):
        chances = problems(rng, 40, rng.uniform(0.1, 0.9), 2)
        verdicts.append(decide(rng, chances, chances, 4)[0] != 0)
    assert np.mean(verdicts) <= 0.05


def test_sequential_stopping_takes_at_most_40_percent_for_10_points():
    """Against the fixed design of 200 problems and 16 answers, of whose verdict there is no doubt."""
    rng = np.random.default_rng(9)
    shares = []
    for _ in range(20):
        first = np.clip(problems(rng, 200, 0.5, 2), 0.0, 0.9)
        verdict, share = decide(rng, first, first + 0.1, 16)
        assert verdict == 1.0
        shares.append(share)
    assert np.mean(shares) <= 0.4


def test_looks_double_and_every_beginning_is_balanced():
    assert looks(6400) == [200, 400, 800, 1600, 3200, 6400]
    assert looks(30) == [30] and looks(40) == [20, 40] and looks(3) == [3]
    plan = list(order(7, 3, seed=0))
    assert sorted(plan) == [(p, s) for p in range(7) for s in range(3)]
    assert {p for p, _ in plan[:7]} == set(range(7)) and [p for p, _ in plan[:7]] != list(range(7))
    counts = Counter(p for p, _ in plan[:10])
    assert max(counts.values()) - min(counts.values()) <= 1
    assert plan == list(order(7, 3, seed=0)) != list(order(7, 3, seed=1))
