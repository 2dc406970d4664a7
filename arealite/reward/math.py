"""Rewards for mathematics: symbolic equality (math-verify), and GSM8K's final number."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from math_verify import parse, verify
from sympy import Expr

from arealite.reward.number import MINUS, NUMBER, plain

VALUE = rf"(?>({NUMBER.pattern})(?:\s*/\s*([1-9]\d*))?)"  # a number, or a fraction
# What follows the mark of a heading is text ("#### Step 2: add"), or a number that counts headings ("#### 2. Add").
FINAL_MARK = re.compile(rf"####[\s*$€£\\(]*{VALUE}(?![.:)]\s+\S)")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d+\}?)?")
SCIENTIFIC = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][-+]?\d{1,2}(?!\w)")  # 1e-05, to LaTeX a product with e
SMALL = 1e-3  # below it, six decimals hold three digits or fewer
# Towers of powers and factorials whose digits would fill memory: not to be computed where none is expected.
HUGE = re.compile(r"\d{5,}\s*!|!\s*!|\^\s*\{?\s*-?\d+\s*\^|\^\s*\{?\s*-?\d{6,}")
LEADING_SIGN = re.compile(r"^\s*([-+])\s+")
BOXED = r"\boxed{"


def math_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the completion's final expression equals `answer` symbolically, else 0.0.

    Fractions, roots, sets, LaTeX and \\boxed are understood; `answer` may be bare LaTeX. An answer that cannot be
    parsed raises; a completion without an expression scores 0.0.

    Raises:
        ValueError: `answer` holds no expression.
    """
    # The library's own limits use signal.alarm, fail outside a main thread, and then return "wrong"; the worker's
    # hard limit replaces them, and errors are raised rather than scored 0.
    answer, completion = _latex(answer), _latex(completion)
    gold = parse(f"${answer}$" if "$" not in answer and BOXED not in answer else answer, parsing_timeout=None)
    if not gold:
        raise ValueError(f"the task's answer is {answer!r}; expected a mathematical expression")
    if BOXED in completion and HUGE.search(_last_box(completion)) and not HUGE.search(answer):
        return 0.0
    found = parse(completion, parsing_timeout=None)
    is_equal = bool(found) and verify(gold, found, timeout_seconds=None, raise_on_error=True)
    return float(is_equal and not _differ_below_rounding(gold[0], found[0]))


def _latex(text: str) -> str:
    """Signs, currencies and powers of ten so that the library reads them; a dollar without a partner is a currency."""
    text = text.translate(MINUS).replace(r"\$", "")
    text = SCIENTIFIC.sub(lambda number: f"{Decimal(number[0]):f}", text)
    return text.replace("$", "") if text.count("$") == 1 else text


def _differ_below_rounding(one: Any, other: Any) -> bool:
    """Whether two numbers are so small that the library, which rounds to six decimals, does not see them differ."""
    if not all(isinstance(x, Expr) and x.is_number and x.is_real for x in (one, other)):
        return False
    largest = max(abs(one), abs(other))
    return bool(largest < SMALL and abs(one - other) > largest / 1000)


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
    """The result of a solution; None if it is no number."""
    text = plain(UNIT.sub(" ", FRACTION.sub(r"\1/\2", text)))
    *_, marked = [None, *FINAL_MARK.finditer(text)]
    if marked is not None and marked.start() > text.rfind(BOXED):
        return _value(marked)
    if BOXED in text:
        text = LEADING_SIGN.sub(r"\1", _last_box(text))
    *_, last = [None, *re.finditer(VALUE, text)]
    return last and _value(last)


def _value(found: re.Match[str]) -> Fraction:
    return Fraction(Decimal(found[1].replace(",", ""))) / Fraction(Decimal(found[2] or 1))


def _last_box(text: str) -> str:
    """What is inside the last box of a text that has one."""
    text = text.rpartition(BOXED)[2]
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return text
