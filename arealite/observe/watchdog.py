"""Finds stalls and writes the report: who waits for whom, since when, which process is frozen, and the stacks.

Called by the launcher's supervision loop; reads the heartbeats that observe/waits.py writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from arealite.observe import stacks, waits
from arealite.observe.processes import (
    FROZEN,
    BeatAge,
    Heartbeat,
    WaitRecord,
    process_state,
    processes_of_run,
    state_letter,
)
from arealite.observe.run_folder import RunFolder

OVERDUE_GRACE_S = 5.0  # for a wait past its limit to raise its own error, which says more


@dataclass(frozen=True)
class StallReport:
    """`culprit` is the process to blame, by name; `text` is for the terminal, its file in stalls/ has more."""

    culprit: str
    headline: str
    text: str


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

    @property
    def is_frozen(self) -> bool:
        return state_letter(self.pid) in FROZEN


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
        self._excused = -float("inf")

    def excuse(self) -> None:
        """Others wait now for something that is being repaired: that counts as progress."""
        self._excused = time.monotonic()

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
        if not stalls and (late := self._stalled_wait()):
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
            elif watched.beat is None and not watched.is_frozen:  # still starting, or a program without our heartbeat
                watched.age.restart()
            self._watched[name] = watched

    def _silent(self, limit_s: float) -> list[_Stall]:
        return [
            _Stall(w.name, f"{w.name} (pid {w.pid}) has been silent for {w.age.age_s:.0f} s: it is {w.state}")
            for w in self._watched.values()
            if w.age.age_s >= limit_s
        ]

    def _stalled_wait(self) -> list[_Stall]:
        marked_s = min((s for _, s, _ in self._marks()), default=float("inf"))
        progress_s = min(marked_s, time.monotonic() - self._excused)
        for record, watched in self._waits():
            if record.age_s > record.limit_s + OVERDUE_GRACE_S:
                why = f"past its limit of {record.limit_s:g} s"
            elif min(record.age_s, progress_s) >= self.stall_s:
                why = f"older than watchdog.stall_s ({self.stall_s:g} s), without progress anywhere"
            else:
                continue
            culprit = record.owner if record.owner in self._watched else watched.name
            # Only the oldest: the others follow from it, and the report lists them all.
            return [_Stall(culprit, f"{record.line(watched.name)} [{why}]")]
        return []

    def _waits(self) -> list[tuple[WaitRecord, _Watched]]:
        """All waits with their ages now, oldest first."""
        found = [
            (replace(record, age_s=record.age_s + watched.age.age_s), watched)
            for watched in self._watched.values()
            if watched.beat is not None
            for record in watched.beat.waits
        ]
        return sorted(found, key=lambda f: -f[0].age_s)

    def _wait_lines(self) -> list[str]:
        """One line for all waits of a process under one name: the age of the oldest, the oldest ids of all."""
        alike: dict[tuple[str, str, str], list[WaitRecord]] = {}
        for record, watched in self._waits():
            alike.setdefault((watched.name, record.owner, record.name), []).append(record)
        lines = []
        for (process, _, _), records in alike.items():
            ids = [i for record in records for i in record.pending]
            line = replace(records[0], pending=waits.shortened(ids)).line(process)
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
        culprit = stalls[0].culprit
        self.folder.stalls_dir.mkdir(parents=True, exist_ok=True)
        path = self.folder.stalls_dir / f"stall_{time.strftime('%Y%m%d_%H%M%S')}_{culprit}.txt"
        dumps = stacks.collect(
            self.folder, {w.name: w.pid for w in self._watched.values() if w.beat and not w.is_frozen}
        )
        sections = {
            "who waits for whom (oldest first)": self._wait_lines() + waits.lines(),
            "last progress": [f"{name}: {what} {ago_s:.1f} s ago" for what, ago_s, name in self._marks()] or ["none"],
            "processes": self._process_lines(),
            "where they are (innermost frame first)": self._stack_lines(dumps),
        }
        parts = [headline, *(f"       {s.line}" for s in stalls[1:])]
        for title, lines in sections.items():
            parts += ["", f"{title}:", *(f"  {line}" for line in lines)]
        text = "\n".join([*parts, "", f"kept with the whole stacks in {path}", ""])
        path.write_text(text + "".join(f"\nstacks of {name}:\n{dump}\n" for name, dump in dumps.items()))
        return StallReport(culprit, headline, text)

    def _process_lines(self) -> list[str]:
        lines = []
        for w in self._watched.values():
            beat = f"heartbeat {w.age.age_s:.1f} s ago" if w.beat else "no heartbeat yet"
            lines.append(f"{w.name} (pid {w.pid}): {w.state}, {beat}")
        own = {w.pid for w in self._watched.values()}
        children = {pid: name for pid, name in processes_of_run(self.folder.root).items() if pid not in own}
        return lines + [f"child of {name} (pid {pid}): {process_state(pid)}" for pid, name in sorted(children.items())]

    def _stack_lines(self, dumps: Mapping[str, str]) -> list[str]:
        lines = []
        for w in self._watched.values():
            if w.name not in dumps:
                lines.append(f"{w.name}: cannot say, {f'it is {w.state}' if w.beat else 'it has no heartbeat yet'}")
            elif not dumps[w.name]:
                lines.append(f"{w.name}: did not say within {stacks.ANSWER_LIMIT_S:g} s")
            else:
                where = stacks.condense(dumps[w.name]) or ["in libraries only"]
                lines += [f"{w.name}:", *(f"  {line}" for line in where)]
        return lines
