"""The launcher's child processes: start, exit status, logs, and an end that leaves nothing behind.

Called by supervisor.py, from the main thread only: the kernel ties a child to the thread that started it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from arealite.launcher import child as shim
from arealite.launcher.failures import describe_exit, first_error, read_log
from arealite.launcher.plan import ProcessPlan
from arealite.launcher.terminal import say
from arealite.observe.processes import DEAD, process_state, processes_of_run, state_letter
from arealite.observe.progress import terminal_width
from arealite.observe.run_folder import RunFolder

POLL_S = 0.05
KILL_LIMIT_S = 10.0  # for the kernel to end all processes after SIGKILL


@dataclass
class Child:
    """One started process. `offset` is where this start begins in its log, in bytes."""

    plan: ProcessPlan
    process: subprocess.Popen[bytes]
    log: Path
    offset: int

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it lives."""
        return self.process.poll()

    def output(self) -> str:
        """What it wrote since its start."""
        return read_log(self.log, self.offset)

    def obituary(self, brief: bool = False) -> str:
        """How it ended, and its first real error; without the traceback when `brief`."""
        returncode = self.process.poll()
        how = "still runs" if returncode is None else describe_exit(returncode)
        error = first_error(self.output(), brief).replace("\n", "\n  ")
        return f"{self.name} (pid {self.pid}) {how}. Its log, {self.log}, says:\n  {error}"


def start(plan: ProcessPlan, folder: RunFolder, attempt: int, env: dict[str, str]) -> Child:
    """Start one process in a session of its own, its output appended to logs/<name>.log; `env` is what only this
    start knows."""
    folder.logs_dir.mkdir(parents=True, exist_ok=True)
    path = folder.logs_dir / f"{plan.name}.log"
    cores = ",".join(map(str, plan.cores)) or "-"
    command = [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), cores, *plan.command]
    own = {"AREALITE_RUN_DIR": str(folder.root), "AREALITE_PROCESS": plan.name}
    if width := terminal_width():  # its log is copied there
        own["COLUMNS"] = str(width)
    with open(path, "ab") as log:
        log.write(f"=== start {attempt + 1} of {plan.name}: {' '.join(plan.command)}\n".encode())
        offset = log.tell()
        log.flush()
        process = subprocess.Popen(
            command,
            env={**os.environ, **plan.env, **env, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Child(plan, process, path, offset)


def stop(children: list[Child], folder: RunFolder, grace_s: Callable[[], float]) -> None:
    """SIGTERM to all, SIGKILL after `grace_s()` seconds, then whatever they have left behind.

    `grace_s` is asked again and again, so that an impatient user can cut it short.
    """
    began = time.monotonic()
    for c in children:
        _signal_group(c, signal.SIGTERM)
        _signal_group(c, signal.SIGCONT)  # a frozen process acts on SIGTERM only when it goes on
    while any(c.poll() is None for c in children) and time.monotonic() - began < grace_s():
        time.sleep(POLL_S)
    for c in children:
        _signal_group(c, signal.SIGKILL)
    kill_leftovers(folder)
    for c in children:
        c.poll()  # reaps
        (folder.waits_dir / f"{c.name}.json").unlink(missing_ok=True)  # its number may soon be somebody else's


def kill(c: Child, folder: RunFolder) -> None:
    """SIGKILL to one child and to all that was started under its name; the others live on."""
    _signal_group(c, signal.SIGKILL)
    kill_leftovers(folder, c.name)
    c.poll()  # reaps


def kill_leftovers(folder: RunFolder, name: str = "") -> list[str]:
    """End all processes of this run, or only those of this name, and wait until they have given back memory, ports
    and devices; returns their names."""
    found: dict[int, str] = {}
    end = time.monotonic() + KILL_LIMIT_S
    while True:
        left = {pid: n for pid, n in processes_of_run(folder.root).items() if name in ("", n)}
        found |= left
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # A dying process loses its environment, by which it is found, before it gives back the rest.
        living = [pid for pid in found if state_letter(pid) not in DEAD]
        if not (left or living) or time.monotonic() > end:
            break
        time.sleep(POLL_S)
    for pid in living:
        say(f"{found[pid]} (pid {pid}) does not end after SIGKILL: it is {process_state(pid)}")
    return [f"{name} (pid {pid})" for pid, name in found.items()]


def _signal_group(c: Child, number: int) -> None:
    if c.poll() is None:  # reaped: the number may belong to somebody else by now
        with suppress(ProcessLookupError):
            os.killpg(c.pid, number)
