"""A child process of the launcher: its start, its log, how it ended, and an end that leaves nothing behind; and the
terminal, to which logs and the launcher's own words go.

Called by supervisor.py and local.py, from the main thread only: the kernel ties a child to the thread that started it.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from arealite.api.errors import SENTENCE
from arealite.launcher import shim
from arealite.launcher.plan import ProcessPlan
from arealite.observe.processes import DEAD, process_state, process_status, processes_of_run
from arealite.observe.progress import terminal_width
from arealite.observe.run_folder import RUN_DIR_VARIABLE, RunFolder

POLL_S = 0.05
KILL_LIMIT_S = 10.0  # for the kernel to end all processes after SIGKILL
STDOUT, STDERR = 1, 2
SAY_LIMIT_S = 2.0
MAX_COPIED_BYTES = 1 << 20  # of a log at one time, for the supervision not to wait for it
MAX_LOG_BYTES = 4 << 20
MAX_ERROR_LINES = 60
NUM_TAIL_LINES = 20
TRACEBACK = "Traceback (most recent call last):"
OWN_ERROR = re.compile(r"^arealite\.\S+?\.(\w+): ")
TOLD_ERROR = re.compile(rf"^{SENTENCE}(\w+Error): ")
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch.distributed puts it before each line of a traceback
SIGNAL_HINTS: dict[int, str] = {
    signal.SIGKILL: " (kill -9, or the kernel when memory ran out)",
    signal.SIGABRT: " (on GPUs: NCCL gives up when a rank is late for the others' call; its log names the call)",
}


@dataclass
class Child:
    """One started process. Its log stays open, since it may be moved or removed meanwhile; `offset` is where this
    start begins in it, `echoed` up to where the terminal has it, both in bytes."""

    plan: ProcessPlan
    process: subprocess.Popen[bytes]
    log: BinaryIO
    offset: int
    echoed: int

    @classmethod
    def start(cls, plan: ProcessPlan, folder: RunFolder, **env: str) -> Child:
        """Start it in a session of its own, its output appended to logs/<name>.log; `env` is what only this start
        knows."""
        folder.logs_dir.mkdir(parents=True, exist_ok=True)
        path = folder.logs_dir / f"{plan.name}.log"
        env |= {RUN_DIR_VARIABLE: str(folder.root), "AREALITE_PROCESS": plan.name}
        if width := terminal_width():  # its log is copied there
            env["COLUMNS"] = str(width)
        cores = ",".join(map(str, plan.cores)) or "-"
        with open(path, "ab") as log:
            log.write(f"=== {time.strftime('%F %T')} start of {plan.name}: {' '.join(plan.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), cores, *plan.command],
                env={**os.environ, **plan.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            return cls(plan, process, open(path, "rb"), log.tell(), log.tell())

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def exit_code(self) -> int | None:
        """Negative for a signal; None while it lives."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """A signal to it and its group."""
        if self.exit_code is None:  # reaped: the number may belong to somebody else by now
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def kill(self, folder: RunFolder) -> None:
        """SIGKILL to it and to all that was started under its name; the others live on."""
        self.send(signal.SIGKILL)
        kill_leftovers(folder, self.name)
        self.process.poll()  # reaps

    def output(self) -> str:
        """What it wrote since its start; the last part only when that is very long."""
        size = os.fstat(self.log.fileno()).st_size
        start = max(self.offset, size - MAX_LOG_BYTES)
        return os.pread(self.log.fileno(), size - start, start).decode(errors="replace")

    def echo(self, limit_s: float = 0.0) -> None:
        """Copy to stdout what its log has gained, as much as the terminal takes within `limit_s`."""
        self.echoed += write(STDOUT, os.pread(self.log.fileno(), MAX_COPIED_BYTES, self.echoed), limit_s)

    def obituary(self, brief: bool = False) -> str:
        """How it ended, and its first real error; without the traceback when `brief`."""
        how = "still runs" if self.exit_code is None else describe_exit(self.exit_code)
        error = first_error(self.output(), brief).replace("\n", "\n  ")
        return f"{self.name} (pid {self.process.pid}) {how}. Its log, {self.log.name}, says:\n  {error}"


def kill_leftovers(folder: RunFolder, name: str = "") -> list[str]:
    """End all processes of this run, or only those of this name, and wait until they have given back memory, ports
    and devices; returns their names."""
    killed: dict[int, str] = {}
    end = time.monotonic() + KILL_LIMIT_S
    while True:
        left = {pid: n for pid, n in processes_of_run(folder.root).items() if name in ("", n)}
        killed |= left
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # A dying process loses its environment, by which it is found, before it gives back the rest.
        living = [pid for pid in killed if process_status(pid) not in DEAD]
        if not (left or living) or time.monotonic() > end:
            break
        time.sleep(POLL_S)
    for pid in living:
        say(f"{killed[pid]} (pid {pid}) does not end after SIGKILL: it is {process_state(pid)}")
    return [f"{name} (pid {pid})" for pid, name in killed.items()]


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(-code, f'signal {-code}')}{SIGNAL_HINTS.get(-code, '')}"


def first_error(log: str, brief: bool = False) -> str:
    """The last traceback of a log, as it stands; only the message when the error is one of ours, raised to be read by
    a person, or when `brief`; the last lines when there is no traceback."""
    lines = [RANK_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    starts = [i for i, line in enumerate(lines) if line.endswith(TRACEBACK) or TOLD_ERROR.match(line)]
    if not starts:
        return "\n".join([line for line in lines if line][-NUM_TAIL_LINES:]) or "(the log is empty)"
    block = lines[starts[-1] :]
    if block[0].endswith(TRACEBACK):
        at = next((i for i, line in enumerate(block[1:], 1) if line and not line.startswith(" ")), len(block) - 1)
        block = block[at:] if brief or OWN_ERROR.match(block[at]) else block
    block[0] = OWN_ERROR.sub(r"\1: ", block[0].removeprefix(SENTENCE))
    if len(block) > MAX_ERROR_LINES:
        half = MAX_ERROR_LINES // 2
        block = [*block[:half], f"    ... {len(block) - 2 * half} more lines in the log ...", *block[-half:]]
    return "\n".join(block).rstrip()


def write(fd: int, content: bytes, limit_s: float) -> int:
    """Write what `fd` takes within `limit_s`; returns the bytes taken. A terminal that is gone (closed window or
    `| head`) takes everything, and one that takes nothing (Ctrl-S, a pager) holds up no run."""
    end = time.monotonic() + limit_s
    num_taken = 0
    try:
        while num_taken < len(content) and select.select([], [fd], [], max(0.0, end - time.monotonic()))[1]:
            # A pipe that is ready takes this much without blocking.
            num_taken += os.write(fd, content[num_taken : num_taken + select.PIPE_BUF])
    except OSError:
        return len(content)
    return num_taken


def say(text: str) -> None:
    """One message of the launcher, on stderr."""
    write(STDERR, f"arealite: {text}\n".encode(errors="replace"), SAY_LIMIT_S)
