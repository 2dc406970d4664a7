"""Running one task's episode to a list of sound trajectories, with retries. Called by executor.py and client.py."""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, SupportsFloat, get_args

import numpy as np

from arealite.api.errors import ConfigError, DatasetError, RequestError, WorkflowError
from arealite.api.protocols import InferenceEngine, RolloutWorkflow
from arealite.api.types import FinishReason, Group, Status, Task, Trajectory
from arealite.observe.reasons import last_line, reasons

NOT_RETRIED = (RequestError, ConfigError, DatasetError)  # running the episode again would end the same way
LOGPROB_SLACK = 1e-3  # of rounding, above 0
KINDS = {"tokens": "iu", "loss_mask": "biu", "logprobs": "fiu", "versions": "iu"}  # numpy's letters
KINDS_OF_ROWS = {"row_lengths": "iu", "returns": "fiu"}


class EpisodeFailed(Exception):
    """The task has no usable trajectory. `reason` is one line for the ledger, `detail` the traceback, `trajectories`
    what there is, none of it "ok"."""

    def __init__(self, reason: str, detail: str, trajectories: Sequence[Trajectory] = ()) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.trajectories = reason, detail, trajectories


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
        if any(t.status == "ok" for t in trajectories):
            return trajectories
        detail = next((t.error for t in trajectories if t.error), "no error text")
        whole = f"{trajectories[0].status} for all {len(trajectories)} members: {last_line(detail)}"
        raise EpisodeFailed(whole, detail, trajectories)


async def run_alone(
    engine: InferenceEngine, ordinal: int, task: Task, workflow: RolloutWorkflow, num_retries: int
) -> Group:
    """The task's group, outside of any step; of a task that failed one trajectory of status "failed" with the error."""
    try:
        trajectories = await run_episode(engine, task, workflow, num_retries)
    except EpisodeFailed as failure:
        reasons.tell("failed", failure.reason)
        trajectories = [Trajectory(task.id, 0, [], [], [], [], None, "abort", "failed", error=failure.detail)]
    return Group(task, ordinal, trajectories)


async def all_members(
    num_members: int, run_member: Callable[[int], Coroutine[Any, Any, Trajectory]]
) -> list[Trajectory]:
    """What the members of a group become, in order of their numbers; for workflows. Where one raises, or the episode is
    cancelled, the others are cancelled and have ended on return: their answers are of no use."""
    members = [asyncio.ensure_future(run_member(i)) for i in range(num_members)]
    try:
        return await asyncio.gather(*members)
    finally:
        for member in members:
            member.cancel()
        await asyncio.gather(*members, return_exceptions=True)


def _sound(task: Task, trajectories: list[Trajectory]) -> list[Trajectory]:
    """The trajectories, all of them checked, in plain lists and numbers: logprob 0 and version -1 wherever a token was
    not generated. Raises WorkflowError."""
    if not isinstance(trajectories, list | tuple) or not all(isinstance(t, Trajectory) for t in trajectories):
        raise WorkflowError(f"the workflow returned {type(trajectories).__name__}; expected a list of Trajectory")
    if not trajectories:
        raise WorkflowError("the workflow returned no trajectory; expected one per member of the group")
    sound = []
    for t in trajectories:
        try:
            columns = {name: _column(name, values) for name, values in vars(t).items() if name in KINDS}
            if len({len(column) for column in columns.values()}) != 1:
                sizes = ", ".join(f"{len(columns[name])} {name}" for name in KINDS)
                raise ValueError(f"has {sizes}; expected the same number of each")
            mask = columns["loss_mask"].astype(bool)
            rows, returns = _column("row_lengths", t.row_lengths), _column("returns", t.returns)
            _check(task, t, mask, columns)
            _check_rows(t, mask, rows, returns)
            columns["versions"] = np.where(mask, columns["versions"], -1)
            columns["logprobs"] = np.where(mask, columns["logprobs"], 0.0)
            plain: dict[str, Any] = {name: column.tolist() for name, column in (columns | {"loss_mask": mask}).items()}
            plain["row_lengths"] = rows.tolist()
            plain["returns"] = np.where(mask, returns, 0.0).tolist() if len(returns) else []
            plain["reward"] = None if t.reward is None else float(t.reward)
            for name, numbers in (("reward_parts", t.reward_parts), ("statistics", t.statistics)):
                try:
                    plain[name] = {str(key): float(value) for key, value in numbers.items()}
                except (ValueError, TypeError, RuntimeError) as error:
                    raise ValueError(f"has the {name} {numbers!r}: {error}") from error
        except (ValueError, TypeError, RuntimeError) as error:  # lists in lists, a tensor with a gradient, words
            raise WorkflowError(f"task {task.id} member {t.member} {error}") from error
        sound.append(replace(t, **plain))
    return sound


def _column(name: str, values: Any) -> np.ndarray:
    """One dimension of numbers. Raises ValueError."""
    try:
        column = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if column.ndim != 1 or (column.size and column.dtype.kind not in (KINDS | KINDS_OF_ROWS)[name]):
        raise ValueError(f"{name} has {column.ndim} dimensions of {column.dtype}; expected a list of numbers")
    return column if column.size else column.astype(int)


def _check(task: Task, t: Trajectory, mask: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """Raises ValueError: it cannot be trained on, or is not "ok" and looks as if it could."""
    if t.task_id != task.id or t.status not in get_args(Status) or t.finish_reason not in get_args(FinishReason):
        raise ValueError(
            f"has task_id {t.task_id!r}, status {t.status!r}, finish_reason {t.finish_reason!r}: one is unknown"
        )
    if t.status != "ok":
        if t.reward is not None:
            raise ValueError(f"is {t.status!r} with the reward {t.reward!r}; expected None")
        return
    if bad := {name: r for name, r in [("reward", t.reward), *t.reward_parts.items()] if not _is_finite(r)}:
        raise ValueError(f'is "ok" with {bad}; expected finite numbers')
    if not mask.any() or mask[0] or (columns["loss_mask"] != mask).any():
        raise ValueError(
            'is "ok" with a loss_mask that is all False, begins with True, or holds more than True and False'
        )
    logprobs, versions, tokens = columns["logprobs"][mask], columns["versions"][mask], columns["tokens"]
    for name, values, is_wrong, expected in (
        ("logprob", logprobs, ~(np.isfinite(logprobs) & (logprobs < LOGPROB_SLACK)), "finite, at most 0"),
        ("version", versions, versions < 0, "that of the weights, from 0"),
        ("token", tokens, tokens < 0, "an id, from 0"),
    ):
        if is_wrong.any():
            raise ValueError(f"has the {name} {values[is_wrong][0]} ({is_wrong.sum()} such); expected {expected}")


def _check_rows(t: Trajectory, mask: np.ndarray, rows: np.ndarray, returns: np.ndarray) -> None:
    """Raises ValueError: not the whole of the tokens is in rows that can be trained on, or has a return."""
    if len(rows) and (rows.min() < 1 or rows.sum() != len(mask)):
        raise ValueError(f"has {len(mask)} tokens in row_lengths {rows.tolist()}; expected lengths from 1 of that sum")
    begins = np.cumsum([0, *rows[:-1]]) if len(mask) else rows
    if t.status == "ok" and (bad := np.flatnonzero(mask[begins])).size:
        raise ValueError(f"begins row {bad[0]} with True in the loss_mask; expected False: nothing predicts that token")
    if len(returns) and (len(returns) != len(mask) or not np.isfinite(returns[mask]).all()):
        raise ValueError(f"has {len(returns)} returns for {len(mask)} tokens; expected none, or a finite one for each")


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, SupportsFloat) and math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array or a tensor of several
        return False
