"""The life line of every task: an append-only file of JSON lines, issued -> generating -> rewarded -> consumed ->
trained, or dropped with the reason. It is the log of executor.py's table, written on trainer rank 0; `audit` reads it
back and says where each task stands, and whether any was lost or used twice (tests, and whoever doubts a run).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["issued", "generating", "rewarded", "consumed", "trained", "dropped"]

# state -> those from which it may follow
ALLOWED: dict[str, set[str | None]] = {
    "issued": {None, "rewarded"},  # again, because its answers became too old
    "generating": {"issued", "generating"},  # again after a retry or a recovery
    "rewarded": {"generating"},
    "consumed": {"rewarded"},
    "trained": {"consumed"},
    "dropped": {"issued", "generating", "rewarded", "consumed"},
}


class Ledger:
    """Appends to `path`; with None nothing is kept (a client outside a run).

    Each transition is one write of one whole line, so a kill leaves at most one torn line at the end. A file that an
    earlier attempt left behind is voided from byte 0, unless `resume` says how much of it a recovery point vouches for.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None

    def record(
        self, task_id: str, event: State, version: int | None = None, step: int | None = None, reason: str | None = None
    ) -> None:
        self.resume()
        line = {"task": task_id, "event": event, "version": version, "step": step, "reason": reason}
        self._append({key: value for key, value in line.items() if value is not None})

    def resume(self, kept_bytes: int = 0, step: int = 0) -> None:
        """Before anything is recorded: void what was written after the recovery point of `step` finished steps, whose
        `num_bytes` was given."""
        if self._path is None or self._file is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if size := os.fstat(self._file).st_size:
            if os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")  # end the line that a kill tore
            self._append({"event": "recovered", "step": step, "kept_bytes": kept_bytes})

    def num_bytes(self) -> int:
        """Length of the file: what is written later is void if the run recovers from here."""
        self.resume()
        return 0 if self._file is None else os.fstat(self._file).st_size

    def close(self) -> None:
        """Nothing is kept from now on: a late line would stand for a task that was dropped already."""
        if self._file is not None:
            os.close(self._file)
        self._path = self._file = None

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            os.write(self._file, (json.dumps({**line, "at": round(time.time(), 3)}) + "\n").encode())


@dataclass
class LedgerAudit:
    """`states`: the last of each task, in the order they were issued; `reasons`: why tasks were dropped; `violations`:
    empty in a sound run."""

    states: dict[str, str] = field(default_factory=dict)
    trained_at: dict[str, int] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    num_recoveries: int = 0

    @property
    def counts(self) -> Counter[str]:
        """Tasks per state."""
        return Counter(self.states.values())

    def follow(self, line: dict[str, Any]) -> None:
        task, event = line["task"], line["event"]
        before = self.states.get(task)
        if before not in ALLOWED.get(event, ()):
            self.violations.append(f"{task}: {event} after {before}")
        self.states[task] = event
        if event == "trained":
            self.trained_at[task] = line["step"]
        if event == "dropped":
            self.reasons[line.get("reason", "no reason given")] += 1


def audit(path: str | Path) -> LedgerAudit:
    """Follow every task through the ledger at `path`, leaving out what recoveries have voided."""
    report = LedgerAudit()
    lines: list[tuple[int, dict[str, Any] | None]] = []  # where it begins, and its fields: None where none can be read
    offset = 0
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                line = None
            if isinstance(line, dict) and line.get("event") == "recovered":
                lines = [kept for kept in lines if kept[0] < line["kept_bytes"]]
                report.num_recoveries += 1
            elif raw.strip():
                lines.append((offset, line if isinstance(line, dict) else None))
            offset += len(raw)
    if lines and lines[-1][1] is None:
        del lines[-1]  # torn by a kill
    for start, line in lines:
        if line is None:
            report.violations.append(f"unreadable line at byte {start}")
        else:
            report.follow(line)
    return report
