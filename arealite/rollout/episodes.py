"""Running one task's episode to a list of sound trajectories, with retries. Called by executor.py and client.py."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, SupportsFloat, get_args

import numpy as np

from arealite.api.errors import ConfigError, DatasetError, RequestError, WorkflowError
from arealite.api.protocols import InferenceEngine, RolloutWorkflow
from arealite.api.types import FinishReason, Group, Status, Task, Trajectory
from arealite.observe.reasons import last_line

# Running the episode again would end the same way.
NOT_RETRIED = (RequestError, ConfigError, DatasetError)
LOGPROB_SLACK = 1e-3  # of rounding, above 0


class EpisodeFailed(Exception):
    """The task has no usable trajectory. `reason` is one line for the ledger, `detail` the traceback, `trajectories`
    what there is, none of it "ok"."""

    def __init__(self, reason: str, detail: str, trajectories: Sequence[Trajectory] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.trajectories = trajectories


async def run_episode(
    engine: InferenceEngine,
    task: Task,
    workflow: RolloutWorkflow,
    num_retries: int,
    on_retry: Callable[[str], None] = lambda reason: None,
) -> list[Trajectory]:
    """The task's trajectories, at least one of them "ok". `on_retry(reason)` is called before each further try.

    Raises:
        EpisodeFailed: every try raised, or a reward failed for every member.
    """
    num_tries = 0
    while True:
        try:
            trajectories = _sound(task, await workflow.arun_episode(engine, task))
        except Exception as error:  # user code: whatever it raises is counted and reported, and must not end the run
            num_tries += 1
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
            if num_tries > num_retries or isinstance(error, NOT_RETRIED):
                raise EpisodeFailed(reason, traceback.format_exc()) from error
            on_retry(f"try {num_tries + 1} after {reason}")
            continue
        bad = [t for t in trajectories if t.status != "ok"]
        if len(bad) == len(trajectories):
            told = next((t.error for t in bad if t.error), "no error text")
            raise EpisodeFailed(f"{bad[0].status} for all {len(bad)} members: {last_line(told)}", told, bad)
        return trajectories


def usable(group: Group) -> Group:
    """The group with its "ok" trajectories only: what a filter looks at and what is trained on."""
    return replace(group, trajectories=[t for t in group.trajectories if t.status == "ok"])


def failed_group(task: Task, ordinal: int, failure: EpisodeFailed) -> Group:
    """A group that says why it has no answers, for callers that need one group per task."""
    trajectory = Trajectory(task.id, 0, [], [], [], [], None, "abort", status="failed", error=failure.detail)
    return Group(task, ordinal, [trajectory])


KINDS = {"tokens": "iu", "loss_mask": "biu", "logprobs": "fiu", "versions": "iu"}  # numpy's letters


def _sound(task: Task, trajectories: list[Trajectory]) -> list[Trajectory]:
    """The trajectories, all of them checked, in plain lists and numbers: logprob 0 and version -1 wherever a token was
    not generated. Raises WorkflowError."""
    if not isinstance(trajectories, list | tuple) or not all(isinstance(t, Trajectory) for t in trajectories):
        raise WorkflowError(f"the workflow returned {type(trajectories).__name__}; expected a list of Trajectory")
    if not trajectories:
        raise WorkflowError("the workflow returned no trajectory; expected one per member of the group")
    sound = []
    for t in trajectories:
        columns = {name: _column(task, t, name) for name in KINDS}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{n} {name}" for name, n in lengths.items())
            raise WorkflowError(f"task {task.id} member {t.member} has {told}; expected the same number of each")
        mask = columns["loss_mask"].astype(bool)
        if wrong := _wrong(task, t, mask, columns):
            raise WorkflowError(f"task {task.id} member {t.member} {wrong}")
        columns |= {"loss_mask": mask, "versions": np.where(mask, columns["versions"], -1)}
        columns["logprobs"] = np.where(mask, columns["logprobs"], 0.0)
        plain: dict[str, Any] = {name: column.tolist() for name, column in columns.items()}
        reward = None if t.reward is None else float(t.reward)
        parts = {str(name): float(value) for name, value in t.reward_parts.items()}
        try:
            statistics = {str(name): float(value) for name, value in t.statistics.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise WorkflowError(f"task {task.id} member {t.member}: statistics {t.statistics!r}: {error}") from error
        sound.append(replace(t, **plain, reward=reward, reward_parts=parts, statistics=statistics))
    return sound


def _column(task: Task, t: Trajectory, name: str) -> np.ndarray:
    try:
        column = np.asarray(getattr(t, name))
    except (TypeError, ValueError, RuntimeError) as error:  # lists in lists, a tensor with a gradient
        raise WorkflowError(f"task {task.id} member {t.member}: {name} cannot be read: {error}") from error
    if column.ndim != 1 or (column.size and column.dtype.kind not in KINDS[name]):
        found = f"{column.ndim} dimensions of {column.dtype}"
        raise WorkflowError(f"task {task.id} member {t.member}: {name} has {found}; expected a list of numbers")
    return column if column.size else column.astype(int)


def _wrong(task: Task, t: Trajectory, mask: np.ndarray, columns: dict[str, np.ndarray]) -> str | None:
    """What cannot be trained on; of a trajectory that is not "ok", what would make it look as if it could."""
    if t.task_id != task.id or t.status not in get_args(Status) or t.finish_reason not in get_args(FinishReason):
        return f"has task_id {t.task_id!r}, status {t.status!r}, finish_reason {t.finish_reason!r}: one is unknown"
    if t.status != "ok":
        return None if t.reward is None else f"is {t.status!r} with the reward {t.reward!r}; expected None"
    if bad := {name: r for name, r in [("reward", t.reward), *t.reward_parts.items()] if not _is_finite(r)}:
        return f'is "ok" with {bad}; expected finite numbers'
    if not mask.any() or mask[0] or (columns["loss_mask"] != mask).any():
        return 'is "ok" with a loss_mask that is all False, begins with True, or holds more than True and False'
    logprobs, versions, tokens = columns["logprobs"][mask], columns["versions"][mask], columns["tokens"]
    for name, found, is_wrong, expected in (
        ("logprob", logprobs, ~(np.isfinite(logprobs) & (logprobs < LOGPROB_SLACK)), "finite, at most 0"),
        ("version", versions, versions < 0, "that of the weights, from 0"),
        ("token", tokens, tokens < 0, "an id, from 0"),
    ):
        if is_wrong.any():
            return f"has the {name} {found[is_wrong][0]} ({is_wrong.sum()} such); expected {expected}"
    return None


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, SupportsFloat) and math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array or a tensor of several
        return False
