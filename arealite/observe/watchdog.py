"""Finds stalls and writes the report: who waits for whom, since when, which process is frozen, and the stacks.

Called by the launcher's supervision loop; reads the heartbeats that waits.py writes, and asks for stacks by SIGUSR1,
which waits.configure lets faulthandler answer into stacks/<process>.txt.
"""

from __future__ import annotations

import os
import re
import signal
import sysconfig
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from arealite.observe import waits
from arealite.observe.processes import Pulse, WaitRecord, Watched, process_state, processes_of_run
from arealite.observe.run_folder import RunFolder

OVERDUE_GRACE_S = 5.0  # for a wait past its limit to raise its own error, which says more
ANSWER_LIMIT_S = 3.0  # for all processes to write their stacks
POLL_S = 0.05
MAX_FRAMES_SHOWN = 12  # of one thread

FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
PACKAGE = str(Path(__file__).parents[1]) + os.sep
LIBRARY = re.compile(rf"{re.escape(sysconfig.get_path('stdlib'))}/|.*/(site|dist)-packages/|<frozen ")


@dataclass(frozen=True)
class StallReport:
    """`culprit` is the process to blame, by name; `text` is for the terminal, its file in stalls/ has more."""

    culprit: str
    headline: str
    text: str


class Watchdog:
    """Judges one set of processes. Make a new one for each start of the run.

    A process stalls when its heartbeat is older than `stall_s`. A wait stalls when it is past its own limit, and
    `grace_s` more, or older than `stall_s` while no process has marked any progress (`waits.mark`) for that long.
    """

    def __init__(self, folder: RunFolder, heartbeat_s: float, stall_s: float, grace_s: float = OVERDUE_GRACE_S) -> None:
        self.folder, self.heartbeat_s, self.stall_s, self.grace_s = folder, heartbeat_s, stall_s, grace_s
        self._watched: dict[str, Pulse] = {}
        self._looked = time.monotonic()
        self._excused = -float("inf")

    def excuse(self) -> None:
        """Others wait now for something that is being repaired: that counts as progress."""
        self._excused = time.monotonic()

    def look(self, processes: Mapping[str, Watched]) -> StallReport | None:
        """Judge the processes, by name, by their newest heartbeats. Call every tick; it paces itself."""
        now = time.monotonic()
        gap_s = now - self._looked
        if gap_s < min(self.heartbeat_s, self.stall_s / 4):
            return None
        self._looked, known, waits_dir = now, self._watched, self.folder.waits_dir
        self._watched = {
            name: known[name] if name in known and known[name].process == p else Pulse(waits_dir / f"{name}.json", p)
            for name, p in processes.items()
        }
        for watched in self._watched.values():
            watched.look()
            if watched.beat is None and not watched.is_frozen:  # still starting, or a program without our heartbeat
                watched.restart()
        if gap_s > self.stall_s / 2:  # we were frozen ourselves, perhaps all of us: nobody's silence counts
            for watched in self._watched.values():
                watched.restart()
            return None
        stalls = self._silent(self.stall_s)
        if not stalls and (late := self._stalled_wait()):
            # Whoever is frozen explains the waits of the others, even if its own silence is still young.
            stalls = [*self._silent(max(self.stall_s / 4, 3 * self.heartbeat_s)), late]
        return self._report(stalls) if stalls else None

    def _silent(self, limit_s: float) -> list[tuple[str, str]]:
        """(whom to blame, why)"""
        return [
            (w.name, f"{w.name} (pid {w.pid}) has been silent for {w.age_s:.0f} s: it is {w.state}")
            for w in self._watched.values()
            if w.age_s >= limit_s
        ]

    def _stalled_wait(self) -> tuple[str, str] | None:
        """(whom to blame, why), of the oldest: the others follow from it, and the report lists them all."""
        progress_s = min([time.monotonic() - self._excused, *(ago_s for _, ago_s, _ in self._marks())])
        for record, name in self._waits():
            if record.age_s > record.limit_s + self.grace_s:
                why = f"past its limit of {record.limit_s:g} s"
            elif min(record.age_s, progress_s) >= self.stall_s:
                why = f"older than watchdog.stall_s ({self.stall_s:g} s), without progress anywhere"
            else:
                continue
            return record.owner if record.owner in self._watched else name, f"{record.line(name)} [{why}]"
        return None

    def _waits(self) -> list[tuple[WaitRecord, str]]:
        """All waits with their ages now and who waits, oldest first."""
        now = [
            (replace(record, age_s=record.age_s + w.age_s), w.name)
            for w in self._watched.values()
            for record in (w.beat.waits if w.beat else ())
        ]
        return sorted(now, key=lambda wait: -wait[0].age_s)

    def _marks(self) -> list[tuple[str, float, str]]:
        """(what was achieved, seconds ago, by whom)."""
        beating = [(w, w.beat) for w in self._watched.values() if w.beat]
        return [(what, ago_s + w.age_s, w.name) for w, beat in beating for what, ago_s in beat.marks.items()]

    def _report(self, stalls: list[tuple[str, str]]) -> StallReport:
        culprit, headline = stalls[0][0], f"STALL: {stalls[0][1]}"
        self.folder.stalls_dir.mkdir(parents=True, exist_ok=True)
        path = self.folder.stalls_dir / f"stall_{time.strftime('%Y%m%d_%H%M%S')}_{culprit}.txt"
        asked = [(w.name, w.process) for w in self._watched.values() if w.beat and not w.is_frozen]
        dumps = stacks_of(self.folder, {name: process for name, process in asked if process is not None})
        sections = {
            "who waits for whom (oldest first)": self._wait_lines() + waits.lines(),
            "last progress": [f"{name}: {what} {ago_s:.1f} s ago" for what, ago_s, name in self._marks()] or ["none"],
            "processes": self._process_lines(),
            "where they are (innermost frame first)": self._stack_lines(dumps),
        }
        parts = [headline, *(f"       {why}" for _, why in stalls[1:])]
        for title, lines in sections.items():
            parts += ["", f"{title}:", *(f"  {line}" for line in lines)]
        text = "\n".join([*parts, "", f"kept with the whole stacks in {path}", ""])
        path.write_text(text + "".join(f"\nstacks of {name}:\n{dump}\n" for name, dump in dumps.items()))
        return StallReport(culprit, headline, text)

    def _wait_lines(self) -> list[str]:
        """One line for all waits of a process under one name: the age of the oldest, the oldest ids of all."""
        alike: dict[tuple[str, str, str], list[WaitRecord]] = {}
        for record, name in self._waits():
            alike.setdefault((name, record.owner, record.name), []).append(record)
        lines = []
        for (name, _, _), records in alike.items():
            ids = waits.shortened([i for record in records for i in record.pending])
            num_alike = f" [{len(records)} such waits]" if len(records) > 1 else ""
            lines.append(replace(records[0], pending=ids).line(name) + num_alike)
        return lines

    def _process_lines(self) -> list[str]:
        lines = []
        for w in self._watched.values():
            beat = f"heartbeat {w.age_s:.1f} s ago" if w.beat else "no heartbeat yet"
            lines.append(f"{w.name} (pid {w.pid}): {w.state}, {beat}")
        children = processes_of_run(self.folder.root).items() - {(w.pid, w.name) for w in self._watched.values()}
        return lines + [f"child of {name} (pid {pid}): {process_state(pid)}" for pid, name in sorted(children)]

    def _stack_lines(self, dumps: Mapping[str, str]) -> list[str]:
        lines = []
        for w in self._watched.values():
            if w.name not in dumps:
                lines.append(f"{w.name}: cannot say, {f'it is {w.state}' if w.beat else 'it has no heartbeat yet'}")
            elif not dumps[w.name]:
                lines.append(f"{w.name}: did not say within {ANSWER_LIMIT_S:g} s")
            else:
                where = condensed(dumps[w.name]) or ["in libraries only"]
                lines += [f"{w.name}:", *(f"  {line}" for line in where)]
        return lines


def stacks_of(folder: RunFolder, processes: Mapping[str, Watched]) -> dict[str, str]:
    """A fresh dump of all threads of each process, by name; empty for one that does not answer in time.

    Ask only processes that have a heartbeat: SIGUSR1 kills others.
    """
    paths = {name: folder.stacks_dir / f"{name}.txt" for name in processes}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path.exists()}
    for name in sizes:
        processes[name].send(signal.SIGUSR1, is_alone=True)
    end = time.monotonic() + ANSWER_LIMIT_S
    before: dict[str, str] = {}
    while True:
        written = {name: paths[name].read_bytes()[size:] for name, size in sizes.items()}
        dumps = dict.fromkeys(processes, "") | {n: text.decode(errors="replace").strip() for n, text in written.items()}
        if (dumps == before and all(dumps.values())) or time.monotonic() > end:  # all answered, and none still does
            return dumps
        before = dumps
        time.sleep(POLL_S)


def condensed(dump: str) -> list[str]:
    """The threads that run code of this package or of the user, the main thread first, like ones once.

    Of each thread: where it is, then the frames of that code, innermost first.
    """
    threads: Counter[tuple[str, ...]] = Counter()
    for thread in reversed(dump.split("\n\n")):  # the thread that answers, the main one, comes last in a dump
        frames = FRAME.findall(thread)
        shown = [frame for frame in frames if frame[0].startswith(PACKAGE) or not LIBRARY.match(frame[0])]
        if all(file == waits.__file__ for file, _, _ in shown):
            continue
        inner = frames[:1] if frames[0] != shown[0] else []
        lines = [f"{_short(file)}:{line} {function}" for file, line, function in [*inner, *shown]]
        more = [f"... {len(lines) - MAX_FRAMES_SHOWN} more"] if lines[MAX_FRAMES_SHOWN:] else []
        threads[(*lines[:MAX_FRAMES_SHOWN], *more)] += 1
    text: list[str] = []
    for (first, *others), num_alike in threads.items():
        text.append(f"at {first}" + (f"  [{num_alike} threads]" if num_alike > 1 else ""))
        text += [f"   {line}" for line in others]
    return text


def _short(file: str) -> str:
    """A path without the folders that everybody knows."""
    if file.startswith(PACKAGE):
        return "arealite/" + file.removeprefix(PACKAGE)
    library = None if file.startswith("<") else LIBRARY.match(file)
    return file[library.end() :] if library else file.removeprefix(os.getcwd() + os.sep)
