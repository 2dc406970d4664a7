"""Named waits of this process, and the heartbeat that shows them to the launcher's watchdog.

Whoever waits for another process, thread or request does it through `waiting` or `bounded`; mains of trainers and
servers call `configure_from_env` once. Works unconfigured too: limits still hold.
"""

from __future__ import annotations

import asyncio
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from arealite.api.errors import WaitTimeout
from arealite.observe.output import outlive_full_disks
from arealite.observe.processes import SLOT_VARIABLE, Heartbeat, Pulse, WaitRecord, process_state
from arealite.observe.run_folder import RunFolder
from arealite.observe.timeline import span

T = TypeVar("T")
Pending = Iterable[str] | Callable[[], Iterable[str]]

LAUNCHER = "launcher"
MAX_PENDING_SHOWN = 8
JOIN_LIMIT_S = 5.0  # for a heartbeat that is being written, perhaps to a slow disk


class Wait:
    """One wait in progress.

    `name` says what is waited for, `owner` who has to act to end it (a process, or a part of this one); `pending`
    gives the ids still missing, oldest first: a list, or a callable read by the heartbeat thread.
    """

    def __init__(self, name: str, owner: str, limit_s: float, pending: Pending = ()) -> None:
        if not (math.isfinite(limit_s) and limit_s >= 0):
            raise ValueError(f"wait {name!r} has limit_s {limit_s}; every wait needs a finite limit in seconds")
        self.name, self.owner, self.limit_s, self.pending = name, owner, limit_s, pending
        self.restart()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def left_s(self) -> float:
        """Seconds until the limit; 0 when it has passed."""
        return max(0.0, self.limit_s - self.age_s)

    def restart(self) -> None:
        """What was waited for came, and the next of its kind is waited for: age and limit count from now on."""
        self._since, self._started_s = time.time(), time.monotonic()

    def check(self) -> None:
        """Raise WaitTimeout if the limit has passed; its message is the line of a stall report."""
        if self.left_s == 0:
            raise self.expired()

    def expired(self) -> WaitTimeout:
        return WaitTimeout(self.record().line(_process.name))

    def record(self) -> WaitRecord:
        try:
            ids = shortened(list(map(str, self.pending() if callable(self.pending) else self.pending)))
        except Exception as error:  # boundary: the callable reads state that its owner may be changing right now
            ids = [f"(unknown: {error!r})"]
        return WaitRecord(self.name, self.owner, self._since, self.age_s, self.limit_s, ids)


def shortened(ids: list[str]) -> list[str]:
    """The first few ids, and how many more there are."""
    more = [f"and {len(ids) - MAX_PENDING_SHOWN} more"] if ids[MAX_PENDING_SHOWN:] else []
    return ids[:MAX_PENDING_SHOWN] + more


class _Process:
    """This process as the others see it. Its dictionaries are changed by any thread, and copied to be read."""

    def __init__(self) -> None:
        self.name = f"process {os.getpid()}"
        self.waits: dict[int, Wait] = {}
        self.marks: dict[str, float] = {}
        self.heart: _Heart | None = None

    def records(self) -> list[WaitRecord]:
        """Oldest first."""
        return [wait.record() for wait in self.waits.copy().values()]


_process = _Process()


@contextmanager
def waiting(name: str, owner: str, limit_s: float, pending: Pending = ()) -> Iterator[Wait]:
    """Register a wait while the block runs; the block calls `check()` as often as it looks for the end of the wait."""
    wait = Wait(name, owner, limit_s, pending)
    _process.waits[id(wait)] = wait
    try:
        with span(f"wait: {name}", owner=owner):
            yield wait
    finally:
        del _process.waits[id(wait)]


async def bounded(awaitable: Awaitable[T], name: str, owner: str, limit_s: float, pending: Pending = ()) -> T:
    """Await under a name and a limit; cancels the awaitable and raises WaitTimeout when the limit passes."""
    with waiting(name, owner, limit_s, pending) as wait:
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await awaitable
        except TimeoutError:
            if limit.expired():
                raise wait.expired() from None
            raise


def in_background(run: Callable[[], T], name: str) -> Future[T]:
    """A call in a thread of its own, which never keeps the process from ending."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever waits may go away

    def work() -> None:
        try:
            future.set_result(run())
        except Exception as error:  # boundary: it belongs to the one who waits
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


async def in_thread(run: Callable[[], T], name: str, owner: str, limit_s: float) -> T:
    """A blocking call in a thread of its own, awaited under a name and a limit. Raises WaitTimeout when the limit
    passes, or what `run` raises. The thread goes on after that."""
    return await bounded(asyncio.wrap_future(in_background(run, name)), name, owner, limit_s)


def mark(what: str) -> None:
    """Say that something was achieved just now ("token", "group", "step"): no stall while any process goes on doing
    so, and the stall report says how long ago it was. Cheap: call it per decode step, not per token."""
    _process.marks[what] = time.monotonic()


def lines() -> list[str]:
    """This process's waits as lines of a stall report, oldest first."""
    return [record.line(_process.name) for record in _process.records()]


def configure(run_dir: str | Path, name: str, heartbeat_s: float, stall_s: float) -> None:
    """Start the heartbeat of this process and let SIGUSR1 dump its stacks. Call once.

    Writes waits/<name>.json every `heartbeat_s`; names the launcher when that is silent for `stall_s`.
    """
    if _process.heart is not None:
        raise RuntimeError(f"waits are configured already, as {_process.name!r}; configure once per process")
    folder = RunFolder(Path(run_dir))
    folder.stacks_dir.mkdir(parents=True, exist_ok=True)
    # Before the first heartbeat: SIGUSR1 kills a process that has not registered for it. Never undone, so that a
    # request just before the end does not kill either; faulthandler keeps the file open.
    stack_file = open(folder.stacks_dir / f"{name}.txt", "a")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    _process.name = name
    _process.heart = _Heart(folder, heartbeat_s, stall_s)
    _process.heart.write()
    _process.heart.start()


def configure_from_env() -> None:
    """`configure` from what the launcher put into the environment, and output that outlives a full disk; does nothing
    in a process started by hand."""
    env = os.environ
    run_dir, name = env.get("AREALITE_RUN_DIR"), env.get("AREALITE_PROCESS")
    if run_dir and name and _process.heart is None:
        outlive_full_disks()
        heartbeat_s, stall_s = env.get("AREALITE_HEARTBEAT_S", "1"), env.get("AREALITE_STALL_S", "300")
        configure(run_dir, name, float(heartbeat_s), float(stall_s))


def shut_down() -> None:
    """End the heartbeat and remove its file: this process has nothing more to report."""
    if _process.heart is not None:
        _process.heart.stop.set()
        _process.heart.join(JOIN_LIMIT_S)
        _process.heart, _process.name = None, f"process {os.getpid()}"


class _Heart(threading.Thread):
    """The heartbeat.

    Consumes: this process's waits and marks; the launcher's heartbeat file. Produces: waits/<process>.json, and a
    note in stalls/ when the launcher is silent. Waits for: the next beat, `heartbeat_s`. Unblocked by: `stop`.
    """

    def __init__(self, folder: RunFolder, heartbeat_s: float, stall_s: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.folder, self.heartbeat_s, self.stall_s = folder, heartbeat_s, stall_s
        self.path = folder.waits_dir / f"{_process.name}.json"
        self.launcher = Pulse(folder.waits_dir / f"{LAUNCHER}.json")
        # Of another node's launcher the agent knows more.
        self.is_beside_launcher = self.path != self.launcher.path and os.environ.get(SLOT_VARIABLE, "0") == "0"
        self.stop = threading.Event()
        self.num_beats = 0
        self.named_pid = 0  # of the silent launcher that was named

    def run(self) -> None:
        while not self.stop.wait(self.heartbeat_s):
            try:
                self.write()
                if self.is_beside_launcher:
                    self.watch_launcher()
            except OSError as error:  # a full disk must not end the heartbeat; the next beat tries again
                print(f"{_process.name}: heartbeat not written: {error}", file=sys.stderr, flush=True)
        self.path.unlink(missing_ok=True)

    def write(self) -> None:
        self.num_beats += 1
        marks = {what: time.monotonic() - at for what, at in _process.marks.copy().items()}
        Heartbeat(os.getpid(), _process.name, self.num_beats, _process.records(), marks).write(self.path)

    def watch_launcher(self) -> None:
        beat = self.launcher.look()
        if beat is None or self.launcher.age_s < self.stall_s:
            self.named_pid = 0
            return
        if self.named_pid == beat.pid:
            return
        self.named_pid = beat.pid
        line = (
            f"STALL: the launcher (pid {beat.pid}) has been silent for {self.launcher.age_s:.0f} s: it is"
            f" {process_state(beat.pid)}. Noticed by {_process.name}, which goes on working; nobody watches the run\n"
        )
        print(line, end="", file=sys.stderr, flush=True)
        self.folder.stalls_dir.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # another process was first, or the launcher's terminal is gone
            with open(self.folder.stalls_dir / f"launcher_{beat.pid}_{beat.num_beats}.txt", "x") as note:
                note.write(line)
            # A frozen launcher cannot echo our log, so the line goes where it would have printed; without blocking,
            # since whoever reads from there may be frozen too.
            flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
            with open(os.open(f"/proc/{beat.pid}/fd/2", flags), "w") as terminal:
                terminal.write(line)
