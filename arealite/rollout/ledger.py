"""The life line of every task: an append-only file of JSON lines, issued -> generating -> rewarded -> consumed ->
trained, or dropped with the reason. Written by executor.py on trainer rank 0; `audit` reads it back and says where each
task stands, and whether any was lost or used twice (tests, and whoever doubts a run).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Event = Literal["issued", "generating", "rewarded", "consumed", "trained", "dropped"]

# event -> the states from which it may follow
ALLOWED: dict[str, set[str | None]] = {
    "issued": {None},
    "generating": {"issued", "generating", "rewarded"},  # again after a retry, a recovery, or for being too old
    "rewarded": {"generating"},
    "consumed": {"rewarded"},
    "trained": {"consumed"},
    "dropped": {"issued", "generating", "rewarded", "consumed"},
}


class Ledger:
    """Appends events to `path`; with None they are not kept (a client outside a run).

    Each event is one write of one whole line, so a kill leaves at most one torn line at the end. A file that an
    earlier attempt left behind is voided from byte 0, unless `resume` says how much of it a recovery point vouches for.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None

    def record(
        self, task_id: str, event: Event, version: int | None = None, step: int | None = None, reason: str | None = None
    ) -> None:
        self._open()
        line = {"task": task_id, "event": event, "version": version, "step": step, "reason": reason}
        self._append({key: value for key, value in line.items() if value is not None})

    def resume(self, kept_bytes: int, step: int) -> None:
        """Before anything is recorded: void what was written after the recovery point of `step` finished steps, whose
        `num_bytes` was given."""
        self._open(kept_bytes, step)

    def num_bytes(self) -> int:
        """Length of the file: what is written later is void if the run recovers from here."""
        self._open()
        return 0 if self._file is None else os.fstat(self._file).st_size

    def close(self) -> None:
        """Nothing is kept from now on: a late line would stand for a task that was dropped already."""
        if self._file is not None:
            os.close(self._file)
        self._path = self._file = None

    def _open(self, kept_bytes: int = 0, step: int = 0) -> None:
        if self._path is None or self._file is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        if not size:
            return
        if os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # end the line that a kill tore
        self._append({"event": "recovered", "step": step, "kept_bytes": kept_bytes})

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            os.write(self._file, (json.dumps({**line, "at": round(time.time(), 3)}) + "\n").encode())


@dataclass
class LedgerAudit:
    """`states`: last event of each task; `reasons`: why tasks were dropped; `violations`: empty in a sound run."""

    states: dict[str, str] = field(default_factory=dict)
    trained_at: dict[str, int] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    num_recoveries: int = 0

    @property
    def counts(self) -> Counter[str]:
        """Tasks per state."""
        return Counter(self.states.values())

    def tasks(self, state: str) -> list[str]:
        """Ids of the tasks in `state`, in the order they were issued."""
        return [task for task, found in self.states.items() if found == state]


def audit(path: str | Path) -> LedgerAudit:
    """Follow every task through the ledger at `path`, leaving out what recoveries have voided."""
    report = LedgerAudit()
    lines: list[tuple[int, dict[str, Any]]] = []
    offset = 0
    with open(path, "rb") as file:
        for raw in file:
            line = _parsed(raw)
            if line.get("event") == "recovered":
                lines = [kept for kept in lines if kept[0] < line["kept_bytes"]]
                report.num_recoveries += 1
            elif raw.strip():
                lines.append((offset, line))
            offset += len(raw)
    if lines and not lines[-1][1]:
        del lines[-1]  # torn by a kill
    for start, line in lines:
        if line:
            _follow(report, line)
        else:
            report.violations.append(f"unreadable line at byte {start}")
    return report


def _parsed(raw: bytes) -> dict[str, Any]:
    """The line's fields; none when it is not a whole line of ours."""
    try:
        line = json.loads(raw)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


def _follow(report: LedgerAudit, line: dict[str, Any]) -> None:
    task, event = line["task"], line["event"]
    before = report.states.get(task)
    if before not in ALLOWED.get(event, ()):
        report.violations.append(f"{task}: {event} after {before}")
    report.states[task] = event
    if event == "trained":
        report.trained_at[task] = line["step"]
    if event == "dropped":
        report.reasons[line.get("reason", "no reason given")] += 1
