"""LoRA adapters in PEFT's format beside the served weights: loaded by name, chosen by each request, mixed in a batch.

Loaded by http/control.py; served_model.py tells each pass which rows want which. With none, nothing is different.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from arealite.api.errors import RequestError
from arealite.inference.core.sequence import Span
from arealite.weights.wire import checksum

_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_REFUSED = [
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "alpha_pattern",
    "trainable_token_indices",
    "lora_bias",
]


@dataclass(frozen=True)
class Adapter:
    """`sides`: module name -> (A [r, in], B [out, r], both in the model's dtype, and the scale of what they add)."""

    sides: dict[str, tuple[torch.Tensor, torch.Tensor, float]]

    def checksums(self) -> dict[str, int]:
        """CRC-32 of the tensors that are served, by their names in the file."""
        return {
            f"base_model.model.{target}.lora_{side}.weight": checksum(tensor)
            for target, (a, b, _) in self.sides.items()
            for side, tensor in (("A", a), ("B", b))
        }


@dataclass
class Adapters:
    """The adapters of one model. `names` belongs to the routes, all else to the engine thread."""

    module: nn.Module
    names: dict[str, str] = field(default_factory=dict)  # that requests may choose, and where they come from
    _loaded: dict[str, Adapter] = field(default_factory=dict)
    _hooks: dict[str, Any] = field(default_factory=dict)  # on linear layers that some adapter changes
    _rows: dict[str, torch.Tensor | None] = field(default_factory=dict)  # of this pass, by adapter; None: all

    @property
    def is_empty(self) -> bool:
        return not self._loaded

    def lacks(self, name: str | None) -> bool:
        """Whether a request that chose it came too late."""
        return name is not None and name not in self._loaded

    def add(self, name: str, adapter: Adapter, in_place: bool = False) -> None:
        """Raises RequestError: the name is taken, and what has it is not to be replaced."""
        if name in self._loaded and not in_place:
            raise RequestError(f"lora_name: an adapter named {name!r} is loaded already; unload it, or use a new name")
        self._serve({**self._loaded, name: adapter})

    def remove(self, name: str) -> None:
        self._serve({other: adapter for other, adapter in self._loaded.items() if other != name})

    def _serve(self, loaded: dict[str, Adapter]) -> None:
        self._loaded = loaded
        used = {target for adapter in loaded.values() for target in adapter.sides}
        for target in used - self._hooks.keys():
            hook = functools.partial(self._add_delta, target)
            self._hooks[target] = self.module.get_submodule(target).register_forward_hook(hook)
        for target in self._hooks.keys() - used:
            self._hooks.pop(target).remove()

    def choose(self, spans: list[Span], device: torch.device) -> None:
        """Which rows of the pass to come want which adapter."""
        if not self._loaded:
            return
        wanted = [span.sequence.request.lora for span in spans]
        if len(set(wanted)) == 1:
            self._rows = {name: None for name in set(wanted) if name is not None}
            return
        rows: dict[str, list[int]] = {name: [] for name in wanted if name is not None}
        start = 0
        for name, span in zip(wanted, spans, strict=True):
            if name is not None:
                rows[name].extend(range(start, start + span.count))
            start += span.count
        self._rows = {name: torch.tensor(places, device=device) for name, places in rows.items()}

    def _add_delta(self, target: str, _: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Adds x A^T B^T to the rows [1, T, out] of those who want it; in place."""
        for name, rows in self._rows.items():
            if target not in self._loaded[name].sides:
                continue
            a, b, scale = self._loaded[name].sides[target]
            if rows is None:
                output.add_(inputs[0] @ a.t() @ b.t(), alpha=scale)
            else:
                output[0].index_add_(0, rows, inputs[0][0, rows] @ a.t() @ b.t(), alpha=scale)


def read_adapter(module: nn.Module, folder: str) -> Adapter:
    """An adapter for `module` from PEFT's two files.

    Raises:
        RequestError: they cannot be read, are of a kind that is not supported, or do not fit the model.
    """
    try:
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise RequestError(f"lora_path: no adapter in PEFT's format at {folder!r}: {error}") from error
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        matched = _NAME.match(name)
        if matched is None:
            raise RequestError(f"adapter: tensor {name!r} is no LoRA matrix of a linear layer")
        halves.setdefault(matched["module"], {})[matched["side"]] = tensor
    if not halves:
        raise RequestError("adapter: it has no tensors")
    alpha = _alpha(settings)
    root = bool(settings.get("use_rslora"))
    return Adapter({target: _sides(module, target, pair, alpha, root) for target, pair in halves.items()})


def _alpha(settings: Any) -> float:
    """lora_alpha of adapter_config.json, if what else it says is supported."""
    if not isinstance(settings, dict):
        raise RequestError(f"adapter_config.json: expected a JSON object, found {settings!r:.100}")
    kind, bias, alpha = settings.get("peft_type", "LORA"), settings.get("bias", "none"), settings.get("lora_alpha")
    if kind != "LORA" or bias != "none":
        raise RequestError(f"adapter: expected peft_type LORA without bias, found {kind!r}, bias {bias!r}")
    if odd := [key for key in sorted(_REFUSED) if settings.get(key)]:
        raise RequestError(f"adapter: {', '.join(odd)} of its configuration is not supported")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise RequestError(f"adapter: lora_alpha: expected a finite number, found {alpha!r}")
    return float(alpha)


def _sides(
    module: nn.Module, target: str, pair: dict[str, torch.Tensor], alpha: float, root: bool
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Adapter.sides of one linear layer; `root`: the scale falls with the root of the rank only."""
    linear = dict(module.named_modules()).get(target)
    if not isinstance(linear, nn.Linear) or linear is module.get_output_embeddings():  # type: ignore[operator]
        raise RequestError(f"adapter: the model has no linear layer {target!r} that takes an adapter")
    rank = len(pair["A"]) if "A" in pair else 0
    wanted = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
    if {side: tuple(tensor.shape) for side, tensor in pair.items()} != wanted:
        raise RequestError(
            f"adapter: {target} needs lora_A [r, {linear.in_features}] and lora_B [{linear.out_features}, r]; found"
            f" {[list(tensor.shape) for tensor in pair.values()]}"
        )
    a, b = (pair[side].to(linear.weight.device, linear.weight.dtype) for side in "AB")
    return a, b, alpha / (math.sqrt(max(1, rank)) if root else max(1, rank))
