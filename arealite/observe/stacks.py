"""Stacks of the processes of a run: asked for by SIGUSR1, and cut to what a person needs. Called by watchdog.py.

waits.configure lets faulthandler answer the signal into stacks/<process>.txt.
"""

from __future__ import annotations

import os
import re
import signal
import sysconfig
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from arealite.observe.run_folder import RunFolder

ANSWER_LIMIT_S = 3.0  # for all processes to write their stacks
POLL_S = 0.05
MAX_FRAMES_SHOWN = 12  # of one thread

FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
PACKAGE = str(Path(__file__).parents[1]) + os.sep
HEARTBEAT_FILE = str(Path(__file__).with_name("waits.py"))
LIBRARY = re.compile(rf"{re.escape(sysconfig.get_path('stdlib'))}/|.*/(site|dist)-packages/|<frozen ")


def collect(folder: RunFolder, pids: Mapping[str, int]) -> dict[str, str]:
    """A fresh dump of all threads of each process {name: pid}; empty for one that does not answer in time.

    Ask only processes that have a heartbeat: SIGUSR1 kills others.
    """
    paths = {name: folder.stacks_dir / f"{name}.txt" for name in pids}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path.exists()}
    for name in sizes:
        with suppress(ProcessLookupError):
            os.kill(pids[name], signal.SIGUSR1)
    end = time.monotonic() + ANSWER_LIMIT_S
    before: dict[str, str] = {}
    while True:
        dumps = dict.fromkeys(pids, "")
        for name, size in sizes.items():
            with open(paths[name], errors="replace") as file:
                file.seek(size)
                dumps[name] = file.read().strip()
        if (dumps == before and all(dumps.values())) or time.monotonic() > end:  # all answered, and none still does
            return dumps
        before = dumps
        time.sleep(POLL_S)


def condense(dump: str) -> list[str]:
    """The threads that run code of this package or of the user, the main thread first, like ones once.

    Of each thread: where it is, then the frames of that code, innermost first.
    """
    shown: Counter[tuple[str, ...]] = Counter()
    for thread in reversed(dump.split("\n\n")):  # the thread that answers, the main one, comes last in a dump
        frames = FRAME.findall(thread)
        own = [frame for frame in frames if is_own(frame[0])]
        if all(file == HEARTBEAT_FILE for file, _, _ in own):
            continue
        inner = frames[:1] if frames[0] != own[0] else []
        lines = [f"{short(file)}:{line} {function}" for file, line, function in [*inner, *own]]
        more = [f"... {len(lines) - MAX_FRAMES_SHOWN} more"] if lines[MAX_FRAMES_SHOWN:] else []
        shown[tuple(lines[:MAX_FRAMES_SHOWN] + more)] += 1
    text: list[str] = []
    for lines_of_thread, num_alike in shown.items():
        first = f"{lines_of_thread[0]}  [{num_alike} threads]" if num_alike > 1 else lines_of_thread[0]
        text += [f"at {first}", *(f"   {line}" for line in lines_of_thread[1:])]
    return text


def is_own(file: str) -> bool:
    """Whether code is this package's or the user's: whatever is no library."""
    return file.startswith(PACKAGE) or not LIBRARY.match(file)


def short(file: str) -> str:
    """A path without the folders that everybody knows."""
    if file.startswith(PACKAGE):
        return "arealite/" + file.removeprefix(PACKAGE)
    found = LIBRARY.match(file)
    return file[found.end() :] if found and not file.startswith("<") else file.removeprefix(os.getcwd() + os.sep)
