"""How agents find the head of a run, and how the two talk. Called by head.py and agent.py; standard library only.

The head's place is a file of the run folder, which only its owner may read, or AREALITE_HEAD=host:port and
AREALITE_RUN_KEY where nodes share no folder. A connection begins with HMAC challenges of the run's key, both ways, and
carries JSON objects; who can read and change what goes between the nodes is not kept out.
"""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, TypeVar

FILE = "rendezvous.json"
HEAD_VARIABLE, KEY_VARIABLE = "AREALITE_HEAD", "AREALITE_RUN_KEY"
READ_LIMIT_S = 15.0  # for the folder to show the file; a file system that hangs cannot be interrupted
HANDSHAKE_LIMIT_S = 10.0
MAX_MESSAGE_BYTES = 8 << 20
R = TypeVar("R")
NUM_BEATS = 3  # at least, within the time after which silence is the end
MAX_BEAT_S = 2.0


@dataclass(frozen=True)
class Meeting:
    """Where the head listens, the key in hexadecimal digits, and the epoch, by which heads of a folder are counted."""

    host: str
    port: int
    key: str
    epoch: int = 0


def publish(folder: Path, meeting: Meeting) -> None:
    """Write the file so that readers see the old one or the new one, whatever happens. Raises OSError."""
    partial = folder / f".partial-{FILE}"
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(asdict(meeting), out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, folder / FILE)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(folder: Path, limit_s: float = READ_LIMIT_S) -> Meeting:
    """What the head has published. Raises LookupError: nothing (yet), or it cannot be read within `limit_s`."""
    found: queue.SimpleQueue[Meeting | Exception] = queue.SimpleQueue()

    def look() -> None:
        try:
            # A listing asks the server of a network file system, which an attempt to open may not.
            if FILE not in os.listdir(folder):
                raise LookupError(f"{folder} has no {FILE} yet")
            found.put(Meeting(**json.loads((folder / FILE).read_text())))
        except (OSError, ValueError, TypeError, LookupError) as error:
            found.put(error)

    threading.Thread(target=look, name=f"reading {FILE}", daemon=True).start()
    try:
        answer = found.get(timeout=limit_s)
    except queue.Empty:
        raise LookupError(f"reading {folder / FILE} takes longer than {limit_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer if isinstance(answer, LookupError) else LookupError(f"cannot read {folder / FILE}: {answer}")
    return answer


def find_head(folder: Path | None, newest_epoch: int) -> Meeting:
    """By the environment, else by the file. Raises LookupError, also when the file is older than `newest_epoch`."""
    if place := os.environ.get(HEAD_VARIABLE):
        host, _, port = place.rpartition(":")
        key = os.environ.get(KEY_VARIABLE, "")
        if not (host and port.isdigit() and re.fullmatch("([0-9a-fA-F]{2}){16,}", key)):
            raise ValueError(
                f"{HEAD_VARIABLE} is {place!r}, expected host:port, and {KEY_VARIABLE} has {len(key)} characters,"
                " expected 32 hexadecimal digits or more, an even number, the same on all nodes"
            )
        return Meeting(host.strip("[]"), int(port), key)
    if folder is None:
        raise ValueError(f"neither --run-folder nor {HEAD_VARIABLE} is given: one of them says where the head is")
    meeting = read(folder)
    if meeting.epoch < newest_epoch:
        raise LookupError(f"{folder / FILE} is of epoch {meeting.epoch}, and {newest_epoch} was seen already")
    return meeting


def record(of: type[R], told: dict[str, Any]) -> R:
    """What was sent as a dataclass's fields, of which JSON has made its tuples lists."""
    return of(**{key: tuple(value) if isinstance(value, list) else value for key, value in told.items()})


class AgentLine:
    """One end of the connection of an agent and its head. Whoever has not heard of the other for `silence_s` gives it
    up, so each sends something several times as often: call `receive` all the time."""

    def __init__(self, plain: socket.socket, key: str, is_head: bool) -> None:
        """Takes the socket over. Raises ConnectionError: the other side does not know the key, or says nothing."""
        plain.settimeout(None)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages are short, and each is waited for
        limit = struct.pack("ll", int(HANDSHAKE_LIMIT_S), 0)  # kept by the kernel, of any read or write
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            plain.setsockopt(socket.SOL_SOCKET, option, limit)
        self.address = str(plain.getsockname()[0])
        self.silence_s = HANDSHAKE_LIMIT_S
        self._link = Connection(plain.detach())
        self._lock = threading.Lock()
        try:
            for step in (deliver_challenge, answer_challenge) if is_head else (answer_challenge, deliver_challenge):
                step(self._link, bytes.fromhex(key))
        except (OSError, EOFError, AuthenticationError, AssertionError) as error:
            self.close()
            raise ConnectionError(f"no handshake: {error or type(error).__name__}") from error
        self.heard_s = self._sent_s = time.monotonic()

    def send(self, **message: Any) -> None:
        """Any thread. Raises OSError."""
        with self._lock:
            self._sent_s = time.monotonic()
            self._link.send_bytes(json.dumps(message).encode())

    def receive(self, limit_s: float) -> dict[str, Any]:
        """The next message; empty when none has come within `limit_s`. Raises OSError: the other side is gone."""
        now, silent_s = time.monotonic(), self.silent_s
        if silent_s > self.silence_s:  # before anything is read: it was perhaps this side that was frozen
            raise ConnectionError(f"nothing was heard for {silent_s:.1f} s")
        if now - self._sent_s > min(MAX_BEAT_S, self.silence_s / NUM_BEATS):
            self.send()
        if not self._link.poll(limit_s):
            return {}
        try:
            message = json.loads(self._link.recv_bytes(MAX_MESSAGE_BYTES))
        except ValueError as error:
            raise ConnectionError(str(error)) from None
        except (EOFError, OSError):  # a process that is killed with unread bytes resets it in place of closing it
            raise ConnectionError("the connection was closed") from None
        self.heard_s = time.monotonic()
        return dict(message)

    @property
    def silent_s(self) -> float:
        """How long the other side has said nothing."""
        return time.monotonic() - self.heard_s

    def close(self) -> None:
        with suppress(OSError):
            self._link.close()
