"""Trainer ranks as processes that start in a blink.

`on_ranks(4, work, ...)` runs the module-level function work(rank, ...) in 4 processes that have torchrun's environment
and have joined a gloo group; what each returned, in rank order. Used by tests of layouts.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from support.forks import LIMIT_S, context


def on_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Raises AssertionError with the traceback of the first rank that failed; ends all processes in any case."""
    with ranks(world_size, work, *args) as started:
        found = []
        for number, (rank, receive) in enumerate(started):
            assert receive.poll(LIMIT_S), f"rank {number} of {world_size} has not answered for {LIMIT_S:g} s"
            try:
                found.append(receive.recv())
            except EOFError:
                found.append((f"rank {number} died with exit code {rank.exitcode}", None))
            assert not found[-1][0], f"rank {number} of {world_size}: {found[-1][0]}"
        return [value for _, value in found]


@contextmanager
def ranks(world_size: int, work: Callable[..., Any], *args: Any) -> Iterator[list[tuple[Any, Any]]]:
    """The processes, and the pipes that they answer on; they are ended in any case."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    pipes = [context().Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context().Process(target=_rank, args=(send, rank, world_size, port, sys.path, work, args))
        for rank, (_, send) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, send in pipes:
            send.close()
        yield [(process, receive) for process, (receive, _) in zip(processes, pipes, strict=True)]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _rank(send: Any, rank: int, world_size: int, port: int, path: list[str], work: Any, args: Any) -> None:
    sys.path[:] = path
    os.environ.update(
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1",
        }
    )  # fmt: skip
    import torch

    from arealite.engine.parallel.ranks import join_ranks

    torch.set_num_threads(1)
    join_ranks(torch.device("cpu"), 120.0)
    try:
        outcome = ("", work(rank, *args))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    send.send(outcome)
    send.close()
    os._exit(0)  # groups of a failed rank may hang in their destructors
