"""Estimators over several answers to one task: pure functions of counts. Called by evaluator.py.

pass@k: Chen et al. 2021, "Evaluating Large Language Models Trained on Code". maj@k: Wang et al. 2022,
"Self-Consistency Improves Chain of Thought Reasoning in Language Models".
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from math import comb

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: unbiased for pass@k.

    Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}, expected 0 .. {num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}, expected 1 .. {num_samples} (the number of samples)")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(answers: Sequence[Hashable], correct: Sequence[bool], k: int) -> float:
    """Probability that the commonest answer among k of the samples, drawn without replacement, is correct.

    `answers[i]` is the extracted final answer of sample i (None: nothing could be extracted, never votes) and
    `correct[i]` its verdict. A tie is broken at random. Exact, over all subsets of size k, up to 10,000 subsets; the
    mean over 10,000 subsets drawn with a fixed seed above. Raises ValueError on unequal lengths or k out of range.
    """
    if len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers and {len(correct)} verdicts, expected equally many")
    if not 1 <= k <= len(answers):
        raise ValueError(f"k is {k}, expected 1 .. {len(answers)} (the number of samples)")
    num_subsets = 10_000
    if comb(len(answers), k) <= num_subsets:
        shares = [_majority(answers, correct, chosen) for chosen in combinations(range(len(answers)), k)]
    else:
        rng = np.random.default_rng(0)
        shares = [
            _majority(answers, correct, rng.choice(len(answers), k, replace=False).tolist()) for _ in range(num_subsets)
        ]
    return float(np.mean(shares))


def _majority(answers: Sequence[Hashable], correct: Sequence[bool], chosen: Sequence[int]) -> float:
    """Share of correct ones among the answers tied for the most votes."""
    votes: dict[Hashable, int] = {}
    verdicts: dict[Hashable, bool] = {}
    for i in chosen:
        if answers[i] is not None:
            votes[answers[i]] = votes.get(answers[i], 0) + 1
            verdicts[answers[i]] = correct[i]
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [verdicts[answer] for answer, n in votes.items() if n == most]
    return sum(tied) / len(tied)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation over the root of n; 0 for one value)."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("the mean of no values")
    stderr = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else 0.0
    return float(array.mean()), stderr
