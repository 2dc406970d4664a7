"""The rollout head's part of a recovery point, to JSON and back. Used by executor.py and client.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arealite.api.errors import RecoveryError
from arealite.api.types import Group, Task, Trajectory, as_record


@dataclass(frozen=True)
class WaitingTask:
    """A task that was issued, and is not finished."""

    ordinal: int
    task: Task


@dataclass(frozen=True)
class ExecutorState:
    """`ready`: finished groups not yet trained on, each with the version at which it was started. `ledger_bytes`:
    length of the ledger at this point; later lines are void after a recovery."""

    version: int
    num_issued: int
    num_consumed: int
    num_steps: int
    ledger_bytes: int
    waiting: list[WaitingTask]
    ready: list[tuple[int, Group]]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "num_issued": self.num_issued,
            "num_consumed": self.num_consumed,
            "num_steps": self.num_steps,
            "ledger_bytes": self.ledger_bytes,
            "waiting": [{"ordinal": w.ordinal, "task": as_record(w.task)} for w in self.waiting],
            "ready": [{"started_version": version, "group": as_record(group)} for version, group in self.ready],
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> ExecutorState:
        """Raises RecoveryError when a part is missing."""
        try:
            return cls(
                version=state["version"],
                num_issued=state["num_issued"],
                num_consumed=state["num_consumed"],
                num_steps=state["num_steps"],
                ledger_bytes=state["ledger_bytes"],
                waiting=[WaitingTask(w["ordinal"], Task(**w["task"])) for w in state["waiting"]],
                ready=[(r["started_version"], _group(r["group"])) for r in state["ready"]],
            )
        except (KeyError, TypeError) as error:
            raise RecoveryError(f"the rollout state of this recovery point cannot be read: {error!r}") from error


def _group(record: dict[str, Any]) -> Group:
    trajectories = [Trajectory(**t) for t in record["trajectories"]]
    return Group(Task(**record["task"]), record["ordinal"], trajectories)
