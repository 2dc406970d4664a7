"""Rewards for mathematics: equality of answers, and GSM8K's final number. Called by scripts through reward/pool.py."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from arealite.reward.equality import math_equal
from arealite.reward.extraction import DENIAL, MAX_TEXT, Ungraded, extract_answer, last_box
from arealite.reward.number import NUMBER, plain
from arealite.reward.spelling import TooCostly, check_cost, normal

VALUE = rf"(?>({NUMBER.pattern})(?:\s*/\s*([1-9]\d*))?)"  # a number, or a fraction
# What follows the mark of a heading is text ("#### Step 2: add"), or a number that counts headings ("#### 2. Add").
FINAL_MARK = re.compile(rf"####[\s*$€£\\(]*{VALUE}(?![.:)]\s+\S)", re.A)
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d+\}?)?")
LEADING_SIGN = re.compile(r"^\s*([-+])\s+")
BOXED = r"\boxed{"


def math_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the completion's answer (`extract_answer`, policy `final`) equals `answer` (`math_equal`), else 0.0.

    `answer` may be bare LaTeX, or a solution with a box or `####`. A completion whose answer would cost too much to
    compare is Ungraded: 0.0, counted.

    Raises:
        ValueError: `answer` is empty, or beyond the limits of `math_equal`.
    """
    gold = _gold(answer)
    found = extract_answer(completion)
    try:
        return float(found is not None and math_equal(found, gold))
    except Exception:  # TooCostly, or what a library raises on what a model wrote; the gold answer has been read
        return Ungraded(0.0)


@lru_cache(maxsize=4096)
def _gold(answer: str) -> str:
    has_mark = BOXED in answer or FINAL_MARK.search(answer)
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
    """1.0 when the final number of the completion equals that of `answer`, else 0.0.

    The final number, or fraction, stands in the last \\boxed{} or right after the last `####`, whichever comes later,
    else it is the last number at all; `answer` may be GSM8K's whole solution.

    Raises:
        ValueError: `answer` holds no number.
    """
    expected = final_number(answer)
    if expected is None:
        raise ValueError(f"the task's answer is {answer!r}; expected a number, after #### in a solution")
    return float(final_number(completion) == expected)


def final_number(text: str) -> Fraction | None:
    """The result of a solution; None if it is no number, or a last line without a mark asks or denies it."""
    text = plain(UNIT.sub(" ", FRACTION.sub(r"\1/\2", text[-MAX_TEXT:])))
    *_, marked = [None, *FINAL_MARK.finditer(text)]
    if marked is not None and marked.start() > text.rfind(BOXED):
        return _value(marked)
    boxed, _ = last_box(text)
    if boxed is None:
        *_, text = ["", *(line for line in text.splitlines() if re.search(VALUE, line, re.A))]
        if DENIAL.search(text) or text.rstrip().endswith("?"):
            return None
    else:
        text = LEADING_SIGN.sub(r"\1", boxed)
    *_, last = [None, *re.finditer(VALUE, text, re.A)]
    return last and _value(last)


def _value(found: re.Match[str]) -> Fraction:
    return Fraction(Decimal(found[1].replace(",", ""))) / Fraction(Decimal(found[2] or 1))
