"""Results of evaluations in the run folder: one small JSON and one JSONL of answers per evaluated step.

Written by evaluation/evaluator.py; read by plot.py and summary.py, also after a resume.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.text import Text

from arealite.api.atomic import read_jsonl, write_json, write_jsonl

if TYPE_CHECKING:
    from arealite.observe.run_folder import RunFolder


@dataclass(frozen=True)
class EvaluationResult:
    """Held-out accuracy after `step` steps.

    `accuracy` is the mean over scored tasks of the task's mean reward, `stderr` its standard error over tasks (0 for
    one task). Answers whose reward failed are in `num_reward_errors`, never a reward of 0; a task without any scored
    answer is in `num_tasks` but not in `num_tasks_scored`. `pass_at[k]` is there for several samples per task. `why`:
    how many answers have no reward, by reason.
    """

    step: int
    accuracy: float
    stderr: float
    num_tasks: int
    num_tasks_scored: int
    num_samples: int
    num_reward_errors: int
    num_failed: int
    evaluate_s: float
    pass_at: dict[int, float] = field(default_factory=dict)
    why: dict[str, int] = field(default_factory=dict)

    def line(self) -> Text:
        """What it found, for the person who watches the run."""
        scored = "" if self.num_tasks_scored == self.num_tasks else f"{self.num_tasks_scored} of "
        chances = "".join(f"  pass@{k} {value:.3f}" for k, value in self.pass_at.items())
        return Text(
            f"held-out accuracy after {self.step} steps: {self.accuracy:.3f} ± {self.stderr:.3f} on"
            f" {scored}{self.num_tasks} tasks{chances}  {self.evaluate_s:.0f} s"
        )


def write_evaluation(folder: RunFolder, result: EvaluationResult, rows: list[dict[str, Any]]) -> None:
    """Answers first, the result last: a result on disk has its answers beside it. Raises OSError."""
    write_jsonl(folder.evaluation(result.step), rows)
    write_json(folder.evaluation(result.step).with_suffix(".json"), asdict(result))


def read_evaluations(folder: RunFolder) -> list[EvaluationResult]:
    """All results in order of steps."""
    out = []
    for path in folder.evaluation_dir.glob("step_*.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["pass_at"] = {int(k): value for k, value in fields["pass_at"].items()}
        out.append(EvaluationResult(**fields))
    return sorted(out, key=lambda result: result.step)


def read_answers(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    """The rows of one evaluation (rollout_log.rollout_rows); none when it was not made."""
    return read_jsonl(folder.evaluation(step))
