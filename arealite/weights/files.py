"""Weights as safetensors files, written tensor by tensor: a model's, and a LoRA adapter's in PEFT's format.

Called by link.py (for the servers) and engine/checkpoint/export.py (a result).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from arealite.models.folder import INDEX, SINGLE

SHARD_BYTES = 2 << 30  # of one file, and what the writing rank holds of the weights at one time


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
