"""Reward for answers that are one number in a short sentence (the quickstart's addition)."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

# A sign counts when it does not follow a word or a bracket ("5-7" holds 5 and 7).
NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"
)
MINUS = dict.fromkeys(map(ord, "\u2212\u2013\u2012\ufe63\uff0d"), "-")  # what typesetters use for it
CURRENCY = re.compile(r"([-+])\s*\\?[$€£]\s*(?=[\d.])")  # between the sign and its number
TEN_TO = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[\u00d7\u00b7*])\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})(?!\d)\s*\}?")


def plain(text: str) -> str:
    """Signs, thousands separators and powers of ten, as print and LaTeX have them, as `numbers_in` reads them."""
    text = CURRENCY.sub(r"\1", text.translate(MINUS).replace("{,}", ","))
    return TEN_TO.sub(r"e\1 ", text)


def numbers_in(text: str) -> list[Decimal]:
    """All decimal numbers in `text`, in order; commas between digits are thousands separators."""
    return [Decimal(match.replace(",", "")) for match in NUMBER.findall(plain(text))]


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
