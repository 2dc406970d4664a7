"""What can be known of a process of a run from outside: its heartbeat file, its state in the process table.

Heartbeats are written by observe/waits.py, read by the watchdog and, for the launcher's, by every heartbeat thread.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from arealite.api.atomic import write_text

STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "blocked in the kernel (state D: disk or device)",
    "T": "frozen (state T: stopped by a signal; SIGCONT continues it)",
    "t": "stopped by a debugger (state t)",
    "Z": "dead, not yet reaped (state Z)",
    "X": "dead",
}
FROZEN = ("T", "t")
DEAD = ("Z", "X")


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
        return (
            f"{process} waits for {self.owner}: {self.name}, since {clock}"
            f" ({self.age_s:.1f} s, limit {self.limit_s:g} s){ids}"
        )


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


class BeatAge:
    """How long ago a process last beat, by the reader's own clock: clocks that jump or differ do not matter."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._seen = time.monotonic()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._seen

    def update(self, beat: Heartbeat) -> float:
        """Take a reading; returns the seconds since the beat last changed."""
        if (beat.pid, beat.num_beats) != self._last:
            self._last = (beat.pid, beat.num_beats)
            self.restart()
        return self.age_s

    def restart(self) -> None:
        """Count from now again."""
        self._seen = time.monotonic()


def state_letter(pid: int) -> str:
    """The state letter of /proc/PID/stat; "X" when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return stat.rpartition(")")[2].split()[0]


def process_state(pid: int) -> str:
    """The state of a process in words."""
    letter = state_letter(pid)
    return STATES.get(letter, f"in state {letter}")


def processes_of_run(run_dir: Path) -> dict[int, str]:
    """Living processes that were started for this run, with the name they were given: {pid: "trainer-0"}.

    Known by their environment, so children of a trainer are among them, under the trainer's name, even when they
    have outlived it. The launcher is not: its own environment has no AREALITE_PROCESS.
    """
    wanted = f"AREALITE_RUN_DIR={run_dir}".encode()
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or belongs to somebody else
            continue
        names = [v.partition(b"=")[2].decode() for v in variables if v.startswith(b"AREALITE_PROCESS=")]
        if wanted in variables and names:
            found[int(entry)] = names[0]
    return found
