"""What went wrong, told from exit codes and logs. Called by supervisor.py and local.py.

Convention: a process that a signal ended (crash, kill, out of memory), or a server that ended by itself after it was
healthy, is bad luck and may be started again. A positive exit code is a Python error or a refused configuration,
which would come again: the run ends with it.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from arealite.api.errors import SENTENCE, ArealiteError

TRACEBACK = "Traceback (most recent call last):"
MAX_ERROR_LINES = 60
NUM_TAIL_LINES = 20
MAX_LOG_BYTES = 4 << 20
OWN_ERROR = re.compile(r"^arealite\.\S+?\.(\w+): ")
TOLD_ERROR = re.compile(rf"^{SENTENCE}(\w+Error): ")
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch.distributed puts it before each line of a traceback
ADDRESS_IN_USE = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)


SIGNAL_HINTS: dict[int, str] = {
    signal.SIGKILL: " (kill -9, or the kernel when memory ran out)",
    signal.SIGABRT: " (on GPUs: NCCL gives up when a rank is late for the others' call; its log names the call)",
}


class RunFailed(ArealiteError):
    """A process died or stalled; the message names it, says why, and shows its first real error."""

    def __init__(self, message: str, may_restart: bool = False) -> None:
        super().__init__(message)
        self.may_restart = may_restart


def describe_exit(returncode: int) -> str:
    """An exit status in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    known = {number.value: number.name for number in signal.Signals}
    return f"was killed by {known.get(-returncode, f'signal {-returncode}')}{SIGNAL_HINTS.get(-returncode, '')}"


def read_log(path: Path, offset: int) -> str:
    """What a process wrote since `offset`; the last part only when that is very long, nothing when it was removed."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - MAX_LOG_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def first_error(log: str, brief: bool = False) -> str:
    """The last traceback of a log, as it stands; only the message when the error is one of ours, raised to be read by
    a person, or when `brief`; the last lines when there is no traceback."""
    lines = [RANK_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    starts = [i for i, line in enumerate(lines) if line.endswith(TRACEBACK) or TOLD_ERROR.match(line)]
    if not starts:
        return "\n".join([line for line in lines if line][-NUM_TAIL_LINES:]) or "(the log is empty)"
    block = lines[starts[-1] :]
    if TOLD_ERROR.match(block[0]):
        return "\n".join(block[:MAX_ERROR_LINES]).removeprefix(SENTENCE).rstrip()
    at = next((i for i, line in enumerate(block[1:], 1) if line and not line.startswith(" ")), len(block) - 1)
    if own := OWN_ERROR.match(block[at]):
        message = [f"{own[1]}: {block[at][own.end() :]}", *block[at + 1 :]]
        return "\n".join(message[:MAX_ERROR_LINES]).rstrip()
    if brief:
        block = block[at:]
    if len(block) > MAX_ERROR_LINES:
        half = MAX_ERROR_LINES // 2
        block = [*block[:half], f"    ... {len(block) - 2 * half} more lines in the log ...", *block[-half:]]
    return "\n".join(block).rstrip()
