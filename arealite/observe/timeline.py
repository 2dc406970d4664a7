"""When each rank did what, as a Chrome trace: open timeline/rank-0.json in ui.perfetto.dev or chrome://tracing.

The training script calls `open_timeline` once and `begin_step` per step; `span` is called wherever time goes (timers,
waits, passes, requests) and costs next to nothing while no step is being recorded.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from arealite.observe.run_folder import RunFolder

MAX_BYTES = 64 << 20  # of one rank's file: what viewers load in seconds
MAX_STEP_EVENTS = 50_000


class _Recorder:
    """Writes events, each by one call to the system: a kill leaves whole lines. The array's end is never written; the
    format allows that."""

    def __init__(self, folder: RunFolder, every_steps: int, rank: int) -> None:
        self.every_steps, self.rank = every_steps, rank
        self.is_first, self.num_left = True, 0  # events that the step may still have; none: it is not recorded
        self.ids = itertools.count()
        self.threads: set[int] = set()
        self.path = folder.timeline_dir / f"rank-{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # as long as the process
        self.num_bytes = self.file.tell()
        self.write("M", "process_name", {"tid": 0, "args": {"name": f"trainer rank {rank}"}})

    def begin_step(self, step: int) -> None:
        is_on = (self.is_first or step % self.every_steps == 0) and self.num_bytes < MAX_BYTES
        self.is_first, self.num_left = False, MAX_STEP_EVENTS if is_on else 0
        if is_on:
            self.event("i", f"step {step}", {"s": "p"})

    def event(self, phase: str, name: str, more: dict[str, Any]) -> None:
        thread = threading.get_ident()
        if thread not in self.threads:
            self.threads.add(thread)
            self.write("M", "thread_name", {"tid": thread, "args": {"name": threading.current_thread().name}})
        self.num_left -= 1
        self.write(phase, name, {"ts": time.time_ns() / 1000, "tid": thread, **more})

    def write(self, phase: str, name: str, more: dict[str, Any]) -> None:
        line = json.dumps({"ph": phase, "name": name, **more, "pid": self.rank}) + ",\n"
        try:
            self.num_bytes += self.file.write((line if self.num_bytes else "[\n" + line).encode())
        except OSError as error:  # for reading only: training goes on
            self.num_left, self.num_bytes = 0, MAX_BYTES
            print(f"warning: no more timeline in {self.path}: {error.strerror}", file=sys.stderr, flush=True)


_recorder: _Recorder | None = None


def open_timeline(folder: RunFolder, every_steps: int, rank: int) -> None:
    """Record the first step of this process and those that `every_steps` divides; 0: none. A resumed run appends.

    Raises OSError when the file cannot be made.
    """
    global _recorder
    _recorder = _Recorder(folder, every_steps, rank) if every_steps else None


def begin_step(step: int) -> None:
    """From here on events belong to `step`."""
    if _recorder is not None:
        _recorder.begin_step(step)


@contextmanager
def span(name: str, **facts: Any) -> Iterator[None]:
    """The block as a span of its thread; inside an event loop, where spans overlap, as a row of its own. `facts` are
    shown with it."""
    recorder = _recorder
    if recorder is None or recorder.num_left <= 0:
        yield
        return
    overlaps = {"cat": "async", "id": next(recorder.ids)} if _in_event_loop() else {}
    begin, end = ("b", "e") if overlaps else ("B", "E")
    recorder.event(begin, name, overlaps | {"args": facts})
    try:
        yield
    finally:
        recorder.event(end, name, overlaps)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
