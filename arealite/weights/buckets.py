"""Weights as a few flat buckets of bytes: what is broadcast or sent in a body when servers share no memory and no disk.

Filled by link.py on the trainer; a server cuts them again with `cut`.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import torch

from arealite.api.errors import WeightSyncError
from arealite.api.types import TensorSlot

BUCKET_BYTES = 64 << 20  # of one broadcast, or of one body before base64


class Buckets:
    """The newest version, on `device`. The memory is used again for the next version."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat: list[torch.Tensor] = []  # uint8 [BUCKET_BYTES, or the bytes of the one tensor that is larger]
        self.slots: list[list[TensorSlot]] = []

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Take in all tensors, and hand each of them on. A bucket holds one dtype, end to end, so all are aligned."""
        self.slots = []
        newest: dict[torch.dtype, int] = {}
        for name, tensor in tensors:
            index = newest.get(tensor.dtype)
            if index is None or self.num_bytes(index) + tensor.nbytes > BUCKET_BYTES:
                index = newest[tensor.dtype] = self._new_bucket(tensor.nbytes)
            slot = slot_of(name, tensor, self.num_bytes(index))
            place = self.flat[index][slot.offset : slot.offset + slot.nbytes]
            place.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
            self.slots[index].append(slot)
            yield name, tensor
        del self.flat[len(self.slots) :]

    def bytes_of(self, index: int) -> torch.Tensor:
        """uint8 [bytes of the bucket's tensors]."""
        return self.flat[index][: self.num_bytes(index)]

    def num_bytes(self, index: int) -> int:
        last = self.slots[index][-1:]
        return last[0].offset + last[0].nbytes if last else 0

    def as_text(self, index: int) -> str:
        """The bucket as SGLang reads it from a body: a base64 pickle of the bytes and of where each tensor lies."""
        layout = [
            SimpleNamespace(
                name=slot.name,
                shape=torch.Size(slot.shape),
                dtype=getattr(torch, slot.dtype),
                start_idx=slot.offset,
                end_idx=slot.offset + slot.nbytes,
                numel=slot.nbytes,
            )
            for slot in self.slots[index]
        ]
        flat = self.bytes_of(index).cpu().clone()  # a view would be pickled with all of its storage
        return base64.b64encode(pickle.dumps({"flattened_tensor": flat, "metadata": layout})).decode("ascii")

    def _new_bucket(self, num_bytes: int) -> int:
        index, size = len(self.slots), max(BUCKET_BYTES, num_bytes)
        if index == len(self.flat):
            self.flat.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        elif len(self.flat[index]) < size:
            self.flat[index] = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.slots.append([])
        return index


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
    num = 1
    for size in slot.shape:
        num *= size
    if (
        slot.offset < 0
        or len(part) != slot.nbytes
        or num * dtype.itemsize != slot.nbytes
        or min(slot.shape, default=0) < 0
    ):
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
