"""The trainer's end of a weight group for tests: a process of its own, because a group's members must be that."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import torch

from arealite.api.errors import WeightSyncError
from arealite.weights.wire import GroupSender, broadcast

WAIT_S = 60


class GroupTrainer:
    """`start` begins a call of the process; `result` ends it, and raises what it raised."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()

    def start(self, name: str, *arguments: Any) -> None:
        self._here.send((name, arguments))

    def result(self) -> Any:
        assert self._here.poll(WAIT_S), "the trainer's process does not answer"
        found = self._here.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def call(self, name: str, *arguments: Any) -> Any:
        self.start(name, *arguments)
        return self.result()

    def close(self) -> None:
        self._process.kill()
        self._process.join(WAIT_S)


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    sender = GroupSender("gloo")

    def send(raws: list[bytes]) -> None:
        assert sender._group is not None
        broadcast(sender._group, [torch.frombuffer(bytearray(raw), dtype=torch.uint8) for raw in raws], limit_s=30)

    calls = {"listen": sender.listen, "join": sender.join, "send": send, "close": sender.leave}
    while True:
        name, arguments = pipe.recv()
        try:
            pipe.send(calls[name](*arguments))
        except WeightSyncError as error:
            pipe.send(error)
