"""Where the time of a step goes: its timers as metrics, and when each rank did what, as a Chrome trace (open
timeline/rank-0.json in ui.perfetto.dev or chrome://tracing).

The training loop opens `timeline` once and calls `begin_step` per step; `span` is called wherever time goes (timers,
waits, passes, requests) and costs next to nothing while no step is being recorded.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from arealite.observe.run_folder import RunFolder

MAX_BYTES = 64 << 20  # of one rank's file: what viewers load in seconds
MAX_STEP_EVENTS = 50_000


class Timeline:
    """This process's trace; records nothing before `open`. Each event is written by one call to the system: a kill
    leaves whole lines. The array's end is never written; the format allows that."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_step_events: int = MAX_STEP_EVENTS) -> None:
        self._max_bytes, self._max_step_events = max_bytes, max_step_events
        self._every_steps = self._num_left = 0  # events that the step may still have; none: it is not recorded

    def open(self, folder: RunFolder, every_steps: int, rank: int) -> None:
        """Record the first step of this process and those that `every_steps` divides; 0: none. A resumed run appends.

        Raises OSError when the file cannot be made.
        """
        self._every_steps, self._num_left, self._rank = every_steps, 0, rank
        if every_steps:
            self._is_first, self._ids, self._threads = True, itertools.count(), set[int]()
            self._path = folder.timeline_dir / f"rank-{rank}.json"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  # as long as the process
            self._num_bytes = self._file.tell()
            self._write("M", "process_name", tid=0, args={"name": f"trainer rank {rank}"})

    def begin_step(self, step: int) -> None:
        """From here on events belong to `step`."""
        if not self._every_steps:
            return
        is_on = (self._is_first or step % self._every_steps == 0) and self._num_bytes < self._max_bytes
        self._is_first, self._num_left = False, self._max_step_events if is_on else 0
        if is_on:
            self._event("i", f"step {step}", s="p")

    @contextmanager
    def span(self, name: str, **facts: Any) -> Iterator[None]:
        """The block as a span of its thread; inside an event loop, where spans overlap, as a row of its own. `facts`
        are shown with it."""
        if self._num_left <= 0:
            yield
            return
        overlaps = {"cat": "async", "id": next(self._ids)} if _in_event_loop() else {}
        begin, end = ("b", "e") if overlaps else ("B", "E")
        self._event(begin, name, **overlaps, args=facts)
        try:
            yield
        finally:
            self._event(end, name, **overlaps)

    def _event(self, phase: str, name: str, **more: Any) -> None:
        thread = threading.get_ident()
        if thread not in self._threads:
            self._threads.add(thread)
            self._write("M", "thread_name", tid=thread, args={"name": threading.current_thread().name})
        self._num_left -= 1
        self._write(phase, name, ts=time.time_ns() / 1000, tid=thread, **more)

    def _write(self, phase: str, name: str, **more: Any) -> None:
        line = json.dumps({"ph": phase, "name": name, **more, "pid": self._rank}) + ",\n"
        try:
            self._num_bytes += self._file.write((line if self._num_bytes else "[\n" + line).encode())
        except OSError as error:  # for reading only: training goes on
            self._num_left, self._num_bytes = 0, self._max_bytes
            print(f"warning: no more timeline in {self._path}: {error.strerror}", file=sys.stderr, flush=True)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


timeline = Timeline()  # of this process: what is timed lies in all of its parts
span = timeline.span


class StatsTracker:
    """The numbers of one step, collected where they arise: scalars, and timers that add up until the next export.
    Not thread-safe: each thread keeps its own tracker."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def scalar(self, name: str, value: float) -> None:
        """The last value given counts."""
        self._values[name] = float(value)

    def update(self, values: Mapping[str, float]) -> None:
        """Every entry as a scalar, such as the numbers of the engine."""
        for name, value in values.items():
            self.scalar(name, value)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `<name>_s`, also when the block raises; a span of the timeline."""
        start = time.monotonic()
        try:
            with span(name):
                yield
        finally:
            self._values[f"{name}_s"] = self._values.get(f"{name}_s", 0.0) + time.monotonic() - start

    def export(self) -> dict[str, float]:
        """Everything since the last export, by name. Starts anew."""
        values, self._values = self._values, {}
        return values
