"""Answers that are numbers: the number of an extracted answer, and a reward for short sentences (the quickstart).

Two rules, for two kinds of text. A solution has its answer at its end or behind a mark: extraction.py finds it, and
`number_of` reads it. A sentence says by "=" or "is" which of its numbers is the result, wherever that stands ("12 is
5 + 7"): `claimed_number`.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from arealite.reward.extraction import DENIAL, MAX_LENGTH, MINUS, QUESTION, last_box, normal

# A sign counts when it does not follow a word or a bracket ("5-7" holds 5 and 7).
NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?",
    re.A,
)
CURRENCY = re.compile(r"([-+])\s*\\?[$€£]\s*(?=[\d.])")  # between the sign and its number
TEN_TO = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[\u00d7\u00b7*])\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})(?!\d)\s*\}?")
FRACTION = re.compile(r"\\frac\{([-\d.]+)\}\{([-\d.]+)\}")
# The number that an answer begins with, after words or a currency; neither part of a formula nor one of several.
VALUE = re.compile(
    rf"[^\d\\^_{{}}]*?(?>((?a:{NUMBER.pattern}))(?:\s*/\s*((?a:[1-9]\d*)))?)"
    r"(?![a-zA-Z](?<![mghslL])(?![a-zA-Z])|\s*(?:[\\^_{!+*]|(?:[-+*/:.,;&~]|and\b|or\b|to\b)?\s*[-+$]?\d))"
)

MAX_LOOKED_AT = 20_000
SENTENCE = re.compile(r"(?:[^.!?\n]|\.(?=\d))+[.!?]?")
CLAIM = re.compile(r"=|\b(?:is|are|equals|makes|gives)\b")
EXPRESSION = re.compile(r"[\s\d.,()+*/x\u00d7-]*[+*/x\u00d7-][\s\d.,()+*/x\u00d7-]*")  # a sum repeated, no result


def plain(text: str) -> str:
    """Signs, thousands separators and powers of ten, as print and LaTeX have them, as `numbers_in` reads them."""
    text = CURRENCY.sub(r"\1", text.translate(MINUS).replace("{,}", ","))
    return TEN_TO.sub(r"e\1 ", text)


def numbers_in(text: str) -> list[Decimal]:
    """All decimal numbers in `text`, in order; commas between digits are thousands separators."""
    return [Decimal(match.replace(",", "")) for match in NUMBER.findall(plain(text))]


def number_of(answer: str | None) -> Fraction | None:
    """The number, or fraction, that an answer (`extract_answer`) says, on the last side of "=" that says one; None of
    anything else: a formula, a list, a choice ("5 or 6")."""
    if answer is None or len(answer) > MAX_LENGTH:
        return None
    text = re.sub(r"^\s*([-+])\s+", r"\1", plain(FRACTION.sub(r"\1/\2", normal(answer))))
    for side in reversed(text.split("=")):
        if value := VALUE.match(side):
            return Fraction(Decimal(value[1].replace(",", ""))) / int(value[2] or 1)
    return None


def number_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **extras: Any
) -> float:
    """1.0 when the number that the completion claims equals `answer`, else 0.0.

    A chat model answers "12", "5 + 7 = 12" or "12 is 5 + 7": the claim is the one number on a side of the last "=" or
    "is" of the last sentence with a number, else its last number. A sentence that asks or denies claims nothing.

    Raises:
        ValueError: `answer` holds no number.
    """
    expected = numbers_in(answer)
    if not expected:
        raise ValueError(f"the task's answer is {answer!r}; expected a number")
    return float(claimed_number(completion[-MAX_LOOKED_AT:]) == expected[-1])


def claimed_number(text: str) -> Decimal | None:
    """The number that a short text says is the result; None if it says none."""
    boxed, _ = last_box(text)
    if boxed is not None:
        text = re.sub(r"^-\s+", "-", boxed.translate(MINUS))
    sentences = [s for s in SENTENCE.findall(text) if NUMBER.search(s)]
    if not sentences or DENIAL.search(sentences[-1]) or sentences[-1].rstrip().endswith(QUESTION):
        return None
    *_, left, right = ["", "", *CLAIM.split(sentences[-1])]
    for side in (right, left):
        if len(numbers := numbers_in(side)) == 1:
            return numbers[0]
    return None if EXPRESSION.fullmatch(sentences[-1]) else numbers_in(sentences[-1])[-1]
