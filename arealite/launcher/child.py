"""A child process: its start, its log, how it ended, and an end that leaves nothing behind; the node on which such
processes are started; and the terminal, to which logs and the launcher's own words go.

Called by supervisor.py, local.py and agent.py, from the main thread only: the kernel ties a child to the thread that
started it.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from arealite.api.errors import SENTENCE
from arealite.launcher import shim
from arealite.launcher.machine import Machine
from arealite.launcher.plan import LOOPBACK, ProcessPlan
from arealite.launcher.rendezvous import KEY_VARIABLE
from arealite.observe.processes import (
    DEAD,
    SLOT_VARIABLE,
    Watched,
    process_state,
    process_status,
    processes_of_run,
)
from arealite.observe.progress import terminal_width
from arealite.observe.run_folder import ATTEMPT_VARIABLE, RUN_DIR_VARIABLE, RunFolder

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
ADDRESS_IN_USE = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)
LOST_PEER = re.compile(r"Connection (closed|reset) by peer|Connection was likely closed|remote process exited")
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch.distributed puts it before each line of a traceback
SIGNAL_HINTS: dict[int, str] = {
    signal.SIGKILL: " (kill -9, or the kernel when memory ran out)",
    signal.SIGABRT: " (on GPUs: NCCL gives up when a rank is late for the others' call; its log names the call)",
}


class StartedProcess(Watched, Protocol):
    """A process that was started on a node, as the supervisor sees it. `port`: where it listens; 0, not known yet."""

    plan: ProcessPlan
    port: int

    @property
    def name(self) -> str: ...

    @property
    def exit_code(self) -> int | None:
        """Negative for a signal, and when it was lost with its node; None while it lives."""

    def kill(self) -> None:
        """SIGKILL to it and to all that was started under its name; the others live on."""

    def output(self) -> str:
        """What it wrote since its start; the last part only when that is very long."""

    def echo(self, limit_s: float = 0.0) -> None:
        """Copy to stdout what its log has gained, as much as the terminal takes within `limit_s`."""

    def obituary(self, brief: bool = False) -> str:
        """How it ended, and its first real error; without the traceback when `brief`."""

    def close(self) -> None:
        """It has ended, and nothing more is asked of it."""


class Hands(Protocol):
    """One node, as the supervisor uses it: what starts and ends its processes. `name` is for people, `address` where
    the others reach it; `loss` says why it is gone, empty while it is there."""

    address: str
    machine: Machine
    loss: str

    @property
    def name(self) -> str: ...

    def start(self, plan: ProcessPlan, head: str, env: dict[str, str]) -> StartedProcess:
        """Start a process; `head` is the address of the first node, `env` what only this start knows."""

    def clean(self) -> list[str]:
        """End all that is left of the run on this node, and wait for that; names what was."""


@dataclass
class OwnNode:
    """This machine, with what all processes on it are given in `env`; `slot` numbers the nodes of a run."""

    folder: RunFolder
    machine: Machine
    slot: int = 0
    address: str = LOOPBACK
    env: dict[str, str] = field(default_factory=dict)
    loss: str = ""

    @property
    def name(self) -> str:
        return self.machine.name

    def start(self, plan: ProcessPlan, head: str, env: dict[str, str]) -> Child:
        """As Hands.start."""
        held = hold_port(self.address)
        port = int(held.getsockname()[1])
        child = Child.start(plan.on_port(port, self.address, head), self.folder, self.slot, **{**self.env, **env})
        child.port, child.held = port, held
        return child

    def clean(self, name: str = "") -> list[str]:
        """As Hands.clean, or only what was started under this name."""
        return kill_leftovers(self.folder, name, self.slot)


@dataclass
class Child:
    """A StartedProcess of this machine. Its log stays open, since it may be moved or removed meanwhile; `offset` is
    where this start begins in it, `echoed` up to where the terminal has it, both in bytes. `held` keeps its port."""

    plan: ProcessPlan
    folder: RunFolder
    slot: int
    process: subprocess.Popen[bytes]
    log: BinaryIO
    offset: int
    echoed: int
    port: int = 0
    held: socket.socket | None = None

    @classmethod
    def start(cls, plan: ProcessPlan, folder: RunFolder, slot: int = 0, **env: str) -> Child:
        """Start it in a session of its own, its output appended to its log, if one can be opened; `env` is what only
        this start knows."""
        path = folder.log(plan.name, env.get(ATTEMPT_VARIABLE, ""))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            say(f"{path} cannot be written, what {plan.name} says is lost: {error.strerror}")
            path = Path(os.devnull)
        env |= {RUN_DIR_VARIABLE: str(folder.root), "AREALITE_PROCESS": plan.name, SLOT_VARIABLE: str(slot)}
        if width := terminal_width():  # its log is copied there
            env["COLUMNS"] = str(width)
        inherited = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
        cores = ",".join(map(str, plan.cores)) or "-"
        with open(path, "ab", buffering=0) as log:
            with suppress(OSError):  # a full disk
                log.write(f"=== {time.strftime('%F %T')} start of {plan.name}: {' '.join(plan.command)}\n".encode())
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), cores, *plan.command],
                env={**inherited, **plan.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            return cls(plan, folder, slot, process, open(path, "rb"), log.tell(), log.tell())

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def status(self) -> str:
        return process_status(self.pid)

    @property
    def exit_code(self) -> int | None:
        """Negative for a signal; None while it lives."""
        return self.process.poll()

    def send(self, number: int, is_alone: bool = False) -> None:
        if self.exit_code is None:  # reaped: the number may belong to somebody else by now
            with suppress(ProcessLookupError):
                (os.kill if is_alone else os.killpg)(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        kill_leftovers(self.folder, self.name, self.slot)
        self.process.poll()  # reaps

    def output(self) -> str:
        size = os.fstat(self.log.fileno()).st_size
        start = max(self.offset, size - MAX_LOG_BYTES)
        return os.pread(self.log.fileno(), size - start, start).decode(errors="replace")

    def echo(self, limit_s: float = 0.0) -> None:
        self.echoed += write(STDOUT, os.pread(self.log.fileno(), MAX_COPIED_BYTES, self.echoed), limit_s)

    def obituary(self, brief: bool = False) -> str:
        return obituary(self, self.log.name, brief)

    def close(self) -> None:
        self.process.poll()  # reaps
        self.log.close()
        if self.held is not None:
            self.held.close()


def obituary(child: StartedProcess, log: str, brief: bool) -> str:
    """What StartedProcess.obituary returns, where `log` is the place of its log."""
    how = "still runs" if child.exit_code is None else describe_exit(child.exit_code)
    error = first_error(child.output(), brief).replace("\n", "\n  ")
    return f"{child.name} (pid {child.pid}) {how}. Its log, {log}, says:\n  {error}"


def lost_a_peer(child: StartedProcess) -> bool:
    """Whether it ended because another rank was gone, which has more to say."""
    return bool(child.exit_code) and bool(LOST_PEER.search(first_error(child.output(), brief=True)))


def lost_its_port(child: StartedProcess) -> bool:
    """Whether somebody else has taken its port, as only one does who asks for that very port."""
    return bool(ADDRESS_IN_USE.search(child.output()))


def kill_leftovers(folder: RunFolder, name: str = "", slot: int | None = None) -> list[str]:
    """End all processes of this run on this machine, or only those of this name, of the agent of this slot, and wait
    until they have given back memory, ports and devices; returns their names."""
    killed: dict[int, str] = {}
    end = time.monotonic() + KILL_LIMIT_S
    while True:
        left = {pid: n for pid, n in processes_of_run(folder.root, slot).items() if name in ("", n)}
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


def hold_port(address: str = LOOPBACK) -> socket.socket:
    """Bound to a free port of this machine's `address` until it is closed, and not listening. So long the system gives
    the port to nobody who asks for any or connects from any, and lets one process in that asks for this one with
    SO_REUSEADDR, as all servers and torch's store do. Raises OSError: the address is none of this machine's."""
    held = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((address, 0))
    except OSError as error:
        held.close()
        raise OSError(f"no port can be bound at {address}, see AREALITE_ADDRESS: {error.strerror}") from None
    return held


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
