"""Stands between the rollout head and one agent's program: whichever of them ends, nothing that the program started is
left. In a lock-up it also carries the program's connections to the gateway, which is all that can be reached there.

Run by runners.py as `python -I -S warden.py ORDER`, and by itself once more inside a lock-up; imports the standard
library only, so that it costs milliseconds.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)
LINE = 3  # the descriptor by which the inside hands out its listening socket
ENDED, CANNOT_START, BY_SIGNAL = 125, 127, 128
POLL_S = 0.005
PORT = 8000  # of the gateway, as it seems inside
LISTEN_LIMIT_S = 10.0
MAX_CONNECTIONS = 64  # of one program at a time
CHUNK_BYTES = 1 << 16


def main(order: dict[str, Any]) -> int:
    """Run the order's `words` to the end and return the exit code, BY_SIGNAL and more for a signal. `parent` is the
    process without which nothing goes on; `marks`, variables by which others find what it started and kill it, which
    this process has not: it must outlive that; `gateway`, in a lock-up, the place [host, port] of connections.

    There are two of it, parent and child, since one may be killed too: each ends all if the other is gone."""
    outer = os.getpid()
    return guard(order["parent"], lambda: code_of(os.fork() or inner(outer, order)))


def inner(outer: int, order: dict[str, Any]) -> NoReturn:
    os._exit(guard(outer, lambda: run(order["words"], order["marks"], order["gateway"])))


def guard(parent: int, act: Callable[[], int]) -> int:
    """What `act` returns; whatever it has started is ended then, or when this process's `parent` is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))  # what runners.py sends, and the kernel when it died
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        return act() if os.getppid() == parent else ENDED
    except SystemExit:
        return ENDED
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_all()


def code_of(child: int) -> int:
    """Of a child, when it has ended; orphans, which come here, are waited for meanwhile."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else BY_SIGNAL - code


def run(words: list[str], marks: dict[str, str], gateway: list[Any] | None) -> int:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        os.dup2(theirs.fileno(), LINE)
        os.set_inheritable(LINE, gateway is not None)
        os.setsid()
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ.update(marks)
        execute(words)
    theirs.close()
    if gateway is not None:
        threading.Thread(target=carry, args=(ours, (gateway[0], gateway[1])), daemon=True).start()
    return code_of(child)


def execute(words: list[str]) -> None:
    """Become the program."""
    try:
        os.execvp(words[0], words)
    except OSError as error:
        os.write(2, f"cannot start {words[0]!r}: {error}\n".encode())
        os._exit(CANNOT_START)


def end_all() -> None:
    """Kill all descendants. Orphans become children of this process, so none is left when it has no child."""
    with suppress(ChildProcessError):
        while True:
            for pid in descendants():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(POLL_S)


def descendants() -> set[int]:
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", errors="replace") as stat:
            parents[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
    found, grown = set[int](), {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in grown} - found:
        found |= grown
    return found


def carry(line: socket.socket, gateway: tuple[str, int]) -> None:
    """Take the socket that the inside listens on, and join each connection to one of the gateway. A socket belongs to
    the network it was made in, whoever holds it."""
    line.settimeout(LISTEN_LIMIT_S)
    _, descriptors, _, _ = socket.recv_fds(line, 16, 1)
    if not descriptors:
        return  # the lock-up did not start; bwrap has said why
    places = threading.BoundedSemaphore(MAX_CONNECTIONS)
    with socket.socket(fileno=descriptors[0]) as listener:
        listener.settimeout(None)
        while True:
            inner, _ = listener.accept()
            places.acquire()
            threading.Thread(target=join, args=(inner, gateway, places), daemon=True).start()


def join(inner: socket.socket, gateway: tuple[str, int], places: threading.BoundedSemaphore) -> None:
    try:
        with inner, socket.create_connection(gateway) as outer:
            back = threading.Thread(target=pump, args=(outer, inner), daemon=True)
            back.start()
            pump(inner, outer)
            back.join()
    except OSError:  # the gateway is not there: the program sees its connection end
        pass
    finally:
        places.release()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Bytes one way, until its end, which is passed on."""
    with suppress(OSError):
        while piece := source.recv(CHUNK_BYTES):
            sink.sendall(piece)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def lock_in(order: dict[str, Any]) -> None:
    """Inside a lock-up: listen where the gateway seems to be, hand that out, give up what is left, become the program.
    `limits` are those of `resource`, by number; `uid` is nobody's, or None."""
    with socket.create_server(("127.0.0.1", PORT)) as listener, socket.socket(fileno=LINE) as line:
        socket.send_fds(line, [b"listening"], [listener.fileno()])
    for kind, most in order["limits"]:
        resource.setrlimit(kind, (most, most))
    if order["uid"] is not None:
        os.setgroups([])
        os.setresgid(*[order["uid"]] * 3)
        os.setresuid(*[order["uid"]] * 3)
    execute(order["words"])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "uid" in given:
        lock_in(given)
    os._exit(main(given))
