"""Running one task's episode to a list of sound trajectories, with retries. Called by executor.py and client.py."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace

from arealite.api.engine import InferenceEngine
from arealite.api.errors import ConfigError, DatasetError, RequestError, WorkflowError
from arealite.api.types import Group, Task, Trajectory
from arealite.api.workflow import RolloutWorkflow

# Running the episode again would end the same way.
NOT_RETRIED = (RequestError, ConfigError, DatasetError)


class EpisodeFailed(Exception):
    """The task has no usable trajectory. `reason` is one line for the ledger, `detail` the traceback."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


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
            trajectories = await workflow.arun_episode(engine, task)
            _check(trajectories)
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
            last_line = told.strip().splitlines()[-1]
            raise EpisodeFailed(f"{bad[0].status} for all {len(bad)} members: {last_line}", told)
        return trajectories


def usable(group: Group) -> Group:
    """The group with its "ok" trajectories only: what a filter looks at and what is trained on."""
    return replace(group, trajectories=[t for t in group.trajectories if t.status == "ok"])


def failed_group(task: Task, ordinal: int, failure: EpisodeFailed) -> Group:
    """A group that says why it has no answers, for callers that need one group per task."""
    trajectory = Trajectory(task.id, 0, [], [], [], [], None, "abort", status="failed", error=failure.detail)
    return Group(task, ordinal, [trajectory])


def _check(trajectories: list[Trajectory]) -> None:
    if not trajectories:
        raise WorkflowError("the workflow returned no trajectory; expected one per member of the group")
    for t in trajectories:
        lengths = {len(t.tokens), len(t.loss_mask), len(t.logprobs), len(t.versions)}
        if len(lengths) != 1:
            raise WorkflowError(
                f"member {t.member} has {len(t.tokens)} tokens, {len(t.loss_mask)} mask entries,"
                f" {len(t.logprobs)} logprobs and {len(t.versions)} versions; expected the same number of each"
            )
        if t.status == "ok" and (t.reward is None or not any(t.loss_mask)):
            raise WorkflowError(f'member {t.member} is "ok" without a reward, or without a token of the policy')
