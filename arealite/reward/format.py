"""Reward for the shape of an answer, to be added to one for its content."""

from __future__ import annotations

import re
from typing import Any

THINK_ANSWER = re.compile(r"\s*<think>.+?</think>\s*<answer>.+?</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str = "", **extras: Any
) -> float:
    """1.0 for `<think>...</think><answer>...</answer>` with each tag once and nothing around, else 0.0."""
    once = all(completion.count(tag) == 1 for tag in TAGS)
    return float(once and THINK_ANSWER.fullmatch(completion) is not None)
