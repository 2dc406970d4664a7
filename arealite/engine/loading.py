"""A model built without memory for its weights, and a checkpoint from which each rank reads just its own shards.

Called by engine/packed_model.py, which builds, and by engine/sharded_model.py, which fills the model once it is spread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, GenerationConfig

from arealite.api.errors import ConfigError, listed
from arealite.models.folder import stored_tensors
from arealite.models.naming import HubPart, hub_parts

FLOATS = ("F64", "F32", "F16", "BF16")
OLD_BUFFERS = r"rotary_emb\.inv_freq$"  # older checkpoints hold what the model computes from its configuration
COMPARED_ROWS = 8192  # of a tied weight that the checkpoint has twice, at one time


def build_model(path: str, config: Any, auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model of a Hugging Face folder or hub id in float32; parameters without memory, buffers as they should be.

    `options` go to transformers' `from_config`. Raises ConfigError: it is quantised.
    """
    if "quantization_config" in config.to_dict():
        raise ConfigError(f"{path} is quantised, and training needs its full weights: take the model it was made from")
    with _weightless():
        model = auto_class.from_config(config, dtype=torch.float32, **options)
    if model.can_generate():
        with suppress(OSError):  # the folder has none: what the configuration says about generation counts
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters lose their memory before anything is written to it; buffers stay."""

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        hook.remove()


def materialize(root: nn.Module, device: torch.device) -> None:
    """Give all meta tensors of `root` memory on `device`, with any numbers in it; a sharded one that of this rank's
    shard."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, so ties hold
    try:
        root._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class Checkpoint:
    """The safetensors of a folder or hub id, and which of them make up each tensor of a model.

    Made from the whole model, before ranks drop layers that others compute; all ranks come to the same verdict.
    """

    def __init__(self, path: str, model: Any, ignore: tuple[str, ...] = ()) -> None:
        """`ignore`: regular expressions of names that the model or the checkpoint may have alone.

        Raises:
            ConfigError: no safetensors there, or tensors that are missing, left over, misshapen or no plain floats.
        """
        self.folder = _local_folder(path)
        self._stored = stored_tensors(self.folder)
        if others := [f"{name} {t.dtype}" for name, t in self._stored.items() if t.dtype not in FLOATS]:
            raise ConfigError(
                f"{len(others)} tensors are no plain floats ({listed(others)}), so the checkpoint is quantised;"
                " training needs the full weights: take the model it was made from"
            )
        self.hub_parts = hub_parts(model)  # the names that it would have on the hub, however this one is written
        self._parts: dict[str, tuple[HubPart, ...]] = {}
        tensors = model.state_dict(keep_vars=True)
        first_names: dict[int, str] = {}
        wrong: dict[str, list[str]] = {"missing": [], "left over": [], "misshapen": []}
        for name, tensor in tensors.items():
            first = first_names.setdefault(id(tensor), name)
            parts = self._find(name, model.base_model_prefix) or self._parts.get(first)
            if parts is None:
                wrong["missing"].append(name)
                continue
            self._parts[name] = parts
            if self._parts.setdefault(first, parts) is parts and first in wrong["missing"]:
                wrong["missing"].remove(first)  # the checkpoint has a tied weight under its second name only
        used = {part.name for parts in self._parts.values() for part in parts}
        wrong["left over"] = [name for name in self._stored if name not in used]
        for name, parts in self._parts.items():
            empty = torch.empty_like(tensors[name], device="meta")
            for part in parts:
                wanted, found = list(empty[part.index].shape), self._stored[part.name].shape
                wrong["misshapen"] += [f"{part.name} {found} for {wanted}"] if found != wanted else []
        ignored = [*ignore, *(model._keys_to_ignore_on_load_unexpected or ()), OLD_BUFFERS]
        self._refuse(path, model, {kind: _besides(names, ignored) for kind, names in wrong.items()})
        with _reading(self.folder):
            for name, tensor in tensors.items():
                self._check_tie(name, first_names[id(tensor)])

    def _find(self, name: str, prefix: str) -> tuple[HubPart, ...] | None:
        """What makes up a tensor: its hub names, or its own, each also with or without the base model's prefix."""
        for parts in (self.hub_parts[name], (HubPart(name),)):
            for rename in (str, lambda n: n.removeprefix(f"{prefix}."), lambda n: f"{prefix}.{n}"):
                renamed = tuple(HubPart(rename(part.name), part.index) for part in parts)
                if all(part.name in self._stored for part in renamed):
                    return renamed
        return None

    def _refuse(self, path: str, model: Any, wrong: dict[str, list[str]]) -> None:
        told = [f"{len(names)} tensors {kind} ({listed(names)})" for kind, names in wrong.items() if names]
        if told:
            raise ConfigError(
                f"{path} is no whole checkpoint of a {type(model).__name__} as its config.json describes it:"
                f" {', '.join(told)}; download or export it again, or correct config.json"
            )

    def _check_tie(self, name: str, first: str) -> None:
        """A tied weight that the checkpoint has twice must be the same both times."""
        if name == first or self._parts.get(name) == self._parts.get(first):
            return
        with ExitStack() as opened:
            one, other = (self._slices(self._parts[n][0].name, {}, opened) for n in (first, name))
            for row in range(0, one.get_shape()[0], COMPARED_ROWS):
                if not torch.equal(one[row : row + COMPARED_ROWS], other[row : row + COMPARED_ROWS]):
                    raise ConfigError(
                        f"{self.folder}: config.json ties {name} to {first}, and the checkpoint has different numbers"
                        " for them: set tie_word_embeddings to false in its config.json"
                    )

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor that the model calls `name`."""
        return name in self._parts

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill the live tensors, sharded or not, by name as in the model's `state_dict`; what this rank does not hold
        of them is not read. Names that the checkpoint may lack stay as they are.

        Raises:
            ConfigError: a file cannot be read.
        """
        done: set[int] = set()
        opened: dict[Path, Any] = {}
        with torch.no_grad(), ExitStack() as stack, _reading(self.folder):
            for name, tensor in tensors.items():
                if id(tensor) in done or name not in self._parts:
                    continue
                done.add(id(tensor))
                local, begins = _own_shard(tensor)
                for part in self._parts[name]:
                    _copy_overlap(local, begins, part, tensor.shape, self._slices(part.name, opened, stack))

    def _slices(self, name: str, opened: dict[Path, Any], stack: ExitStack) -> Any:
        file = self._stored[name].file
        if file not in opened:
            opened[file] = stack.enter_context(safe_open(file, "pt"))
        return opened[file].get_slice(name)


def _own_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The numbers of a tensor that this rank holds, and where they begin in it."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, begins = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), begins


def _copy_overlap(local: torch.Tensor, begins: tuple[int, ...], part: HubPart, shape: torch.Size, source: Any) -> None:
    """What `part` of a tensor of `shape` shares with the shard `local`, which begins at `begins`, from its slices."""
    if not local.numel():
        return
    to: list[slice] = []
    take: list[slice] = []
    for dim, size in enumerate(shape):
        cut = part.index[dim] if dim < len(part.index) else slice(0, size)
        begin, end = (cut, cut + 1) if isinstance(cut, int) else (cut.start, cut.stop)
        low, high = max(begin, begins[dim]), min(end, begins[dim] + local.shape[dim])
        if low >= high:
            return
        to.append(slice(low - begins[dim], high - begins[dim]))
        if not isinstance(cut, int):
            take.append(slice(low - begin, high - begin))
    local[tuple(to)].copy_(source[tuple(take)])


def _local_folder(path: str) -> Path:
    """The folder itself, or the cached one of a hub id."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "model*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no local folder, and as a hub id it cannot be fetched: {error}") from error


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"the checkpoint {folder} cannot be read: {error}; download or export it again") from error


def _besides(names: list[str], patterns: list[str]) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
