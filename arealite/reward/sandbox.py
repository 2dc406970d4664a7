"""Runs programs that nobody trusts: no network, no files but a scratch folder, no other processes, all bounded.

Used by code.py in reward workers. A sandbox is one warm process (sandbox_child.py) that forks a locked-up process per
program, so that a test costs less than the start of an interpreter. Two kinds, and a result says which:

- "bubblewrap": namespaces of its own (mounts, processes, network, IPC), made by bwrap, and a filter of system calls;
- "landlock": the same filter and Landlock's rules for files, where namespaces are not allowed.

What decides about a program never lies within its reach: it gets inputs, and its outputs are compared out here.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from arealite.api.errors import RewardError

Kind = Literal["bubblewrap", "landlock"]

PACKAGE = Path(__file__).parents[1]
# All of the package that is seen inside: what starts there.
INSIDE = [
    PACKAGE / "__init__.py",
    *(PACKAGE / "reward" / f"{name}.py" for name in ("__init__", "sandbox_child", "lockup", "plain_values")),
]
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from arealite.reward.sandbox_child import main; main()"
START_LIMIT_S = 30.0
END_LIMIT_S = 10.0  # for the end of a process to be told, after its limit or its killing
SCRATCH_BYTES = 64 << 20  # of all programs that run in one sandbox at the same time
FIRST_UID = 2_000_000_000  # where root starts sandboxes: each has a user of its own, who owns nothing
MAX_MESSAGE_BYTES = 16 << 20
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER")

_numbers = itertools.count(1)


class SandboxError(RewardError):
    """There is no sandbox, or it broke: says nothing about the program."""


@dataclass(frozen=True)
class ProcessLimits:
    """Of one process: wall clock and CPU seconds, address space, output (stdout and stderr each), files, threads."""

    limit_s: float = 6.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 4 << 20
    file_bytes: int = 16 << 20
    max_threads: int = 64


@dataclass(frozen=True)
class Ended:
    """How a process ended. `why`: "" by itself, or what ended it: timeout, output, files; `code`: exit code, negative
    for a signal."""

    why: str
    code: int
    cpu_s: float
    stdout: bytes = b""
    stderr: bytes = b""


class Stopped(Exception):
    """A process said no more; `ended` tells why."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(f"{ended.why or 'ended'}, exit code {ended.code}")
        self.ended = ended


@lru_cache(maxsize=1)
def best_kind() -> Kind:
    """The strongest kind that works here. Raises SandboxError: none does."""
    tried = []
    for kind in ("bubblewrap", "landlock"):
        try:
            with Sandbox(kind) as sandbox:
                ended = sandbox.run("print(1)", b"", ProcessLimits())
                if ended.stdout == b"1\n":
                    return kind
                tried.append(f"{kind}: {ended.stderr[-300:].decode(errors='replace')}")
        except SandboxError as error:
            tried.append(f"{kind}: {error}")
    raise SandboxError(
        "programs cannot be locked up on this machine, so none is run: install bubblewrap (apt-get install bubblewrap)"
        f" where user namespaces are allowed, or use Linux 5.13 or later with Landlock. Tried {'; '.join(tried)}"
    )


class Sandbox:
    """One warm sandbox, for one thread at a time; closed by `close` or the end of this process, however it ends."""

    def __init__(self, kind: Kind | None = None) -> None:
        self.kind: Kind = kind or best_kind()
        self._uid = FIRST_UID + os.getpid() * 64 + next(_numbers) % 64 if os.getuid() == 0 else None
        self._scratch = (
            str(Path("/tmp", "scratch")) if self.kind == "bubblewrap" else tempfile.mkdtemp(prefix="arealite-sandbox-")
        )
        self.reports: dict[int, dict[str, Any]] = {}  # how processes ended that nobody has asked about yet
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-I", "-c", START, str(PACKAGE.parent), self.kind, str(theirs.fileno()), self._scratch]
        if self.kind == "bubblewrap":
            inside = bubblewrap([*readable(), *map(str, INSIDE)], is_root=self._uid is not None)
            words = [*inside, "--as-pid-1", "--clearenv", "--remount-ro", "/", "--", *words]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, start_new_session=True, env={"PATH": os.environ.get("PATH", "")},
                )  # fmt: skip
            except OSError as error:
                self.control.close()
                raise SandboxError(f"{words[0]} cannot be started: {error}") from error
        self.control.settimeout(START_LIMIT_S)
        try:
            is_ready = self.control.recv(64) == b"ready"
        except OSError:
            is_ready = False
        if not is_ready:
            self._process.kill()
            self.close()
            assert self._process.stderr is not None
            raise SandboxError(
                f"it does not start: {self._process.stderr.read()[-500:].decode(errors='replace').strip()}"
            )

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything that runs in it: the supervisor sees the socket's end."""
        self.control.close()
        try:
            self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_LIMIT_S)
        if self.kind == "landlock":
            shutil.rmtree(self._scratch, ignore_errors=True)

    def run(self, code: str, stdin: bytes, limits: ProcessLimits) -> Ended:
        """A program from its start to its end. Raises SandboxError."""
        with self.started({"run": "script", "code": code}, limits, stdin) as process:
            return process.wait()

    @contextmanager
    def started(self, job: dict[str, Any], limits: ProcessLimits, stdin: bytes = b"") -> Iterator[Process]:
        """A process that has been given its job; killed, if it still runs, when the block ends. Raises SandboxError."""
        uid = self._uid if self.kind == "bubblewrap" else None
        order = {"what": "start", "id": next(_numbers), "uid": uid, "readable": readable(), **asdict(limits)}
        pipes = [os.pipe() for _ in range(3)]
        ours, theirs = socket.socketpair()
        given = [pipes[0][0], pipes[1][1], pipes[2][1], theirs.fileno()]
        kept = [pipes[0][1], pipes[1][0], pipes[2][0]]
        try:
            socket.send_fds(self.control, [json.dumps(order).encode()], given)
        except OSError as error:
            for descriptor in kept:
                os.close(descriptor)
            ours.close()
            raise SandboxError(f"the sandbox is gone: {error}") from error
        finally:
            for descriptor in given[:3]:
                os.close(descriptor)
            theirs.close()
        process = Process(self, order["id"], ours, kept, stdin, limits)
        try:
            process.send(job)
            yield process
        finally:
            process.end()

    def read_report(self) -> None:
        """Take the next report of a process's end from the supervisor. Raises SandboxError."""
        try:
            report = json.loads(self.control.recv(65536))
        except (OSError, ValueError) as error:
            raise SandboxError("the sandbox ended in the middle of a program") from error
        self.reports[report["id"]] = report


class Process:
    """One locked-up process, seen from outside: what it writes, what it says on its line, and how it ended."""

    def __init__(
        self, sandbox: Sandbox, number: int, line: socket.socket, pipes: list[int], stdin: bytes, limits: ProcessLimits
    ) -> None:
        self._sandbox, self._number, self._line, self._limits = sandbox, number, line, limits
        self._stdin = memoryview(stdin)
        self._said = bytearray()
        self._unsent = bytearray()
        self._written: dict[int, bytearray] = {pipes[1]: bytearray(), pipes[2]: bytearray()}
        self._pipes = pipes
        self._ended: Ended | None = None
        self._deadline = time.monotonic() + limits.limit_s + END_LIMIT_S
        self._select = selectors.DefaultSelector()
        line.setblocking(False)
        for descriptor in pipes:
            os.set_blocking(descriptor, False)
        self._select.register(pipes[0], selectors.EVENT_WRITE)
        for readable in (pipes[1], pipes[2], sandbox.control, line):
            self._select.register(readable, selectors.EVENT_READ)

    def send(self, message: Any) -> None:
        """A message on its line, sent while it is waited for."""
        self._unsent += json.dumps(message).encode() + b"\n"

    def forward(self, raw: bytes) -> None:
        self._unsent += raw

    def receive(self) -> bytes:
        """The next line that it says. Raises Stopped: it ended instead."""
        while b"\n" not in self._said:
            if self._ended is not None:
                raise Stopped(self._ended)
            self._step()
        end = self._said.index(b"\n") + 1
        raw = bytes(self._said[:end])
        del self._said[:end]
        return raw

    def wait(self) -> Ended:
        """Until it has ended. Raises SandboxError: that is not told in time."""
        while self._ended is None:
            self._step()
        return self._ended

    def end(self) -> None:
        """Kill it if it runs, and let go of everything."""
        try:
            if self._ended is None:
                self._kill()
                self.wait()
        finally:
            self._select.close()
            self._line.close()
            for descriptor in self._pipes:
                with suppress(OSError):
                    os.close(descriptor)

    def _kill(self) -> None:
        with suppress(OSError):
            self._sandbox.control.sendall(json.dumps({"what": "kill", "id": self._number}).encode())
        self._deadline = min(self._deadline, time.monotonic() + END_LIMIT_S)

    def _step(self) -> None:
        """One round of reading and writing. Waits for: the process, and its end, to the limits."""
        wants = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        with suppress(KeyError):
            self._select.modify(self._line, wants)
        is_over = self._number in self._sandbox.reports  # another process's turn read it
        ready = self._select.select(0.0 if is_over else max(0.0, self._deadline - time.monotonic()))
        if not ready and not is_over and time.monotonic() > self._deadline:
            raise SandboxError(f"the sandbox did not tell the end of a process {END_LIMIT_S:g} s after its limit")
        for key, events in ready:
            if key.fileobj is self._sandbox.control:
                self._sandbox.read_report()
            elif key.fileobj is self._line:
                self._exchange(events)
            elif key.fileobj == self._pipes[0]:
                self._feed()
            else:
                self._read(int(key.fd))
        if (report := self._sandbox.reports.pop(self._number, None)) is not None:
            self._note_end(report)

    def _note_end(self, report: dict[str, Any]) -> None:
        for descriptor in list(self._written):  # what is still in the pipes
            while self._read(descriptor):
                pass
        with suppress(BlockingIOError, ConnectionError):
            while more := self._line.recv(1 << 16):
                self._said += more
        too_much = any(len(out) > self._limits.output_bytes for out in self._written.values())
        why = "output" if too_much else str(report["why"])
        out, err = (bytes(self._written[descriptor]) for descriptor in self._pipes[1:])
        self._ended = Ended(why, int(report["code"]), float(report["cpu_s"]), out, err)

    def _exchange(self, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                del self._unsent[: self._line.send(self._unsent)]
            if events & selectors.EVENT_READ:
                more = self._line.recv(1 << 16)
                self._said += more
                if not more:
                    self._select.unregister(self._line)
                    self._unsent.clear()
        except BlockingIOError:
            pass
        except ConnectionError:
            self._select.unregister(self._line)
            self._unsent.clear()
        if len(self._said) > MAX_MESSAGE_BYTES:
            self._said.clear()
            self._kill()

    def _feed(self) -> None:
        try:
            if self._stdin:
                self._stdin = self._stdin[os.write(self._pipes[0], self._stdin[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it reads no more
            self._stdin = memoryview(b"")
        if not self._stdin:
            self._select.unregister(self._pipes[0])
            os.close(self._pipes[0])
            self._pipes[0] = -1

    def _read(self, descriptor: int) -> bool:
        """Whether there was something. What goes beyond the limit ends the process, and is not kept."""
        try:
            more = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return False
        if not more:
            with suppress(KeyError):
                self._select.unregister(descriptor)
            return False
        written = self._written[descriptor]
        if len(written) <= self._limits.output_bytes:
            written += more
            if len(written) > self._limits.output_bytes:
                self._kill()
        return True


def check(sandbox: Sandbox, program: str, job: dict[str, Any], limits: ProcessLimits) -> tuple[str, Ended | None]:
    """What a data set's check says, "passed" or its error. It runs in one process and calls the program's functions
    in another: it sees plain values of them, they see nothing of it. And how the program ended, if it did.

    `job`: `code`, `preamble`, `entry`; see sandbox_child.run_check. Raises SandboxError.
    """
    with sandbox.started({"run": "functions", "code": program}, limits) as functions:
        try:
            names = json.loads(functions.receive())["names"]
        except (ValueError, TypeError, KeyError):
            return "the program answers nonsense", None
        except Stopped as stopped:
            return "the program ended before it was called", stopped.ended
        with sandbox.started({"run": "check", "names": names, **job}, limits) as checks:
            try:
                while True:
                    said = json.loads(checks.receive())
                    if "verdict" in said:
                        return str(said["verdict"]), None
                    functions.send(said)
                    checks.forward(functions.receive())
            except Stopped as stopped:
                return "it ended in a call", stopped.ended


def call(sandbox: Sandbox, program: str, name: str, arguments: list[Any], limits: ProcessLimits) -> Any:
    """The answer as JSON: {"value"}, or {"raised", "text"}. Raises Stopped, SandboxError; ValueError on nonsense."""
    with sandbox.started({"run": "functions", "code": program}, limits) as functions:
        functions.receive()
        functions.send({"name": name, "arguments": arguments, "named": {"dict": []}})
        return json.loads(functions.receive())


def readable() -> list[str]:
    """What a program may read: the interpreter and the system's libraries."""
    executable = str(Path(sys.executable).resolve().parent)
    paths = [*SYSTEM_FOLDERS, sys.base_prefix, sys.prefix, executable]
    return sorted({path for path in paths if os.path.exists(path)})


def bubblewrap(paths: list[str], is_root: bool) -> list[str]:
    """The command line that makes the namespaces, in which `paths` can be read and /tmp be written to; options and the
    command are to follow. Also called by workflow/runners.py, for agents."""
    words = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--new-session", "--cap-drop", "ALL"]
    words += [w for name in CAPABILITIES for w in ("--cap-add", name)] if is_root else ["--unshare-user"]
    words += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]
    # Some may lie in /tmp.
    parents = {str(parent) for path in paths for parent in Path(path).parents} - {"/", "/tmp"}
    for parent in sorted(p for p in parents if not any(Path(p).is_relative_to(bound) for bound in paths)):
        words += ["--perms", "0755", "--dir", parent]  # so that users within can go through
    return [*words, *(word for path in paths for word in ("--ro-bind", path, path))]
