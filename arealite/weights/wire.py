"""Weights as bytes: where each tensor lies, how it is cut out again, and one number that both ends can compute of it.

Filled by link.py on the trainer; servers use `cut` and `checksum`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator

import torch

from arealite.api.errors import WeightSyncError
from arealite.api.types import TensorSlot

BUCKET_BYTES = 64 << 20  # of one broadcast


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


class Buckets:
    """The newest version as a few runs of bytes on `device`. The memory is used again for the next version."""

    def __init__(self, device: torch.device, bucket_bytes: int) -> None:
        self.device = device
        self.slots: list[list[TensorSlot]] = []
        self._bucket_bytes = bucket_bytes
        self._flat: list[torch.Tensor] = []  # uint8 [bucket_bytes, or the bytes of the one tensor that is larger]

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Take in all tensors, and hand each of them on. A bucket holds one dtype, end to end, so all are aligned."""
        self.slots = []
        newest: dict[torch.dtype, int] = {}
        for name, tensor in tensors:
            index = newest.get(tensor.dtype)
            if index is None or self._num_bytes(index) + tensor.nbytes > self._bucket_bytes:
                index = newest[tensor.dtype] = len(self.slots)
                self._make_room(index, tensor.nbytes)
                self.slots.append([])
            slot = slot_of(name, tensor, self._num_bytes(index))
            self._flat[index][slot.offset : slot.offset + slot.nbytes].copy_(raw_bytes(tensor))
            self.slots[index].append(slot)
            yield name, tensor
        del self._flat[len(self.slots) :]

    def bytes_of(self, index: int) -> torch.Tensor:
        """uint8 [bytes of the bucket's tensors]."""
        return self._flat[index][: self._num_bytes(index)]

    def _num_bytes(self, index: int) -> int:
        last = self.slots[index][-1:]
        return last[0].offset + last[0].nbytes if last else 0

    def _make_room(self, index: int, num_bytes: int) -> None:
        if index == len(self._flat) or len(self._flat[index]) < num_bytes:
            self._flat[index : index + 1] = [
                torch.empty(max(self._bucket_bytes, num_bytes), dtype=torch.uint8, device=self.device)
            ]
