"""Rewards for mathematics: symbolic equality (math-verify), and GSM8K's final number."""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify

from arealite.reward.number import numbers_in

FINAL_MARK = re.compile(r"####\s*(.+)")
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
    gold = parse(f"${answer}$" if "$" not in answer and BOXED not in answer else answer, parsing_timeout=None)
    if not gold:
        raise ValueError(f"the task's answer is {answer!r}; expected a mathematical expression")
    found = parse(completion, parsing_timeout=None)
    return float(bool(found) and verify(gold, found, timeout_seconds=None, raise_on_error=True))


def gsm8k_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the final number of the completion equals that of `answer`, else 0.0.

    The final number stands after the last `####`, else in the last \\boxed{}, else it is the last number at all;
    `answer` may be GSM8K's whole solution.

    Raises:
        ValueError: `answer` holds no number.
    """
    expected = numbers_in(final_part(answer))
    if not expected:
        raise ValueError(f"the task's answer is {answer!r}; expected a number, after #### in a solution")
    found = numbers_in(final_part(completion))
    return float(bool(found) and found[-1] == expected[-1])


def final_part(text: str) -> str:
    """The part of a solution that holds its result."""
    marked = FINAL_MARK.findall(text)
    if marked:
        return marked[-1]
    at = text.rfind(BOXED)
    return text if at < 0 else _inside_braces(text[at + len(BOXED) :])


def _inside_braces(text: str) -> str:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return text
