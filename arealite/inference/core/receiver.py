"""New weights into the live parameters: checked whole first, then copied. Called by the engine thread between steps.

The trainer's end, and reading what it published, are in weights/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache

import torch

from arealite.api.errors import WeightSyncError
from arealite.api.types import TensorSlot
from arealite.inference.core.served_model import ServedModel
from arealite.weights.checksum import checksum
from arealite.weights.naming import Part

SHOWN_NAMES = 5  # names listed in an error message


def check_names(model: ServedModel, names: Iterable[str]) -> None:
    """Raises WeightSyncError when the model has no tensor of one of the names."""
    unknown = [name for name in names if name not in model.tensors]
    if unknown:
        raise WeightSyncError(f"the served model has no tensor named {_listed(unknown)}")


def checksums(model: ServedModel, names: list[str]) -> dict[str, int]:
    """CRC-32 of live tensors, in the dtype they are served in. Raises WeightSyncError as `check_names` does."""
    check_names(model, names)
    return {name: checksum(model.tensors[name]) for name in names}


def check_slots(model: ServedModel, slots: Iterable[TensorSlot]) -> None:
    """Before bytes are read by these descriptions. Raises WeightSyncError: one does not fit the served tensor."""
    for slot in slots:
        _check(model, slot.name, slot.shape, slot.dtype)
        wanted = model.tensors[slot.name].nbytes
        if slot.nbytes != wanted:
            raise WeightSyncError(
                f"{slot.name}: {slot.nbytes} bytes in the update; {slot.dtype} {list(slot.shape)} takes {wanted}"
            )


def stage(
    model: ServedModel, read: Callable[[], Iterable[tuple[str, torch.Tensor]]], castable: bool, needs_all: bool
) -> dict[str, torch.Tensor]:
    """The new values that `read` gives, by `model.tensor_names`; nothing is changed yet. Another thread than the
    engine's may call.

    `castable`: any float dtype is taken, and cast as at load; else the served one. `needs_all`: of the model's tensors.

    Raises:
        WeightSyncError: unreadable, or a name, shape or dtype is wrong, or a tensor is missing.
    """
    staged: dict[str, torch.Tensor] = {}
    try:
        came = list(read())  # all of a broadcast, before anything of it is refused: the trainer is sending
        for name, tensor in came:
            _check(model, name, tuple(tensor.shape), tensor.dtype, castable)
            for part in model.hub_parts.get(name, (Part(name),)):
                if part.name in staged:
                    raise WeightSyncError(f"the update has {part.name!r} twice")
                staged[part.name] = tensor[part.index]
        _move(model, staged)
    except (OSError, ValueError, RuntimeError) as error:  # a file that vanished, a path that is none, no memory left
        raise WeightSyncError(f"cannot read the weights: {error}") from error
    missing = [name for name in model.tensor_names if name not in staged]
    if missing and needs_all:
        raise WeightSyncError(
            f"{len(missing)} of the model's {len(model.tensor_names)} tensors are missing from the update:"
            f' {_listed(missing)}; send all of them, or "partial": true'
        )
    return {name: staged[name] for name in model.tensor_names if name in staged}


def _move(model: ServedModel, staged: dict[str, torch.Tensor]) -> None:
    """To where and as what the model is served, so that loading them is a copy there: on a GPU beside its other work.
    For what it has no room for now, when they are loaded."""
    if model.device.type == "cpu":
        for name, tensor in staged.items():
            staged[name] = tensor.to(model.tensors[name].dtype)
        return
    stream = _copy_stream(model.device)
    with torch.cuda.stream(stream), suppress(torch.OutOfMemoryError):
        for name, tensor in staged.items():
            staged[name] = tensor.to(model.device, model.tensors[name].dtype)
    stream.synchronize()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def confirmed(model: ServedModel, staged: dict[str, torch.Tensor], names: list[str]) -> set[str]:
    """Those of `names` whose live tensors are byte for byte what was staged; on a GPU without a copy to the host."""
    here = [name for name in names if name in staged and staged[name].device == model.device]
    pairs = ((_bytes(model.tensors[name]), _bytes(staged[name])) for name in here)
    same = [torch.eq(live, new).all() for live, new in pairs]
    return {name for name, is_same in zip(here, torch.stack(same).tolist() if same else [], strict=True) if is_same}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def load(model: ServedModel, staged: dict[str, torch.Tensor]) -> None:
    """Copy the staged values into the live tensors."""
    with torch.no_grad():
        for name, tensor in staged.items():
            model.tensors[name].copy_(tensor)
    model.refresh()
    if model.device.type == "cuda":  # what was staged may be let go of now
        torch.cuda.current_stream().synchronize()


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


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
