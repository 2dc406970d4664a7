"""What a checkpoint on the hub calls the tensors of a transformers model: the names that every server's loader knows.

transformers keeps all experts of a layer in one tensor, `experts.gate_up_proj` [experts, 2 x intermediate, hidden];
hub checkpoints, SGLang and vLLM have them one by one, `experts.7.gate_proj.weight`. Read by engine/loading.py,
engine/sharded_model.py and the native server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from arealite.api.errors import ConfigError


@dataclass(frozen=True)
class HubPart:
    """A tensor of a hub checkpoint: `tensor[index]` of the model's tensor; all of it where `index` is ()."""

    name: str
    index: tuple[int | slice, ...] = ()


def hub_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], parts: Mapping[str, tuple[HubPart, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors` by transformers' names, as a hub checkpoint has them: experts one by one. Memory of a part is that of
    its tensor."""
    for name, tensor in tensors:
        for part in parts.get(name, (HubPart(name),)):
            yield part.name, tensor[part.index]


def hub_parts(model: Any) -> dict[str, tuple[HubPart, ...]]:
    """By name of a tensor in `model.state_dict()`, what it consists of on the hub. Only shapes are read.

    Raises:
        ConfigError: the hub's layout is no cut along experts and rows.
    """
    tensors = model.state_dict(keep_vars=True)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    # Where transformers keeps those that fitted the files which a model came from. Prefixes stay as the model has them.
    model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    if not model._weight_conversions:
        return {name: (HubPart(name),) for name in tensors}
    return {name: _parts(model, name, tensor.shape) for name, tensor in tensors.items()}


def _parts(model: Any, name: str, shape: torch.Size) -> tuple[HubPart, ...]:
    """transformers' own conversion, asked with a tensor whose numbers say from which row each of them comes."""
    num_rows = shape[-2] if len(shape) > 2 else shape[0]
    numbers = torch.arange(shape[:-1].numel() if len(shape) > 1 else num_rows)
    converted = revert_weight_conversion(model, {name: numbers.view(*shape[:-1], 1) if len(shape) > 1 else numbers})
    if len(converted) == 1 and torch.equal(next(iter(converted.values())).flatten(), numbers):
        return (HubPart(next(iter(converted))),)
    parts = []
    for hub_name, rows in converted.items():
        begin, size = int(rows.flatten()[0]), rows.numel()
        in_order = torch.equal(rows.flatten(), numbers[begin : begin + size])
        if len(shape) != 3 or not in_order or begin % num_rows + size > num_rows:
            raise ConfigError(
                f"{type(model).__name__}: the hub's {hub_name} is no block of rows of {name} {list(shape)}, which"
                " reading and writing it piece by piece needs; this architecture is not supported"
            )
        parts.append(HubPart(hub_name, (begin // num_rows, slice(begin % num_rows, begin % num_rows + size))))
    return tuple(parts)
