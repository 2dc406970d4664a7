"""One number per tensor that both ends of a weight link can compute. Used by link.py and by the servers' receivers."""

from __future__ import annotations

import zlib

import torch


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of the tensor's raw bytes in row-major order, in its own dtype; any shape, any device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)
