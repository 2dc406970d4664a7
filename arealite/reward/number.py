"""Reward for answers that are one number in a short sentence (the quickstart's addition)."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

# A sign counts when it does not follow a word or a bracket ("5-7" holds 5 and 7).
NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def numbers_in(text: str) -> list[Decimal]:
    """All decimal numbers in `text`, in order; commas between digits are thousands separators."""
    return [Decimal(match.replace(",", "")) for match in NUMBER.findall(text)]


def number_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the first or the last number of the completion equals `answer`, else 0.0.

    First or last, because a chat model answers "12" as well as "5 + 7 = 12".

    Raises:
        ValueError: `answer` holds no number.
    """
    expected = numbers_in(answer)
    if not expected:
        raise ValueError(f"the task's answer is {answer!r}; expected a number")
    found = numbers_in(completion)
    return float(bool(found) and expected[-1] in (found[0], found[-1]))
