"""The contract between the rollout head and a workflow: how one task becomes a group of trajectories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from arealite.api.engine import InferenceEngine
    from arealite.api.types import Task, Trajectory


@runtime_checkable
class RolloutWorkflow(Protocol):
    """Runs episodes. One instance serves many concurrent tasks, so it keeps no state per task."""

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        """All members of the task's group. An exception means the episode failed: it is retried, then counted and
        reported; a failed reward is a trajectory of status "reward_error", not an exception."""

    def close(self) -> None:
        """Release what the workflow owns (reward worker processes)."""
