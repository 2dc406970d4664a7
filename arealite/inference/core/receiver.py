"""New weights: received from the trainer's group or read by weights/receive.py, checked whole, then copied.

The routes of control.py receive, in threads; the engine thread copies into the live parameters between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache

import torch
import torch.distributed as dist

from arealite.api.errors import RequestError, WeightSyncError
from arealite.api.types import GroupPlace, TensorSlot
from arealite.inference.core.served_model import ServedModel
from arealite.observe import waits
from arealite.weights.group import GROUP_LIMIT_S, broadcast, join_group, leave_group
from arealite.weights.naming import HubPart
from arealite.weights.wire import cut

SHOWN_NAMES = 5  # names listed in an error message
JOIN_SLACK_S = 10.0
MAX_GROUPS = 4  # a trainer makes a new group when it has lost a server; the oldest is left then
BACKENDS = ("gloo", "nccl")

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class Groups:
    """The process groups that the server is a member of, by name; the trainer is rank 0 of each. `device`: of the
    served model."""

    def __init__(self, device: torch.device, limit_s: float = GROUP_LIMIT_S) -> None:
        """`limit_s`: to reach the store, and again for all to be there."""
        self._device = device
        self._limit_s = limit_s
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
            where = place.address, place.port, rank, place.world_size, place.name, place.backend
            return join_group(*where, limit_s=self._limit_s)

        limit_s = 2 * self._limit_s + JOIN_SLACK_S
        group = await waits.in_thread(meet, f"weight group {place.name}", "trainer", limit_s)
        self._groups[place.name] = (group, self._device if place.backend == "nccl" else torch.device("cpu"))
        for name in list(self._groups)[:-MAX_GROUPS]:
            self.leave(name)

    def leave(self, name: str) -> None:
        if name in self._groups:
            leave_group(self._groups.pop(name)[0])

    def receive(self, name: str, slots: list[TensorSlot], is_flat: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """What the trainer is about to broadcast: tensors one by one, or (`is_flat`) as one run of their bytes. Blocks
        until it has come.

        Raises:
            WeightSyncError: no such group, or the broadcast failed: then the group is of no use any more, and left.
        """
        if name not in self._groups:
            known = ", ".join(self._groups) or "none"
            raise WeightSyncError(f"group_name: this server is in no group {name!r} (in: {known})")
        group, device = self._groups[name]
        if is_flat:
            tensors = [torch.empty(sum(slot.nbytes for slot in slots), dtype=torch.uint8, device=device)]
        else:
            tensors = [torch.empty(slot.shape, dtype=getattr(torch, slot.dtype), device=device) for slot in slots]
        try:
            broadcast(group, tensors)
        except WeightSyncError:
            self.leave(name)
            raise
        whole = [cut(tensors[0], slot) for slot in slots] if is_flat else tensors
        yield from zip((slot.name for slot in slots), whole, strict=True)


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


def check_names(model: ServedModel, names: Iterable[str]) -> None:
    """Raises WeightSyncError when the model has no tensor of one of the names."""
    if unknown := [name for name in names if name not in model.tensors]:
        raise WeightSyncError(f"the served model has no tensor named {_listed(unknown)}")


def check_slots(model: ServedModel, slots: Iterable[TensorSlot]) -> None:
    """Before bytes are read by these descriptions. Raises WeightSyncError: one does not fit the served tensor."""
    for slot in slots:
        _check(model, slot.name, slot.shape, slot.dtype)
        wanted = model.tensors[slot.name].nbytes
        if slot.nbytes != wanted:
            raise WeightSyncError(
                f"{slot.name}: {slot.nbytes} bytes in the update; {slot.dtype} {list(slot.shape)} takes {wanted}"
            )


def _check(
    model: ServedModel, name: str, shape: tuple[int, ...], dtype: torch.dtype | str, castable: bool = False
) -> None:
    """A tensor of an update must fit the served one; where `castable`, one float dtype fits another."""
    check_names(model, [name])
    live = model.tensors[name]
    if shape != tuple(live.shape):
        raise WeightSyncError(f"{name}: shape {list(shape)} in the update, {list(live.shape)} in the served model")
    castable = castable and isinstance(dtype, torch.dtype) and dtype.is_floating_point and live.is_floating_point()
    if str(dtype).removeprefix("torch.") != str(live.dtype).removeprefix("torch.") and not castable:
        raise WeightSyncError(
            f"{name}: {dtype} in the update, {live.dtype} in the served model; publish in the dtype that the server was"
            " started with"
        )


def stage(
    model: ServedModel, read: Callable[[], NamedTensors], castable: bool, needs_all: bool
) -> dict[str, torch.Tensor]:
    """The new values that `read` gives, by `model.tensor_names`, where and as what the model is served: loading them is
    a copy there. Nothing is changed yet; another thread than the engine's may call.

    `castable`: any float dtype is taken, and cast as at load; else the served one. `needs_all`: of the model's tensors.

    Raises:
        WeightSyncError: unreadable, or a name, shape or dtype is wrong, or a tensor is missing.
    """
    staged: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in list(read()):  # all of a broadcast, before any is refused: the trainer is sending
            _check(model, name, tuple(tensor.shape), tensor.dtype, castable)
            for part in model.hub_parts.get(name, (HubPart(name),)):
                if part.name in staged:
                    raise WeightSyncError(f"the update has {part.name!r} twice")
                staged[part.name] = tensor[part.index]
        if model.device.type == "cpu":
            staged = {name: tensor.to(model.tensors[name].dtype) for name, tensor in staged.items()}
        else:  # beside the GPU's other work; what it has no room for now stays on the host until it is loaded
            stream = _copy_stream(model.device)
            with torch.cuda.stream(stream), suppress(torch.OutOfMemoryError):
                for name, tensor in staged.items():
                    staged[name] = tensor.to(model.device, model.tensors[name].dtype)
            stream.synchronize()
    except (OSError, ValueError, RuntimeError) as error:  # a file that vanished, a path that is none, no memory left
        raise WeightSyncError(f"cannot read the weights: {error}") from error
    missing = [name for name in model.tensor_names if name not in staged]
    if missing and needs_all:
        raise WeightSyncError(
            f"{len(missing)} of the model's {len(model.tensor_names)} tensors are missing from the update:"
            f' {_listed(missing)}; send all of them, or "partial": true'
        )
    return {name: staged[name] for name in model.tensor_names if name in staged}


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def load(model: ServedModel, staged: dict[str, torch.Tensor]) -> None:
    """Copy the staged values into the live tensors."""
    with torch.no_grad():
        for name, tensor in staged.items():
            model.tensors[name].copy_(tensor)
    model.refresh()
    if model.device.type == "cuda":  # what was staged may be let go of now
        torch.cuda.current_stream().synchronize()


def confirmed(model: ServedModel, staged: dict[str, torch.Tensor], names: list[str]) -> set[str]:
    """Those of `names` whose live tensors are byte for byte what was staged; on a GPU without a copy to the host."""
    equal = {
        name: torch.eq(_bytes(model.tensors[name]), _bytes(staged[name])).all()
        for name in names
        if name in staged and staged[name].device == model.device
    }
    is_equal = torch.stack(list(equal.values())).tolist() if equal else []  # a GPU is waited for once
    return {name for name, is_same in zip(equal, is_equal, strict=True) if is_same}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
