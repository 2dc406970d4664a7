"""Rewards for mathematics: equality of answers, and GSM8K's final number. Called by scripts through reward/pool.py."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from arealite.reward.equality import math_equal
from arealite.reward.extraction import BOX, HASHES, extract_answer, normal
from arealite.reward.formulas import TooCostly, check_cost
from arealite.reward.number import number_of
from arealite.reward.weighted import PartedReward


def math_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> PartedReward:
    """1.0 when the completion's answer (`extract_answer`, policy `final`) equals `answer` (`math_equal`), else 0.0.

    `answer` may be bare LaTeX, or a solution with a box or `####`. Part `ungraded`:
    1.0 where the answer would cost too much to compare, which earns 0.0; else 0.0, so that its mean is their share.

    Raises:
        ValueError: `answer` is empty, or beyond the limits of `math_equal`.
    """
    gold = _gold(answer)
    found = extract_answer(completion)
    try:
        return PartedReward(found is not None and math_equal(found, gold), ungraded=0.0)
    except Exception:  # TooCostly, or what a library raises on what a model wrote; the gold answer has been read
        return PartedReward(0.0, ungraded=1.0)


@lru_cache(maxsize=4096)
def _gold(answer: str) -> str:
    has_mark = BOX.search(answer) or HASHES.search(answer)
    gold = (extract_answer(answer, "marked") if has_mark else answer) or ""
    try:
        check_cost(gold)
    except TooCostly as error:
        raise ValueError(f"the task's answer {gold[:80]!r} cannot be compared: {error}") from error
    if not normal(gold):
        raise ValueError(f"the task's answer is {answer!r:.200}; expected a mathematical expression")
    return gold


def gsm8k_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the completion's answer and `answer` are the same number (`number_of` the `extract_answer` of both),
    else 0.0; `answer` may be GSM8K's whole solution.

    Raises:
        ValueError: `answer` holds no number.
    """
    expected = number_of(extract_answer(answer))
    if expected is None:
        raise ValueError(f"the task's answer is {answer!r}; expected a number, after #### in a solution")
    return float(number_of(extract_answer(completion)) == expected)
