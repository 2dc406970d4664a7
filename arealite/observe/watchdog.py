"""Finds stalls and writes the report: who waits for whom, since when, which process is frozen, all stacks.

Called by the launcher's supervision loop; reads the heartbeats that observe/waits.py writes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from arealite.observe import waits
from arealite.observe.processes import (
    BeatAge,
    Heartbeat,
    WaitRecord,
    process_state,
    processes_of_run,
    state_letter,
)
from arealite.observe.run_folder import RunFolder
from arealite.observe.waits import MAX_PENDING_SHOWN

OVERDUE_GRACE_S = 5.0  # for a wait past its limit to raise its own error, which says more
STACKS_LIMIT_S = 3.0  # for all processes to write their stacks
STACKS_POLL_S = 0.05
MAX_STACK_LINES = 80  # of one process in the report; its file has all
FROZEN = ("T", "t")


@dataclass(frozen=True)
class StallReport:
    """`culprits` are the processes to blame, by name; `text` is for a person, `path` where it is kept."""

    culprits: tuple[str, ...]
    headline: str
    text: str
    path: str


@dataclass
class _Watched:
    """What is known of one process."""

    name: str
    pid: int
    age: BeatAge
    beat: Heartbeat | None = None

    @property
    def state(self) -> str:
        return process_state(self.pid)


@dataclass(frozen=True)
class _Stall:
    culprit: str
    line: str


class Watchdog:
    """Judges one set of processes. Make a new one for each start of the run.

    A process stalls when its heartbeat is older than `stall_s`. A wait stalls when it is past its own limit, or older
    than `stall_s` while no process has marked any progress (`waits.mark`) for that long.
    """

    def __init__(self, folder: RunFolder, heartbeat_s: float, stall_s: float) -> None:
        self.folder = folder
        self.heartbeat_s = heartbeat_s
        self.stall_s = stall_s
        self._watched: dict[str, _Watched] = {}
        self._looked = time.monotonic()

    def look(self, processes: Mapping[str, int]) -> StallReport | None:
        """Judge the processes {name: pid} by their newest heartbeats. Call every tick; it paces itself."""
        now = time.monotonic()
        gap_s = now - self._looked
        if gap_s < min(self.heartbeat_s, self.stall_s / 4):
            return None
        self._looked = now
        self._read(processes)
        if gap_s > self.stall_s / 2:  # we were frozen ourselves, perhaps all of us: nobody's silence counts
            for watched in self._watched.values():
                watched.age.restart()
            return None
        stalls = self._silent(self.stall_s)
        if not stalls and (late := self._stalled_waits()):
            # Whoever is frozen explains the waits of the others, even if its own silence is still young.
            stalls = self._silent(max(self.stall_s / 4, 3 * self.heartbeat_s)) + late
        return self._report(stalls) if stalls else None

    def _read(self, processes: Mapping[str, int]) -> None:
        known = self._watched
        self._watched = {}
        for name, pid in processes.items():
            watched = known.get(name)
            if watched is None or watched.pid != pid:
                watched = _Watched(name, pid, BeatAge())
            beat = Heartbeat.read(self.folder.waits_dir / f"{name}.json")
            if beat is not None and beat.pid == pid:
                watched.beat = beat
                watched.age.update(beat)
            elif state_letter(pid) not in FROZEN:  # still starting, or a program without our heartbeat
                watched.age.restart()
            self._watched[name] = watched

    def _silent(self, limit_s: float) -> list[_Stall]:
        return [
            _Stall(w.name, f"{w.name} (pid {w.pid}) has been silent for {w.age.age_s:.0f} s: it is {w.state}")
            for w in self._watched.values()
            if w.age.age_s >= limit_s
        ]

    def _stalled_waits(self) -> list[_Stall]:
        progress_s = min((s for _, s, _ in self._marks()), default=float("inf"))
        stalls = []
        for age_s, record, watched in self._waits():
            if age_s > record.limit_s + OVERDUE_GRACE_S:
                why = f"past its limit of {record.limit_s:g} s"
            elif min(age_s, progress_s) >= self.stall_s:
                why = f"older than watchdog.stall_s ({self.stall_s:g} s), without progress anywhere"
            else:
                continue
            culprit = record.owner if record.owner in self._watched else watched.name
            stalls.append(_Stall(culprit, f"{record.line(watched.name)} [{why}]"))
        return stalls[:1]  # the oldest; the others follow from it, and the report lists them all

    def _waits(self) -> list[tuple[float, WaitRecord, _Watched]]:
        """All waits with their ages, oldest first."""
        found = [
            (record.age_s + watched.age.age_s, record, watched)
            for watched in self._watched.values()
            if watched.beat is not None
            for record in watched.beat.waits
        ]
        return sorted(found, key=lambda f: -f[0])

    def _wait_lines(self) -> list[str]:
        """One line for all waits of a process under one name: the age of the oldest, the oldest ids of all."""
        alike: dict[tuple[str, str, str], list[WaitRecord]] = {}
        for _, record, watched in self._waits():
            alike.setdefault((watched.name, record.owner, record.name), []).append(record)
        lines = []
        for (process, _, _), records in alike.items():
            ids = [i for record in records for i in record.pending]
            rest = [f"and {len(ids) - MAX_PENDING_SHOWN} more"] if ids[MAX_PENDING_SHOWN:] else []
            line = replace(records[0], pending=ids[:MAX_PENDING_SHOWN] + rest).line(process)
            lines.append(f"{line} [{len(records)} such waits]" if len(records) > 1 else line)
        return lines

    def _marks(self) -> list[tuple[str, float, str]]:
        """(what was achieved, seconds ago, by whom)."""
        return [
            (what, ago_s + watched.age.age_s, watched.name)
            for watched in self._watched.values()
            if watched.beat is not None
            for what, ago_s in watched.beat.marks.items()
        ]

    def _report(self, stalls: list[_Stall]) -> StallReport:
        headline = f"STALL: {stalls[0].line}"
        culprits = tuple(dict.fromkeys(s.culprit for s in stalls))
        parts = [headline, *(f"       {s.line}" for s in stalls[1:])]
        parts += ["", "who waits for whom (oldest first):"]
        parts += [f"  {line}" for line in self._wait_lines() + waits.lines()]
        parts += ["", "last progress:"]
        parts += [f"  {name}: {what} {ago_s:.1f} s ago" for what, ago_s, name in self._marks()] or ["  none marked"]
        parts += ["", "processes:", *self._process_lines(), "", *self._stacks()]
        text = "\n".join(parts) + "\n"
        self.folder.stalls_dir.mkdir(parents=True, exist_ok=True)
        path = self.folder.stalls_dir / f"stall_{time.strftime('%Y%m%d_%H%M%S')}_{'_'.join(culprits)}.txt"
        path.write_text(text)
        return StallReport(culprits, headline, text, str(path))

    def _process_lines(self) -> list[str]:
        lines = []
        for w in self._watched.values():
            beat = f"heartbeat {w.age.age_s:.1f} s ago" if w.beat else "no heartbeat yet"
            lines.append(f"  {w.name} (pid {w.pid}): {w.state}, {beat}")
        own = {w.pid for w in self._watched.values()}
        for pid, name in sorted(processes_of_run(self.folder.root).items()):
            if pid not in own:
                lines.append(f"  child of {name} (pid {pid}): {process_state(pid)}")
        return lines

    def _stacks(self) -> list[str]:
        """Fresh stacks of every process that can answer; a frozen one cannot, and that is said."""
        asked: dict[str, int] = {}
        parts: list[str] = []
        for w in self._watched.values():
            if w.beat is None:
                parts.append(f"stacks of {w.name}: not asked, it has not set up its heartbeat")
            elif state_letter(w.pid) in FROZEN:
                parts.append(f"stacks of {w.name}: none, the process is {w.state} and cannot answer")
            else:
                path = self.folder.stacks_dir / f"{w.name}.txt"
                asked[w.name] = path.stat().st_size
                os.kill(w.pid, signal.SIGUSR1)
        for name, dump in self._collect(asked).items():
            # The thread that answers, the main one, comes last in the dump and matters most.
            lines = "\n\n".join(reversed(dump.strip().split("\n\n"))).splitlines()
            more = [f"    ... {len(lines) - MAX_STACK_LINES} more lines in the file"] if lines[MAX_STACK_LINES:] else []
            shown = [f"    {line}" for line in lines[:MAX_STACK_LINES]] + more
            parts += [f"stacks of {name}:", *(shown or [f"    no answer within {STACKS_LIMIT_S:g} s"])]
        return parts

    def _collect(self, asked: dict[str, int]) -> dict[str, str]:
        """What each process wrote to its stack file beyond the given size."""
        end = time.monotonic() + STACKS_LIMIT_S
        before: dict[str, str] = {}
        while True:
            dumps: dict[str, str] = {}
            for name, size in asked.items():
                with open(self.folder.stacks_dir / f"{name}.txt", errors="replace") as file:
                    file.seek(size)
                    dumps[name] = file.read()
            if (dumps == before and all(dumps.values())) or time.monotonic() > end:  # all answered, and none still does
                return dumps
            before = dumps
            time.sleep(STACKS_POLL_S)
