"""The process group that carries weights from the trainer (rank 0) to servers, beside any group either of them has.

Built as SGLang builds its own, so that its servers can be members. The trainer's end is GroupSender, the base of
link.py; the built-in server and the vLLM worker call join_group.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from arealite.api.errors import WeightSyncError
from arealite.api.types import GroupPlace

GROUP_LIMIT_S = 60.0  # for all members to join, and for one broadcast
NCCL_LIMIT_S = 10 * GROUP_LIMIT_S  # at NCCL's own limit it ends the whole process, so ours comes long before
LEAVE_LIMIT_S = 10.0  # how long a process that ends waits for its groups to be gone
POLL_S = 0.0005  # how often the end of a broadcast is looked for
FAILURES = (RuntimeError, ValueError, OSError)  # what torch.distributed raises; its own classes are RuntimeErrors


def join_group(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    name: str,
    backend: str,
    limit_s: float = GROUP_LIMIT_S,
    store: dist.Store | None = None,
) -> dist.ProcessGroup:
    """Blocks until all `world_size` members have joined. `backend`: "gloo" or "nccl"; `store`: the trainer's own.

    Raises:
        WeightSyncError: not all members came within the limit, or the group cannot be made.
    """
    limit = timedelta(seconds=limit_s)
    try:
        if store is None:
            # Counts this member in: a trainer that made its store by torch's rendezvous waits for that.
            store = dist.TCPStore(address, port, world_size, is_master=False, timeout=limit, wait_for_workers=True)
        group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            dist.Backend(backend),
            dist.PrefixStore(name, store),
            group_name=c10d.GroupName(name),
            timeout=timedelta(seconds=NCCL_LIMIT_S) if backend == "nccl" else limit,
        )
    except FAILURES as error:
        raise WeightSyncError(
            f"cannot join the weight group {name!r} ({backend}, rank {rank} of {world_size}) at {address}:{port}"
            f" within {limit_s:g} s: {_first_line(error)}"
        ) from error
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def leave_group(group: dist.ProcessGroup) -> threading.Thread:
    """End the membership, at once and without waiting: the other members' broadcasts fail from now on. The thread that
    is returned ends when the group is gone."""

    def destroy() -> None:
        with suppress(*FAILURES, KeyError):  # it was broken already, or all groups of this process have ended
            if dist.get_backend(group) == "nccl":  # whose orderly end waits for a broadcast that will never come
                c10d._abort_process_group(group)
            else:
                dist.destroy_process_group(group)

    leaving = threading.Thread(target=destroy, name="leave weight group", daemon=True)
    leaving.start()
    # A daemon thread that comes back from C++ while Python shuts down takes the whole process with it (SIGABRT).
    atexit.register(leaving.join, LEAVE_LIMIT_S)
    return leaving


def broadcast(
    group: dist.ProcessGroup,
    tensors: Sequence[torch.Tensor],
    limit_s: float = GROUP_LIMIT_S,
    cancelled: threading.Event | None = None,
) -> None:
    """Blocks until each of the tensors, in order, has come from rank 0.

    Raises:
        WeightSyncError: a member has left, the limit has passed, or `cancelled` was set. The group is of no use then.
    """
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    deadline = time.monotonic() + limit_s
    try:
        works = [group.broadcast([tensor], options) for tensor in tensors]
        for work in works:
            while not work.is_completed():
                if cancelled is not None and cancelled.is_set():
                    raise WeightSyncError("the broadcast was given up, because a server refused it")
                if time.monotonic() > deadline:
                    raise WeightSyncError(f"a member did not take part in the broadcast for {limit_s:g} s")
                time.sleep(POLL_S)
            work.wait()
    except FAILURES as error:
        raise WeightSyncError(f"the broadcast broke off: {_first_line(error)}") from error


class GroupSender:
    """The trainer's end: rank 0, which hosts the store and is the source of every broadcast. All but `cancel` block,
    and are called in a thread."""

    _numbers = itertools.count()

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._group: dist.ProcessGroup | None = None
        self._meeting: tuple[GroupPlace, dist.TCPStore] | None = None
        self._leaving: threading.Thread | None = None
        self._cancelled = threading.Event()

    def listen(self, world_size: int, towards: str) -> GroupPlace:
        """Open a new meeting place, of `world_size` members, that the host `towards` can reach; ends the old group."""
        self.leave()
        address = own_address(towards)
        limit = timedelta(seconds=GROUP_LIMIT_S)
        try:
            store = dist.TCPStore(address, 0, world_size, is_master=True, timeout=limit, wait_for_workers=False)
        except FAILURES as error:
            raise WeightSyncError(f"cannot listen for servers at {address}: {_first_line(error)}") from error
        name = f"weights-{os.getpid()}-{next(self._numbers)}"
        place = GroupPlace(address, store.port, world_size, name, self.backend)
        self._meeting = place, store
        return place

    def join(self) -> None:
        """Become rank 0 of the group at the place opened last. Raises WeightSyncError as join_group does."""
        meeting = self._meeting
        assert meeting is not None, "listen first"
        place, store = meeting
        group = join_group(place.address, place.port, 0, place.world_size, place.name, self.backend, store=store)
        if self._meeting is not meeting:  # given up meanwhile
            leave_group(group)
            raise WeightSyncError(f"the weight group {place.name!r} was given up")
        self._group = group

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Raises WeightSyncError as `broadcast` above does."""
        if self._group is None:
            raise WeightSyncError("there is no weight group to broadcast in")
        broadcast(self._group, [tensor], cancelled=self._cancelled)

    def cancel(self) -> None:
        """Let a broadcast that runs in another thread fail."""
        self._cancelled.set()

    def leave(self, waits: bool = False) -> None:
        """Leave the group, if there is one. `waits` until it is gone, or the limit has passed: a process that goes on
        to end all of its groups must not destroy this one in two threads."""
        group, self._group, self._meeting = self._group, None, None
        self._cancelled = threading.Event()
        if group is not None:
            self._leaving = leave_group(group)
        if waits and self._leaving is not None:
            self._leaving.join(LEAVE_LIMIT_S)


def own_address(towards: str) -> str:
    """The address of this machine that the host `towards` sees. Nothing is sent."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise WeightSyncError(f"no way from this machine to the server host {towards!r}: {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
