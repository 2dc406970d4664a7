"""Rollouts as JSON rows for people to read, and the numbers of a step that come from its rollouts.

Used by stats_logger.py (what a step trained on) and evaluation/evaluator.py (held-out answers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from arealite.api.types import Group, Trajectory


class Decoder(Protocol):
    """The one call of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int]) -> str: ...


def version_spans(trajectory: Trajectory) -> list[list[int]]:
    """[[version, number of tokens], ...] of the generated tokens, in order."""
    generated = [v for v, m in zip(trajectory.versions, trajectory.loss_mask, strict=True) if m]
    return [[version, len(list(run))] for version, run in groupby(generated)]


def rollout_rows(groups: Iterable[Group], tokenizer: Decoder | None = None) -> list[dict[str, Any]]:
    """One JSON-ready row per trajectory. Texts the workflow did not keep are decoded when a tokenizer is given."""
    return [_row(group, t, tokenizer) for group in groups for t in group.trajectories]


def _row(group: Group, trajectory: Trajectory, tokenizer: Decoder | None) -> dict[str, Any]:
    first = trajectory.loss_mask.index(True) if True in trajectory.loss_mask else len(trajectory.tokens)
    prompt, completion = trajectory.prompt_text, trajectory.completion_text
    if tokenizer is not None:
        prompt = prompt or tokenizer.decode(trajectory.tokens[:first])
        completion = completion or tokenizer.decode(trajectory.tokens[first:])
    return {
        "task": group.task.id,
        "ordinal": group.ordinal,
        "member": trajectory.member,
        "status": trajectory.status,
        "prompt": prompt,
        "completion": completion,
        "answer": group.task.answer,
        "reward": trajectory.reward,
        "reward_parts": trajectory.reward_parts,
        "statistics": trajectory.statistics,
        "finish_reason": trajectory.finish_reason,
        "num_tokens": sum(trajectory.loss_mask),
        "versions": version_spans(trajectory),
        "error": trajectory.error,
    }


def rollout_stats(groups: Sequence[Group]) -> dict[str, float]:
    """What the rollouts of one step say: counts, and means over the trajectories that have a reward.

    A trajectory without a reward is counted by its status and takes no part in any mean.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    scored = [t for t in trajectories if t.reward is not None]
    out: dict[str, float] = {
        "num_groups": len(groups),
        "num_samples": len(scored),
        "num_samples_reward_error": sum(t.status == "reward_error" for t in trajectories),
        "num_samples_failed": sum(t.status in ("failed", "aborted") for t in trajectories),
        "num_completion_tokens": sum(sum(t.loss_mask) for t in scored),
    }
    if not scored:
        return out
    rewards = np.asarray([t.reward for t in scored], dtype=np.float64)
    out["reward_mean"], out["reward_std"] = float(rewards.mean()), float(rewards.std())
    out["completion_tokens_mean"] = float(np.mean([sum(t.loss_mask) for t in scored]))
    out["truncated_share"] = float(np.mean([t.finish_reason == "length" for t in scored]))
    spreads = [{t.reward for t in group.trajectories if t.reward is not None} for group in groups]
    out["num_groups_equal_rewards"] = sum(len(distinct) == 1 for distinct in spreads)
    for name in sorted({name for t in scored for name in t.reward_parts}):
        parts = [t.reward_parts[name] for t in scored if name in t.reward_parts]
        out[f"reward_part_{name}"] = float(np.mean(parts))
    for name in sorted({name for t in scored for name in t.statistics}):
        out[f"workflow_{name}"] = float(np.mean([t.statistics[name] for t in scored if name in t.statistics]))
    return out
