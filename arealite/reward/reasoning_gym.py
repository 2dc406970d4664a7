"""Reward of reasoning_gym tasks: the task's own verifier."""

from __future__ import annotations

from typing import Any

import reasoning_gym

from arealite.reward.format import answer_in_tags


def reasoning_gym_reward(
    prompt: str,
    completion: str,
    prompt_ids: list[int],
    completion_ids: list[int],
    *,
    answer: str,
    metadata: dict[str, Any],
    question: str = "",
    **extras: Any,
) -> float:
    """The verifier's score in [0, 1] of what stands in <answer> tags, or of the whole completion without them.

    `metadata` is that of the task's entry; its "source_dataset" names the verifier.
    """
    verifier = reasoning_gym.get_score_answer_fn(metadata["source_dataset"])
    entry = {"question": question, "answer": answer, "metadata": metadata}
    return float(verifier(answer_in_tags(completion).strip(), entry))
