"""Inside a sandbox: forks a process for each program, locks it up, and ends it. Started by sandbox.py as
`python -I -c "..." KIND CONTROL_FD SCRATCH`; imports the standard library alone.

The supervisor trusts nothing that a program says. It sees only that a process ended, and how; what the program writes
goes straight to the checker outside, over descriptors that came with the order.
"""

from __future__ import annotations

import builtins
import importlib
import io
import itertools
import json
import math
import os
import random
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arealite.reward.lockup import LIBC, PR_SET_DUMPABLE, checked, lock_up
from arealite.reward.plain_values import decode, encode

POLL_S = 0.05  # how often the scratch folder is looked at
# Kept at hand, so that programs that import them start at once.
PRELOADED = (
    "bisect collections copy datetime decimal fractions functools heapq itertools math operator re string typing"
)


class Line:
    """Messages over a descriptor: one JSON value per line."""

    def __init__(self, descriptor: int) -> None:
        self.reader = os.fdopen(os.dup(descriptor), "rb")
        self.writer = descriptor

    def send(self, message: Any) -> None:
        raw = json.dumps(message).encode() + b"\n"
        while raw:
            raw = raw[os.write(self.writer, raw) :]

    def receive(self) -> Any:
        raw = self.reader.readline()
        if not raw.endswith(b"\n"):
            raise EOFError
        return json.loads(raw)


def run_script(job: dict[str, Any], line: Line) -> None:
    """A program between its standard input and output."""
    line.reader.close()
    os.close(line.writer)
    names = {"__name__": "__main__", "__builtins__": builtins}
    exec(compile(job["code"], "program.py", "exec"), names)


def run_functions(job: dict[str, Any], line: Line) -> None:
    """A program whose functions are called from outside. A name may be Class.method."""
    names: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    sys.stdin = io.StringIO()
    exec(compile(job["code"], "program.py", "exec"), names)
    line.send({"names": [name for name, value in names.items() if callable(value) and not name.startswith("__")]})
    while True:
        call = line.receive()
        function = names[call["name"].partition(".")[0]]
        if "." in call["name"]:
            function = getattr(function(), call["name"].partition(".")[2])
        arguments, named = decode(call["arguments"]), decode(call["named"])
        try:
            answer = {"value": encode(function(*arguments, **named)), "arguments": encode(arguments)}
        except Exception as error:  # whatever the program raises; checks may expect it
            answer = {"raised": type(error).__name__, "text": str(error)[:1000]}
        line.send(answer)


class Names(dict[str, Any]):
    """Globals of a check: what it does not define itself is asked of the program, by a call over the line."""

    def __init__(self, line: Line, offered: list[str]) -> None:
        super().__init__()
        self.line, self.offered = line, set(offered)

    def __missing__(self, name: str) -> Any:
        if name not in self.offered:
            raise KeyError(name)
        return self.function(name)

    def function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.line.send({"name": name, "arguments": encode(list(arguments)), "named": encode(named)})
            answer = self.line.receive()
            if "raised" in answer:
                known = vars(builtins).get(str(answer["raised"]))
                if isinstance(known, type) and issubclass(known, Exception):
                    raise known(answer.get("text"))
                raise RuntimeError(answer.get("text"))
            for given, after in zip(arguments, decode(answer["arguments"]), strict=False):
                if isinstance(given, list) and isinstance(after, list):
                    given[:] = after  # the program may work in place
                elif isinstance(given, (dict, set)) and type(given) is type(after):
                    given.clear()
                    given.update(after)
            return decode(answer["value"])

        return call


def run_check(job: dict[str, Any], line: Line) -> None:
    """A data set's own check: `preamble`, then `code`; its calls of the program's functions go over the line."""
    names = Names(line, job["names"])
    names.update({"__name__": "check", "__builtins__": builtins})
    exec(compile(job["preamble"], "preamble.py", "exec"), names)
    names["candidate"] = names[job["entry"]] = names.function(job["entry"])
    try:
        exec(compile(job["code"], "check.py", "exec"), names)
    except BaseException as error:  # the check's verdict
        line.send({"verdict": f"{type(error).__name__}: {error}"[:1000]})
        return
    line.send({"verdict": "passed"})


RUNS = {"script": run_script, "functions": run_functions, "check": run_check}


def become(order: dict[str, Any], descriptors: list[int], kind: str, scratch: str) -> None:
    """In the forked process: descriptors 0 to 3 and nothing else, locked up, then the job. Never returns."""
    code = 1
    try:
        # First out of the way of 0 to 3, which may be among them.
        high = [os.dup(os.dup(d)) if d < 4 else d for d in descriptors]
        for place, descriptor in enumerate(high):
            os.dup2(descriptor, place)
        os.closerange(4, 65536)
        for place, name in enumerate(("stdin", "stdout", "stderr")):
            mode = "r" if place == 0 else "w"
            stream = open(place, mode, closefd=False, encoding="utf-8", errors="replace")  # noqa: SIM115 - to the end
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.mkdir(scratch)
        if order["uid"] is not None:
            os.chown(scratch, order["uid"], order["uid"])
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.setrecursionlimit(10_000)
        lock_up(order, kind, scratch)
        line = Line(3)
        job = line.receive()
        sys.argv = ["program.py"]
        random.seed()
        RUNS[job["run"]](job, line)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:  # the program's own error: told like Python tells it, and the process ends
        traceback.print_exc(limit=8)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 255)


@dataclass
class Running:
    """A process of this sandbox. `end`: when it is killed, on the monotonic clock; `why`: it was."""

    number: int
    pidfd: int
    folder: str
    file_bytes: int
    end: float
    why: str = ""


class SandboxSupervisor:
    """Owns the processes of this sandbox. One order per message on the control socket, with four descriptors."""

    def __init__(self, kind: str, control: socket.socket, scratch: str) -> None:
        self.kind, self.control, self.scratch = kind, control, scratch
        self.running: dict[int, Running] = {}  # by pid
        self.num_started = 0
        os.makedirs(scratch, 0o711, exist_ok=True)

    def serve(self) -> None:
        """Waits for: orders, and the end of processes, looking at limits every POLL_S. Unblocked by: either, or the
        control socket's end, after which everything that runs here is killed."""
        while True:
            watched = select.poll()
            watched.register(self.control, select.POLLIN)
            for run in self.running.values():
                watched.register(run.pidfd, select.POLLIN)
            ready = watched.poll(1000 * POLL_S if self.running else None)
            self.reap()
            self.enforce()
            if any(descriptor == self.control.fileno() for descriptor, _ in ready):
                message, descriptors, _, _ = socket.recv_fds(self.control, 65536, 8)
                if not message:
                    break
                self.obey(json.loads(message), descriptors)
        for run in self.running.values():
            run.end = 0.0
        self.enforce()

    def obey(self, order: dict[str, Any], descriptors: list[int]) -> None:
        if order["what"] == "kill":
            for run in self.running.values():
                run.end = 0.0 if run.number == order["id"] else run.end
            self.enforce()
            return
        self.num_started += 1
        folder = os.path.join(self.scratch, f"run{self.num_started}")
        pid = os.fork()
        if pid == 0:
            become(order, descriptors, self.kind, folder)
        for descriptor in descriptors:
            os.close(descriptor)
        end = time.monotonic() + order["limit_s"]
        self.running[pid] = Running(order["id"], os.pidfd_open(pid), folder, order["file_bytes"], end)

    def enforce(self) -> None:
        for pid, run in self.running.items():
            if time.monotonic() > run.end:
                run.why = run.why or "timeout"
            elif used_bytes(run.folder) > run.file_bytes:
                run.why = run.why or "files"
            if run.why:
                os.kill(pid, signal.SIGKILL)

    def reap(self) -> None:
        for pid in list(self.running):
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if not found:
                continue
            run = self.running.pop(pid)
            os.close(run.pidfd)
            if os.path.isdir(run.folder):
                remove(run.folder)
            report = {
                "id": run.number,
                "code": os.waitstatus_to_exitcode(status),
                "why": run.why,
                "cpu_s": usage.ru_utime + usage.ru_stime,
            }
            self.control.sendall(json.dumps(report).encode())


def used_bytes(folder: str) -> float:
    """Bytes on the disk of all within; infinite where it cannot be counted (paths beyond the system's length)."""
    total, folders = 0, [folder]
    while folders:
        try:
            for entry in os.scandir(folders.pop()):
                status = entry.stat(follow_symlinks=False)
                total += 4096 + status.st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
        except FileNotFoundError:
            pass  # it is being changed, or is not there yet
        except OSError:
            return math.inf
    return total


def remove(folder: str) -> None:
    """A folder and all within, however deep: what is in a folder within is moved up before that is removed."""
    numbers = itertools.count()
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            for inner in list(os.scandir(entry.path)):
                os.rename(inner.path, os.path.join(folder, f".moved {next(numbers)}"))
            os.rmdir(entry.path)
    os.rmdir(folder)


def main() -> None:
    kind, descriptor, scratch = sys.argv[1:]
    checked(LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    for name in PRELOADED.split():
        importlib.import_module(name)
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", HOME=scratch, LANG="C.UTF-8", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    control = socket.socket(fileno=int(descriptor))
    control.sendall(b"ready")
    try:
        SandboxSupervisor(kind, control, scratch).serve()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
