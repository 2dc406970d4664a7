"""The weight groups that this server is a member of: joined, received from, left. Called by control.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from arealite.api.errors import RequestError, WeightSyncError
from arealite.api.types import GroupPlace, TensorSlot
from arealite.observe import waits
from arealite.weights.buckets import cut
from arealite.weights.group import GROUP_LIMIT_S, broadcast, join_group, leave_group

JOIN_SLACK_S = 10.0
MAX_GROUPS = 4  # a trainer makes a new group when it has lost a server; the oldest is left then
BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True)
class Incoming:
    """Tensors that a trainer is about to broadcast: one by one, or (`is_flat`) as one run of their bytes."""

    group: str
    slots: list[TensorSlot]
    is_flat: bool


class Groups:
    """Process groups by name; the trainer is rank 0 of each. `device`: of the served model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._groups: dict[str, tuple[dist.ProcessGroup, torch.device]] = {}

    async def join(self, place: GroupPlace, rank: int) -> None:
        """Raises WeightSyncError: not all members came, or it cannot be made here."""
        if place.backend not in BACKENDS or (place.backend == "nccl" and self._device.type != "cuda"):
            raise WeightSyncError(f"backend: expected {' or '.join(BACKENDS)} (nccl on a GPU), found {place.backend!r}")
        if not 0 < rank < place.world_size:
            raise WeightSyncError(
                f"rank_offset {rank} is no server's in a world of {place.world_size}; 0 is the trainer"
            )
        self.leave(place.name)

        def meet() -> dist.ProcessGroup:
            return join_group(place.address, place.port, rank, place.world_size, place.name, place.backend)

        limit_s = 2 * GROUP_LIMIT_S + JOIN_SLACK_S  # to reach the store, and for all to be there
        group = await waits.in_thread(meet, f"weight group {place.name}", "trainer", limit_s)
        self._groups[place.name] = (group, self._device if place.backend == "nccl" else torch.device("cpu"))
        for name in list(self._groups)[:-MAX_GROUPS]:
            self.leave(name)

    def leave(self, name: str) -> bool:
        """Whether there was such a group."""
        found = self._groups.pop(name, None)
        if found is not None:
            leave_group(found[0])
        return found is not None

    def receive(self, incoming: Incoming) -> Iterator[tuple[str, torch.Tensor]]:
        """Blocks until the broadcast has come.

        Raises:
            WeightSyncError: no such group, or the broadcast failed: then the group is of no use any more, and left.
        """
        found = self._groups.get(incoming.group)
        if found is None:
            known = ", ".join(self._groups) or "none"
            raise WeightSyncError(f"group_name: this server is in no group {incoming.group!r} (in: {known})")
        group, device = found
        slots = incoming.slots
        if incoming.is_flat:
            tensors = [torch.empty(sum(slot.nbytes for slot in slots), dtype=torch.uint8, device=device)]
        else:
            tensors = [torch.empty(slot.shape, dtype=getattr(torch, slot.dtype), device=device) for slot in slots]
        try:
            broadcast(group, tensors)
        except WeightSyncError:
            self.leave(incoming.group)
            raise
        if incoming.is_flat:
            yield from ((slot.name, cut(tensors[0], slot)) for slot in slots)
        else:
            yield from zip((slot.name for slot in slots), tensors, strict=True)


def layout(names: list[str], dtypes: list[str], shapes: list[list[int]], max_bytes: int) -> list[TensorSlot]:
    """The tensors end to end, in this order.

    Raises:
        RequestError: the lists do not fit each other, torch has no such dtype, or it is more than `max_bytes`.
    """
    if not len(names) == len(dtypes) == len(shapes):
        raise RequestError(f"names, dtypes and shapes: {len(names)}, {len(dtypes)} and {len(shapes)} of them")
    slots: list[TensorSlot] = []
    offset = 0
    for name, dtype_name, shape in zip(names, dtypes, shapes, strict=True):
        dtype = torch.__dict__.get(dtype_name)
        if not isinstance(dtype, torch.dtype):
            raise RequestError(f"dtypes: torch has no dtype {dtype_name!r}")
        nbytes = math.prod(shape) * dtype.itemsize
        slots.append(TensorSlot(name, dtype_name, tuple(shape), offset, nbytes))
        offset += nbytes
        if offset > max_bytes:
            raise RequestError(f"shapes: more than {max_bytes} bytes, which is several times the served model")
    return slots
