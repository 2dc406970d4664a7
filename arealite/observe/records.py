"""The records of a run and their readers: metrics.jsonl, the rollouts of each step, the held-out answers and results.

Written by stats_logger.py and evaluation/evaluator.py; read by summary.py and by people.

metrics.jsonl is append-only. A run that goes on at step k after a restart first appends
{"event": "resumed", "step": k}, which voids the earlier lines of steps k and later; readers take `read_metrics`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from arealite.api.atomic import write_json, write_jsonl

if TYPE_CHECKING:
    from arealite.api.types import Group, Trajectory
    from arealite.observe.run_folder import RunFolder


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:  # empty, or cut off by a kill
            continue
    return [line for line in lines if isinstance(line, dict)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that count, one per step, in order of steps; none when there is no file.

    The last line of a step wins, and lines of steps that a resumed run did again are left out. A value that was NaN
    or infinite is None, and its name is in "nonfinite".
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in _lines(path):
        if line.get("event") == "resumed":
            by_step = {step: kept for step, kept in by_step.items() if step < line["step"]}
        elif "step" in line:
            by_step[line["step"]] = line
    return [by_step[step] for step in sorted(by_step)]


def num_restarts(path: Path) -> int:
    """How often the run of this metrics.jsonl was started again."""
    return sum(line.get("event") == "resumed" for line in _lines(path))


def version_spans(trajectory: Trajectory) -> list[list[int]]:
    """[[version, number of tokens], ...] of the generated tokens, in order."""
    generated = [v for v, m in zip(trajectory.versions, trajectory.loss_mask, strict=True) if m]
    return [[version, len(list(run))] for version, run in groupby(generated)]


def rollout_rows(groups: Iterable[Group], tokenizer: Any = None) -> list[dict[str, Any]]:
    """One JSON-ready row per trajectory. Texts that the workflow did not keep are decoded when a tokenizer is given."""
    rows = []
    for group in groups:
        for t in group.trajectories:
            prompt, completion = t.prompt_text, t.completion_text
            if tokenizer is not None:
                first = [*t.loss_mask, True].index(True)
                prompt = prompt or tokenizer.decode(t.tokens[:first])
                completion = completion or tokenizer.decode(t.tokens[first:])
            rows.append(
                {
                    "task": group.task.id,
                    "ordinal": group.ordinal,
                    "member": t.member,
                    "status": t.status,
                    "prompt": prompt,
                    "completion": completion,
                    "answer": group.task.answer,
                    "reward": t.reward,
                    "reward_parts": t.reward_parts,
                    "statistics": t.statistics,
                    "finish_reason": t.finish_reason,
                    "num_tokens": sum(t.loss_mask),
                    "versions": version_spans(t),
                    "error": t.error,
                }
            )
    return rows


def rollout_stats(groups: Sequence[Group]) -> dict[str, float]:
    """What the rollouts of one step say: counts, and means over the trajectories that have a reward.

    A trajectory without a reward is counted by its status and takes no part in any mean.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    scored = [t for t in trajectories if t.reward is not None]
    num_tokens = [sum(t.loss_mask) for t in scored]
    stats: dict[str, float] = {
        "num_groups": len(groups),
        "num_samples": len(scored),
        "num_samples_reward_error": sum(t.status == "reward_error" for t in trajectories),
        "num_samples_failed": sum(t.status in ("failed", "aborted") for t in trajectories),
        "num_completion_tokens": sum(num_tokens),
    }
    if not scored:
        return stats
    rewards = [{t.reward for t in group.trajectories if t.reward is not None} for group in groups]
    stats["num_groups_equal_rewards"] = sum(len(distinct) == 1 for distinct in rewards)
    stats["reward_std"] = float(np.std([t.reward or 0.0 for t in scored]))
    means: dict[str, list[Any]] = {
        "reward_mean": [t.reward for t in scored],
        "completion_tokens_mean": num_tokens,
        "truncated_share": [t.finish_reason == "length" for t in scored],
    }
    return stats | {name: float(np.mean(values)) for name, values in means.items()} | workflow_means(scored)


def workflow_means(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Means of the reward's parts (reward_part_<name>) and of the workflow's statistics (workflow_<name>), each over
    the trajectories that have it."""
    found: dict[str, list[float]] = {}
    for t in trajectories:
        named = [("reward_part", t.reward_parts), ("workflow", t.statistics)]
        for name, value in ((f"{kind}_{name}", value) for kind, values in named for name, value in values.items()):
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


@dataclass(frozen=True)
class EvaluationResult:
    """Held-out accuracy after `step` steps.

    `accuracy` is the mean over scored tasks of the task's mean reward, `low` to `high` its 95% interval over tasks
    (evaluation/statistics.py). Answers whose reward failed are in `num_reward_errors`, never a reward of 0; a task
    without any scored answer is in `num_tasks` but not in `num_tasks_scored`. `versions`: of the weights that wrote the
    answers. `pass_at[k]` is there for several samples per task. `means`: those of `workflow_means`. `why`: how many
    answers have no reward, by reason.
    """

    step: int
    accuracy: float
    low: float
    high: float
    num_tasks: int
    num_tasks_scored: int
    num_samples: int
    num_reward_errors: int
    num_failed: int
    evaluate_s: float
    versions: list[int] = field(default_factory=list)
    pass_at: dict[int, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    why: dict[str, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """What a line of metrics.jsonl says of it, as eval_<name>; the step is the one whose weights were asked."""
        accuracy = {"accuracy": self.accuracy, "accuracy_low": self.low, "accuracy_high": self.high}
        return {"step": self.step, **accuracy, **self.means}

    def line(self) -> Text:
        """What it found, for the person who watches the run."""
        scored = "" if self.num_tasks_scored == self.num_tasks else f"{self.num_tasks_scored} of "
        mixed = f"  by weights of several versions: {self.versions}" if len(self.versions) > 1 else ""
        chances = "".join(f"  pass@{k} {value:.3f}" for k, value in self.pass_at.items())
        return Text(
            f"held-out accuracy after {self.step} steps: {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}] on"
            f" {scored}{self.num_tasks} tasks{chances}  {self.evaluate_s:.0f} s{mixed}"
        )


def write_evaluation(folder: RunFolder, result: EvaluationResult, rows: list[dict[str, Any]]) -> None:
    """Answers first, the result last: a result on disk has its answers beside it. Raises OSError."""
    write_jsonl(folder.evaluation(result.step), rows)
    write_json(folder.evaluation(result.step).with_suffix(".json"), asdict(result))


def read_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """All held-out results in order of steps, as they were written: EvaluationResult's fields (with keys of `pass_at`
    as text), or the measures of a supervised run."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.evaluation_dir.glob("step_*.json")]
    return sorted(results, key=lambda result: result["step"])
