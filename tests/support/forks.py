"""Processes that start in a blink: forked from one that has loaded what they need (preloaded.py). Used by tests of
ranks, of servers and of scripts."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STRICT_SGLANG = "--strict-sglang"  # a flag of these servers only: see strict_sglang.py
LIMIT_S = 600.0  # for all that one call does, on a busy machine


@functools.cache
def context() -> Any:
    """Once its server has started: Python 3.11 tells it by the environment alone where modules are."""
    found, path = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    found.set_forkserver_preload(["support.preloaded"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *([path] if path else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({"PYTHONPATH": path} if path else {})
    return found


def in_process(work: Callable[..., Any], *args: Any) -> Any:
    """What the module-level function makes of `args` in a process of its own, without a group; raises what it does."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(work, *args).result(LIMIT_S)


@contextmanager
def servers(count: int, folder: str, *flags: str) -> Iterator[list[tuple[Any, str]]]:
    """So many built-in servers in float32: their processes and addresses. They are killed at the end."""
    words = ["--model", folder, "--port", "0", "--dtype", "float32", *flags]
    pipes = [context().Pipe(duplex=False) for _ in range(count)]
    processes = [context().Process(target=_serve, args=(send, words)) for _, send in pipes]
    try:
        for process, (_, send) in zip(processes, pipes, strict=True):
            process.start()
            send.close()  # so that its end is seen here
        found = []
        for process, (receive, _) in zip(processes, pipes, strict=True):
            assert receive.poll(LIMIT_S), "a server has not told its address"
            found.append((process, receive.recv().strip().rpartition("//")[2]))
        yield found
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


class _Told:
    """Standard output, from which the address goes through a pipe."""

    def __init__(self, send: Connection) -> None:
        self._send, self._told = send, ""

    def write(self, text: str) -> int:
        self._told += text
        return len(text)

    def flush(self) -> None:
        if "listening on" in self._told:
            self._send.send(self._told)


def _serve(send: Connection, words: list[str]) -> None:
    from arealite.inference import serve

    if STRICT_SGLANG in words:
        from support import strict_sglang

        words.remove(STRICT_SGLANG)
        serve.build_app = strict_sglang.build_app
    sys.stdout = _Told(send)  # type: ignore[assignment]
    os._exit(serve.main(words))
