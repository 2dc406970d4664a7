"""New weights into the live parameters: checked whole first, then copied. Called by the engine thread between steps.

The trainer's end, and reading what it published, are in weights/.
"""

from __future__ import annotations

import math

import torch

from arealite.api.errors import WeightSyncError
from arealite.api.types import WeightUpdateMeta
from arealite.inference.model import ServedModel
from arealite.weights.checksum import checksum
from arealite.weights.receive import iterate_tensors

SHOWN_NAMES = 5  # names listed in an error message


def check_names(model: ServedModel, names: list[str]) -> None:
    """Raises WeightSyncError when the model has no tensor of one of the names."""
    unknown = [name for name in names if name not in model.live_tensors()]
    if unknown:
        raise WeightSyncError(f"the model has no tensor named {_shown(unknown)}")


def checksums(model: ServedModel, names: list[str]) -> dict[str, int]:
    """CRC-32 of live tensors, in the dtype they are served in."""
    live = model.live_tensors()
    return {name: checksum(live[name]) for name in names}


def stage(model: ServedModel, meta: WeightUpdateMeta, partial: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (live tensor, new values) of a whole update; nothing is changed yet.

    Shared memory must bring the dtype that is served. A folder may bring any float dtype, and is cast as at load.

    Raises:
        WeightSyncError: unreadable, or a name, shape or dtype is wrong, or without `partial` a tensor is missing.
    """
    if meta.kind == "shm":
        _check_slots(meta)
    live = model.live_tensors()
    tied = model.tied_names()
    staged: dict[str, torch.Tensor] = {}
    for name, tensor in iterate_tensors(meta):
        if name in tied:
            continue
        if name not in live:
            raise WeightSyncError(f"the update has a tensor {name!r} that the served model does not have")
        if name in staged:
            raise WeightSyncError(f"the update has {name!r} twice")
        if tensor.shape != live[name].shape:
            raise WeightSyncError(
                f"{name}: shape {list(tensor.shape)} in the update, {list(live[name].shape)} in the served model"
            )
        castable = meta.kind == "disk" and tensor.is_floating_point() and live[name].is_floating_point()
        if tensor.dtype != live[name].dtype and not castable:
            raise WeightSyncError(
                f"{name}: {tensor.dtype} in the update, {live[name].dtype} in the served model; publish in the dtype"
                " that the server was started with"
            )
        staged[name] = tensor
    missing = [name for name in live if name not in staged]
    if missing and not partial:
        raise WeightSyncError(
            f"{len(missing)} of the model's {len(live)} tensors are missing from the update: {_shown(missing)}; send"
            ' all of them, or "partial": true'
        )
    return [(live[name], tensor) for name, tensor in staged.items()]


def load(staged: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the staged values into the live tensors."""
    with torch.no_grad():
        for target, source in staged:
            target.copy_(source)


def _check_slots(meta: WeightUpdateMeta) -> None:
    """A slot's dtype must be known and its bytes must be those of its shape, or the map would be read wrongly."""
    for slot in meta.slots:
        dtype = torch.__dict__.get(slot.dtype)
        if not isinstance(dtype, torch.dtype):
            raise WeightSyncError(f"{slot.name}: unknown dtype {slot.dtype!r} in the update")
        wanted = math.prod(slot.shape) * dtype.itemsize
        if min(slot.shape, default=0) < 0 or slot.offset < 0 or slot.nbytes != wanted:
            raise WeightSyncError(
                f"{slot.name}: {slot.nbytes} bytes at offset {slot.offset} in the update; {slot.dtype}"
                f" {list(slot.shape)} takes {wanted}"
            )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
