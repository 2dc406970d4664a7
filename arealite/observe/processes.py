"""What can be known of a process of a run from outside: its heartbeat file and its state in the process table.

Called by watchdog.py, by every heartbeat thread (waits.py) for the launcher, and by the launcher to end what is left.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil

from arealite.api.atomic import write_text

STATES = {
    psutil.STATUS_DISK_SLEEP: "blocked in the kernel (state D: disk or device)",
    psutil.STATUS_STOPPED: "frozen (state T: stopped by a signal; SIGCONT continues it)",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger (state t)",
    psutil.STATUS_ZOMBIE: "dead, not yet reaped (state Z)",
}
SLOT_VARIABLE = "AREALITE_SLOT"  # of the node, in the environment of a run's processes
FROZEN = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
DEAD = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@dataclass(frozen=True)
class WaitRecord:
    """One wait as others see it. `since` is wall time, `age_s` its age when the record was made."""

    name: str
    owner: str
    since: float
    age_s: float
    limit_s: float
    pending: list[str]

    def line(self, process: str) -> str:
        """Who waits for whom, for what, since when."""
        clock = time.strftime("%H:%M:%S", time.localtime(self.since))
        ids = f"; pending: {', '.join(self.pending)}" if self.pending else ""
        age = f"({self.age_s:.1f} s, limit {self.limit_s:g} s)"
        return f"{process} waits for {self.owner}: {self.name}, since {clock} {age}{ids}"


@dataclass(frozen=True)
class Heartbeat:
    """One heartbeat file. `marks` are seconds since each kind of progress, when the beat was written."""

    pid: int
    process: str
    num_beats: int
    waits: list[WaitRecord]
    marks: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> Heartbeat | None:
        """The newest beat; None where there is none (yet), or something else."""
        try:
            content = json.loads(path.read_text())
            return cls(**{**content, "waits": [WaitRecord(**w) for w in content["waits"]]})
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Replace the file at once, so that readers see a whole beat. Raises OSError."""
        write_text(path, json.dumps(asdict(self)), durable=False)


class Watched(Protocol):
    """A process of the run, on whatever node; `status` in psutil's words."""

    @property
    def pid(self) -> int: ...

    @property
    def status(self) -> str: ...

    def send(self, number: int, is_alone: bool = False) -> None:
        """A signal to its group, or to it alone."""


class Pulse:
    """One process, `name`, by its heartbeat: the newest in `path` of `process` (of any, where that is not known), and
    how long ago it changed by the reader's own clock: clocks that jump or differ do not matter."""

    def __init__(self, path: Path, process: Watched | None = None) -> None:
        self.path, self.name, self.process = path, path.stem, process
        self.beat: Heartbeat | None = None
        self.restart()

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    @property
    def state(self) -> str:
        status = self.process.status if self.process is not None else "unknown"
        return STATES.get(status, status)

    @property
    def is_frozen(self) -> bool:
        return self.process is not None and self.process.status in FROZEN

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._changed_s

    def restart(self) -> None:
        """Count from now again."""
        self._changed_s = time.monotonic()

    def look(self) -> Heartbeat | None:
        """Read the file; None where it is not there now. `beat` stays the last one that was."""
        beat = Heartbeat.read(self.path)
        if beat is None or self.pid not in (0, beat.pid):
            return None
        if beat != self.beat:
            self.beat = beat
            self.restart()
        return beat


def process_status(pid: int) -> str:
    """psutil's name of a process's state, STATUS_DEAD when there is no such process."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)


def process_state(pid: int) -> str:
    """The state of a process in words."""
    status = process_status(pid)
    return STATES.get(status, status)


def processes_of_run(run_dir: Path, slot: int | None = None) -> dict[int, str]:
    """Living processes of this machine that were started for this run, by the agent of this slot if one is given, with
    the name they were given: {pid: "trainer-0"}.

    Known by their environment, so children of a trainer are among them, under the trainer's name, even when they
    have outlived it. The launcher is not: its own environment has no AREALITE_PROCESS.
    """
    names = {}
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except psutil.Error:  # ended meanwhile, or belongs to somebody else
            continue
        if slot is not None and variables.get(SLOT_VARIABLE) != str(slot):
            continue
        if variables.get("AREALITE_RUN_DIR") == str(run_dir) and "AREALITE_PROCESS" in variables:
            names[process.pid] = variables["AREALITE_PROCESS"]
    names.pop(os.getpid(), None)
    return names
