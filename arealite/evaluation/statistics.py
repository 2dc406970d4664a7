"""What answers to a sample of problems say about a model: pass@k, majority votes, intervals, comparisons, when to stop.

Called by figures.py, asking.py and evaluator.py. Pure. The problem is the unit everywhere: answers to one problem are
not independent of each other, so each problem gives one value, and what is uncertain is the mean over problems like
these. Random numbers are drawn from fixed seeds: the same values give the same intervals and verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, comb, lgamma, log

import numpy as np

LEVEL = 0.95
ALPHA = 0.05
NUM_DRAWS = 4_000  # of the posterior, for an interval
NUM_FLIPS = 9_999  # of signs, for a p-value
NUM_LOOKS = 6
MIN_LOOK = 16  # answers of each side at the first look
BLOCK = 64  # problems whose random numbers exist at one time


@dataclass(frozen=True)
class Estimate:
    """A mean over `num_problems` problems and its interval."""

    mean: float
    low: float
    high: float
    num_problems: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: unbiased for pass@k.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code". Raises ValueError unless
    0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}, expected 0 .. {num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}, expected 1 .. {num_samples} (the number of samples)")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(votes: Sequence[tuple[int, int]], num_silent: int, k: int) -> float:
    """Probability that the majority of k of the samples, drawn without replacement, is right: unbiased for maj@k.

    `votes`: for each distinct answer how many samples gave it, and how many of these count as correct; `num_silent`
    samples gave none and do not vote. Among answers that tie for the most votes each is chosen with the same
    probability; of the chosen answer, a random one of its samples is graded; where nobody votes, it is wrong.

    For each answer and each number of votes t that it may win with: the chance of t, times that of all others' having
    at most t, with 1 / (1 + ties) for those that have t too. Counts drawn without replacement are independent binomials
    of any one probability, given that they add up to k; with k / n, none of the terms is large. Raises ValueError
    unless 1 <= k <= samples.
    """
    num_samples = sum(count for count, _ in votes) + num_silent
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}, expected 1 .. {num_samples} (the number of samples)")
    share, total = k / num_samples, 0.0
    right: dict[int, float] = {}  # answers with as many votes win as often: how much of them is right
    for count, num_correct in votes:
        right[count] = right.get(count, 0.0) + num_correct / count
    for count, worth in right.items():
        own, others = _binomial(count, share), [other for other, _ in votes]
        others.remove(count)
        for t in range(1, min(count, k) + 1 if worth else 1):
            total += worth * own[t] * _wins(others, num_silent, t, k - t, share)
    return float(min(1.0, total / _binomial(num_samples, share)[k]))


def _wins(others: list[int], num_silent: int, t: int, num_left: int, share: float) -> float:
    """Sum over the draws of `num_left` samples in which nobody has more than `t`, each by 1 / (1 + how many have t)."""
    ways = np.zeros((num_left // t + 1, num_left + 1))  # [who have t][samples drawn]
    silent = _binomial(num_silent, share)[: num_left + 1]
    ways[0, : len(silent)] = silent
    for count in others:
        pmf, grown = _binomial(count, share), np.zeros_like(ways)
        for drawn in range(min(t, count + 1, num_left + 1)):
            grown[:, drawn:] += pmf[drawn] * ways[:, : num_left + 1 - drawn]
        if t <= min(count, num_left):
            grown[1:, t:] += pmf[t] * ways[:-1, : num_left + 1 - t]
        ways = grown
    return float(np.sum(ways[:, num_left] / np.arange(1, len(ways) + 1)))


@lru_cache(maxsize=4096)
def _binomial(n: int, p: float) -> np.ndarray:
    """Probabilities of 0 .. n, float64 [n + 1]."""
    if p == 1.0:
        return np.eye(1, n + 1, n)[0]
    logs = [lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) + i * log(p) + (n - i) * log(1 - p) for i in range(n + 1)]
    return np.exp(logs)


def estimate(values: Sequence[float] | np.ndarray, low: float = 0.0, high: float = 1.0) -> Estimate:
    """The mean of one value per problem, each between `low` and `high`, with its 95% interval.

    The interval holds the middle 95% of the mean's posterior under a Dirichlet process (Ferguson 1973) whose prior is
    half a problem at `low` and half a problem at `high`: the Bayesian bootstrap (Rubin 1981) with two more problems of
    half a weight. With one right-or-wrong answer per problem it is the Jeffreys interval for a proportion (Brown, Cai
    and DasGupta 2001). So it holds for few problems and near 0 and 1, where standard errors do not, and nothing is
    assumed of how problems differ. benchmarks/evaluation_statistics.py measures its coverage. With `low` and `high`
    outside the values it is wider than need be. Raises ValueError: no value, or one out of bounds.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size or array.min() < low or array.max() > high:
        raise ValueError(f"expected at least one value, each from {low} to {high}; found {array.size}: {array!r:.200}")
    return _posterior(array, low, high)


def estimate_difference(differences: Sequence[float] | np.ndarray) -> Estimate:
    """As `estimate`, of one difference per problem. The half problems of the prior are as far from 0 as those problems
    are, in root mean square, whose difference is not 0 (1 if there is none): with one answer each, that is 1."""
    array = np.asarray(differences, dtype=np.float64)
    apart = array[array != 0]
    size = float(np.sqrt(np.mean(apart**2))) if apart.size else 1.0
    return _posterior(array, -size, size)


def _posterior(array: np.ndarray, low: float, high: float) -> Estimate:
    rng = np.random.default_rng(0)
    prior = rng.gamma(0.5, size=(NUM_DRAWS, 2))
    sums, weights = prior @ np.array([low, high]), prior.sum(1)
    for start in range(0, len(array), BLOCK):
        part = rng.exponential(size=(NUM_DRAWS, min(BLOCK, len(array) - start)))
        sums += part @ array[start : start + BLOCK]
        weights += part.sum(1)
    edges = np.quantile(sums / weights, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = float(array.mean())
    return Estimate(mean, min(mean, float(edges[0])), max(mean, float(edges[1])), len(array))


def p_value(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of no difference, from one difference per problem: how often the sum is as far from 0 when each
    difference gets a random sign (Fisher 1935; Monte Carlo as Phipson and Smyth 2010, so that it is never too small).

    It is exact where both sides are equally good at each problem, whatever the number of problems, and holds for
    equal means as the number grows. With one answer per problem it is McNemar's exact test.
    """
    array = np.asarray(differences, dtype=np.float64)
    array = array[array != 0]
    rng = np.random.default_rng(1)
    sums = np.full(NUM_FLIPS, -array.sum())
    for start in range(0, len(array), BLOCK):
        part = array[start : start + BLOCK]
        bits = np.frombuffer(rng.bytes(NUM_FLIPS * BLOCK // 8), np.uint8).reshape(NUM_FLIPS, -1)
        sums += 2.0 * (np.unpackbits(bits, axis=1)[:, : len(part)].astype(np.float64) @ part)
    slack = 1e-9 * np.abs(array).sum()  # of rounding: a sum that is as far counts
    num_as_far = int(np.sum(np.abs(sums) >= abs(array.sum()) - slack))
    return (1 + num_as_far) / (1 + NUM_FLIPS)


def looks(num_answers: int) -> list[int]:
    """After how many answers of each side, of `num_answers` in the sequence of `order`, a comparison is looked at: all
    of them, half, a quarter ... in rising order, but not before MIN_LOOK of them."""
    sizes = {ceil(num_answers / 2**i) for i in range(NUM_LOOKS)}
    return sorted(size for size in sizes if size == num_answers or size >= MIN_LOOK)


def order(num_problems: int, num_samples: int, seed: int) -> Iterator[tuple[int, int]]:
    """(problem, sample) of all answers: the first sample of every problem, in a random order of the problems, then the
    second of each, so that any beginning is a random sample of problems, or has almost equally many answers to each."""
    problems = np.random.default_rng([seed, num_problems]).permutation(num_problems)
    for sample in range(num_samples):
        yield from ((int(problem), sample) for problem in problems)


def is_decided(differences: Sequence[float] | np.ndarray, num_looks: int) -> bool:
    """Whether one of `num_looks` planned looks tells which side is better, so that with probability ALPHA at most any
    of them is wrong about sides that are equal.

    Each look spends the same part of ALPHA (alpha spending: Lan and DeMets 1983, here under the union bound, which
    holds however the looks depend on each other).
    """
    return p_value(differences) <= ALPHA / num_looks
