"""Weights on their way: as bytes in memory, as safetensors files, and in the process group that broadcasts them.

Both ends use it: link.py on the trainer; the built-in server (inference/core/weight_updates.py) and vllm_worker.py,
which runs under vLLM's interpreter. engine/export.py writes a run's results with it.
"""

from __future__ import annotations

import atexit
import itertools
import json
import math
import mmap
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed import distributed_c10d as c10d

from arealite.api.errors import WeightSyncError
from arealite.api.types import GroupPlace, TensorSlot, WeightUpdateMeta
from arealite.models.folder import INDEX, SINGLE

SHARD_BYTES = 2 << 30  # of one file, and what the writing rank holds of the weights at one time
MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
GROUP_LIMIT_S = 60.0  # for all members to join, and for one broadcast
NCCL_LIMIT_S = 10 * GROUP_LIMIT_S  # at NCCL's own limit it ends the whole process, so ours comes long before
LEAVE_LIMIT_S = 10.0  # how long a process that ends waits for its groups to be gone
POLL_S = 0.0005  # how often the end of a broadcast is looked for
FAILURES = (RuntimeError, ValueError, OSError)  # what torch.distributed raises; its own classes are RuntimeErrors


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of the tensor's raw bytes in row-major order, in its own dtype; any shape, any device."""
    return zlib.crc32(raw_bytes(tensor.detach().cpu()).numpy().data)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [nbytes], row by row; a view where `tensor` is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def slot_of(name: str, tensor: torch.Tensor, offset: int) -> TensorSlot:
    """The description of a tensor that lies at this byte."""
    return TensorSlot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, tensor.nbytes)


def cut(flat: torch.Tensor, slot: TensorSlot) -> torch.Tensor:
    """A view of the tensor that lies at `slot` in the bytes `flat` (uint8 [N]).

    Raises:
        WeightSyncError: no such dtype, or the bytes, the shape and the alignment do not fit each other.
    """
    dtype = torch.__dict__.get(slot.dtype)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(f"{slot.name}: torch has no dtype {slot.dtype!r}")
    part = flat[slot.offset : slot.offset + slot.nbytes]
    is_there = slot.offset >= 0 and len(part) == slot.nbytes
    if not is_there or min(slot.shape, default=0) < 0 or math.prod(slot.shape) * dtype.itemsize != slot.nbytes:
        raise WeightSyncError(
            f"{slot.name}: {slot.dtype} {list(slot.shape)} does not fit {slot.nbytes} bytes at {slot.offset} of"
            f" {len(flat)}"
        )
    if (flat.data_ptr() + slot.offset) % dtype.itemsize:
        raise WeightSyncError(
            f"{slot.name}: unaligned: its offset {slot.offset} is no multiple of {dtype.itemsize}, the bytes of one"
            f" {slot.dtype}; sort the tensors of a bucket by the size of their elements, largest first"
        )
    return part.view(dtype).reshape(slot.shape)


# -- files and shared memory -------------------------------------------------------------------------------------------


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """One file in an existing folder, or several with an index, under the names that transformers gives them. Raises
    OSError or, without a class of its own for a full disk, SafetensorError."""
    weight_map: dict[str, int] = {}
    num_files = num_bytes = 0
    for shard in _shards(tensors, shard_bytes):
        num_files += 1
        save_file(shard, folder / f"{num_files}", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, num_files)
        num_bytes += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # before the next one is filled
    names = {n: f"model-{n:05d}-of-{num_files:05d}.safetensors" for n in range(1, num_files + 1)}
    if num_files == 1:
        names = {1: SINGLE}
    else:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": {k: names[n] for k, n in weight_map.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for number, name in names.items():
        (folder / f"{number}").rename(folder / name)


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of at most `shard_bytes` together, or a larger one alone."""
    shard: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if shard and num_bytes + tensor.nbytes > shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
        tensor = tensor.detach().cpu()
        # A file holds no two tensors of one memory, and a part must not keep all of its tensor alive.
        is_part = tensor.nbytes < tensor.untyped_storage().nbytes()
        shard[name] = tensor.clone() if is_part else tensor.contiguous()
        num_bytes += tensor.nbytes
    yield shard


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Write `tensors` (PEFT's names) and adapter_config.json's `settings` into an existing folder. Raises OSError."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def iterate_tensors(meta: WeightUpdateMeta) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, CPU tensor in the wire dtype).

    A tensor from shared memory is a view that is valid until the trainer publishes the next version: copy it.

    Raises:
        WeightSyncError: nothing is there, or it is shorter than its description.
    """
    if meta.kind == "shm":
        memory = _map(meta)
        yield from ((slot.name, cut(memory, slot)) for slot in meta.slots)
        return
    files = sorted(Path(meta.path).glob("*.safetensors"))
    if not files:
        raise WeightSyncError(f"no *.safetensors file in {meta.path}; expected a Hugging Face model folder")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightSyncError(f"{path} is not a whole safetensors file: {error}") from error


def _map(meta: WeightUpdateMeta) -> torch.Tensor:
    """uint8 [bytes], the trainer's own pages."""
    end = max((slot.offset + slot.nbytes for slot in meta.slots), default=0)
    try:
        with open(meta.path, "rb") as file:
            size = file.seek(0, 2)
            # A private map is writable, as torch wants it, and still shares the trainer's pages.
            view = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else None
    except OSError as error:
        raise WeightSyncError(
            f"cannot map the trainer's weights at {meta.path}: {error}; shared memory needs trainer and server on one"
            " host and under one user, otherwise set weight_update: disk"
        ) from error
    if view is None or end > size:
        raise WeightSyncError(f"{meta.path} holds {size} bytes, the update describes {end}; publish the weights again")
    with suppress(OSError):  # an older kernel: then the first copy meets each page
        view.madvise(MADV_POPULATE_READ)
    return torch.frombuffer(view, dtype=torch.uint8)


# -- the process group -------------------------------------------------------------------------------------------------


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
            timeout=limit if backend == "gloo" else timedelta(seconds=NCCL_LIMIT_S),
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
