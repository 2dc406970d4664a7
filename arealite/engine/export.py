"""Whole tensors out of a sharded model: for the servers, and as a Hugging Face folder. For engine/fsdp_engine.py."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch.distributed.tensor import DTensor

from arealite.engine.checkpoint import partial_name, put_in_place

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.model"
)  # fmt: skip


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is sharded over the ranks. Collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(model: Any, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor in `dtype` on `device`) of a transformers model; a tied weight comes once, by its first
    name.

    Every rank must iterate to the end: gathering a sharded tensor is a collective call.
    """
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)  # before gathering: half the bytes travel
        yield name, whole(tensor).to(device)


def write_folder(path: str, tensors: dict[str, torch.Tensor], model: Any, dtype: torch.dtype, source: str) -> None:
    """Write a Hugging Face folder: weights, config, generation config, and the tokenizer files of `source`.

    It is written beside `path` and renamed, so that `path` is whole or absent at any time. Raises OSError.
    """
    final = Path(path)
    partial = partial_name(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_torch_state_dict(tensors, partial, metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.use_cache = True
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(partial)
    for file in tokenizer_files(source):
        shutil.copy2(file, partial / file.name)
    put_in_place(partial, final)


def tokenizer_files(source: str) -> list[Path]:
    """The tokenizer files of a model folder or hub id."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=list(TOKENIZER_FILES)))
    return sorted({f for pattern in TOKENIZER_FILES for f in folder.glob(pattern) if f.is_file()})
