"""Whole tensors out of a sharded model: for the servers, and as a Hugging Face folder. For engine/sharded_model.py."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch.distributed.tensor import DTensor

from arealite.api.atomic import new_folder
from arealite.models.folder import read_config
from arealite.weights.wire import SHARD_BYTES, write_adapter, write_tensors

CODE_FILES = ("*.py",)  # of an architecture or a tokenizer that transformers does not have
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "*.spm", "*.codes", "tekken.json", "chat_template*", "additional_chat_templates/*", "*processor_config.json",
    *CODE_FILES,
)  # fmt: skip


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is sharded over the ranks. Collective if it is."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to(tensor.device_mesh.device_type)  # offloaded shards are on the CPU, and the ranks talk there
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(
    model: Any, dtype: torch.dtype, device: torch.device, name_of: Callable[[str], str | None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, tensor in `dtype` on `device`) of a transformers model; a tied weight comes once, by its first
    name. `name_of`: a parameter's name in the checkpoint; None leaves it out.

    Every rank must iterate to the end: gathering a sharded tensor is a collective call.
    """
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        written = name_of(name)
        if id(tensor) in seen or written is None:
            continue
        seen.add(id(tensor))
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)  # before gathering: half the bytes travel
        yield written, whole(tensor).to(device)


def write_folder(
    path: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    model: Any,
    dtype: torch.dtype,
    source: str,
    end_token: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder: weights, config, generation config, and the tokenizer files of `source`, whose
    `end_token` ends generation beside those of the model.

    It is written beside `path` and renamed, so that `path` is whole or absent at any time. `tensors` are iterated to
    the end in any case, since other ranks take part in that. Raises OSError or SafetensorError.
    """
    try:
        with new_folder(Path(path)) as folder:
            write_tensors(folder, tensors, shard_bytes)
            _write_configs(folder, model, dtype, end_token)
            _copy(model.config.name_or_path, CODE_FILES, folder)
            _copy(source, TOKENIZER_FILES, folder)
    finally:
        for _ in tensors:
            pass


def _write_configs(folder: Path, model: Any, dtype: torch.dtype, end_token: int | None) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.use_cache = True
    config.architectures = [type(model).__name__]
    written = _for_all_readers(json.loads(config.to_json_string()), read_config(_folder(config.name_or_path)))
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    if model.can_generate() and model.generation_config is not None:
        generation = copy.deepcopy(model.generation_config)
        ends = generation.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if end_token not in (None, *ends):
            generation.eos_token_id = [*ends, end_token]
        generation.to_json_file(folder / "generation_config.json")  # as the source has it, be it valid or not


def write_adapter_folder(path: str, tensors: dict[str, torch.Tensor], settings: dict[str, Any], source: str) -> None:
    """Write a LoRA adapter in PEFT's format and the tokenizer files of `source`, as `write_folder` does."""
    with new_folder(Path(path)) as folder:
        write_adapter(folder, tensors, settings)
        _copy(source, TOKENIZER_FILES, folder)


def _for_all_readers(written: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """What transformers writes of a configuration, with the keys of the source that it knows no more, and with those
    by which older releases and other programs read ropes and the dtype."""
    out = source | written
    for name, value in written.items():
        if name.endswith("_config") and isinstance(value, dict):
            out[name] = _for_all_readers(value, source.get(name) or {})
    if "dtype" in written:
        out["torch_dtype"] = written["dtype"]
    ropes = written.get("rope_parameters") or {}
    if "full_attention" in ropes and not written["model_type"].startswith("gemma3"):
        return out  # ropes by kinds of layers had an older spelling in Gemma 3 alone
    rope = dict(ropes.get("full_attention") or ropes)
    out |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if "sliding_attention" in ropes:
        out["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = rope
    return out


def _copy(source: str, patterns: tuple[str, ...], target: Path) -> None:
    """The files of a model folder or hub id that fit the patterns."""
    folder = _folder(source, patterns)
    for file in (file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        place = target / file.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copy2(file, place)


def _folder(source: str, patterns: tuple[str, ...] = ("config.json",)) -> Path:
    folder = Path(source)
    return folder if folder.is_dir() else Path(snapshot_download(source, allow_patterns=list(patterns)))
