"""The launcher's words on the terminal. Called by local.py, supervisor.py and children.py.

A terminal may be gone (closed window, `| head`) or take nothing (Ctrl-S, a pager): neither may end or hold up a run.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

STDOUT, STDERR = 1, 2
SAY_LIMIT_S = 2.0
MAX_COPIED_BYTES = 1 << 20  # of a log at one time, for the supervision not to wait for it


def write(fd: int, content: bytes, limit_s: float) -> int:
    """Write what `fd` takes within `limit_s`; returns the bytes taken. One that is gone takes everything."""
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


class LogEcho:
    """Copies what a log gains after `offset` to stdout. The file stays open: it may be moved or removed meanwhile."""

    def __init__(self, path: Path, offset: int) -> None:
        self.log = open(path, "rb")  # noqa: SIM115 - until close()
        self.log.seek(offset)

    def copy(self, limit_s: float = 0.0) -> None:
        """What the terminal takes within `limit_s`; the rest comes with the next call."""
        gained = self.log.read(MAX_COPIED_BYTES)
        if num_left := len(gained) - write(STDOUT, gained, limit_s):
            self.log.seek(-num_left, os.SEEK_CUR)

    def close(self) -> None:
        self.copy(SAY_LIMIT_S)
        self.log.close()
