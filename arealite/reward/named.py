"""The reward that a row itself names. Used where a script gives none: by trainer.py and `arealite eval`."""

from __future__ import annotations

from typing import Any

from arealite.reward.audit import find_reward


def named_reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, verifier: str, **row: Any
) -> Any:
    """What the function named `verifier` says: package.module:FUNCTION. Data sets of the catalog name theirs, rows of
    others may have a column of that name; so one run can mix mathematics, programs and puzzles.

    Raises ConfigError: there is no such function.
    """
    return find_reward(verifier)(prompt, completion, prompt_ids, completion_ids, **row)
