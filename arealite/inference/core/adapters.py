"""LoRA adapters in PEFT's format beside the served weights: loaded by name, chosen by each request, mixed in a batch.

The routes are below; served_model.py tells each pass which rows want which adapter. While none is loaded nothing is
different.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from aiohttp import web
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from arealite.api.errors import ArealiteError, RequestError
from arealite.inference import bodies
from arealite.inference.bodies import number, of_type, read_object, shown
from arealite.inference.pickles import tensor_reader
from arealite.observe import waits
from arealite.weights.checksum import checksum

if TYPE_CHECKING:
    from arealite.inference.core.engine import Engine
    from arealite.inference.core.sequence import Span

LOAD_LIMIT_S = 300.0
UNLOAD_LIMIT_S = 600.0  # for the requests that use it to end
POLL_S = 0.05
_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "alpha_pattern",
    "trainable_token_indices",
    "lora_bias",
)


Source = Callable[[], tuple[dict[str, Any], dict[str, torch.Tensor]]]


@dataclass
class Adapter:
    """`sides`: module name -> (A [r, in], B [out, r], both in the model's dtype, and the scale of what they add)."""

    path: str
    sides: dict[str, tuple[torch.Tensor, torch.Tensor, float]]

    def checksums(self) -> dict[str, int]:
        """CRC-32 of the tensors that are served, by their names in the file."""
        found: dict[str, int] = {}
        for target, (a, b, _) in self.sides.items():
            stem = f"base_model.model.{target}.lora_"
            found |= {f"{stem}A.weight": checksum(a), f"{stem}B.weight": checksum(b)}
        return found


@dataclass
class Adapters:
    """The adapters of one model. `names` belongs to the routes, all else to the engine thread."""

    module: nn.Module
    names: dict[str, str] = field(default_factory=dict)  # that requests may choose, and where they come from
    _loaded: dict[str, Adapter] = field(default_factory=dict)
    _hooks: dict[str, Any] = field(default_factory=dict)
    # Of the current pass, by adapter; None: all rows.
    _rows: dict[str, torch.Tensor | None] = field(default_factory=dict)

    def add(self, name: str, adapter: Adapter, in_place: bool = False) -> None:
        """Raises RequestError: the name is taken, and what has it is not to be replaced."""
        if name in self._loaded and not in_place:
            raise RequestError(f"lora_name: an adapter named {name!r} is loaded already; unload it, or use a new name")
        self._loaded[name] = adapter
        self._follow()

    def remove(self, name: str) -> None:
        self._loaded.pop(name, None)
        self._follow()

    def _follow(self) -> None:
        """Hooks on those linear layers that some adapter changes."""
        used = {target for adapter in self._loaded.values() for target in adapter.sides}
        for target in used - self._hooks.keys():
            hook = functools.partial(self._add_delta, target)
            self._hooks[target] = self.module.get_submodule(target).register_forward_hook(hook)
        for target in self._hooks.keys() - used:
            self._hooks.pop(target).remove()

    @property
    def is_empty(self) -> bool:
        return not self._loaded

    def lacks(self, name: str | None) -> bool:
        """Whether a request that chose it came too late."""
        return name is not None and name not in self._loaded

    def choose(self, spans: list[Span], device: torch.device) -> None:
        """Which rows of the pass to come want which adapter."""
        self._rows = {}
        if not self._loaded:
            return
        wanted = {span.sequence.request.lora for span in spans}
        if len(wanted) == 1:
            self._rows = {name: None for name in wanted if name is not None}
            return
        rows: dict[str, list[int]] = {}
        start = 0
        for span in spans:
            if span.sequence.request.lora is not None:
                rows.setdefault(span.sequence.request.lora, []).extend(range(start, start + span.count))
            start += span.count
        self._rows = {name: torch.tensor(own, device=device) for name, own in rows.items()}

    def _add_delta(self, target: str, _: nn.Module, given: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Adds x A^T B^T to the rows [1, T, out] of those who want it; in place."""
        for name, rows in self._rows.items():
            sides = self._loaded[name].sides.get(target)
            if sides is None:
                continue
            a, b, scale = sides
            if rows is None:
                output.add_(given[0] @ a.t() @ b.t(), alpha=scale)
            else:
                output[0].index_add_(0, rows, given[0][0, rows] @ a.t() @ b.t(), alpha=scale)


def parse_adapter(module: nn.Module, settings: dict[str, Any], tensors: dict[str, torch.Tensor], path: str) -> Adapter:
    """An adapter for `module` from PEFT's adapter_config.json and its tensors.

    Raises:
        RequestError: of a kind that is not supported, or it does not fit the model.
    """
    if settings.get("peft_type", "LORA") != "LORA" or settings.get("bias", "none") != "none":
        raise RequestError(
            f"adapter: expected peft_type LORA without bias, found {shown(settings.get('peft_type'))},"
            f" bias {shown(settings.get('bias'))}"
        )
    if odd := [key for key in _UNSUPPORTED if settings.get(key)]:
        raise RequestError(f"adapter: {', '.join(odd)} of its configuration is not supported")
    alpha = number("adapter: lora_alpha", settings.get("lora_alpha"), -math.inf)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.match(name)
        if found is None:
            raise RequestError(f"adapter: tensor {name!r} is no LoRA matrix of a linear layer")
        halves.setdefault(found["module"], {})[found["side"]] = tensor
    sides = {}
    for target, pair in halves.items():
        linear = dict(module.named_modules()).get(target)
        if not isinstance(linear, nn.Linear) or linear is module.get_output_embeddings():  # type: ignore[operator]
            raise RequestError(f"adapter: the model has no linear layer {target!r} that takes an adapter")
        a, b = pair.get("A"), pair.get("B")
        fits = a is not None and b is not None and a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
        if a is None or b is None or not fits or (a.shape[1], b.shape[0]) != (linear.in_features, linear.out_features):
            raise RequestError(
                f"adapter: {target} needs lora_A [r, {linear.in_features}] and lora_B [{linear.out_features}, r]; found"
                f" {[list(tensor.shape) for tensor in pair.values()]}"
            )
        rank = max(1, a.shape[0])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        weight = linear.weight
        a, b = (side.detach().to(weight.device, weight.dtype) for side in (a, b))
        sides[target] = (a, b, scale)
    if not sides:
        raise RequestError("adapter: it has no tensors")
    return Adapter(path, sides)


def read_folder(folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """PEFT's two files. Raises RequestError: they cannot be read."""
    try:
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
        return of_type("adapter_config.json", settings, dict), load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise RequestError(f"lora_path: no adapter in PEFT's format at {folder!r}: {error}") from error


class AdapterRoutes:
    """Load and unload, as SGLang words it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._adapters = engine.batcher.model.adapters

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/load_lora_adapter", self.load),
            web.post("/load_lora_adapter_from_tensors", self.load_tensors),
            web.post("/unload_lora_adapter", self.unload),
        ]

    async def load(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        name, path = (of_type(key, body.get(key), str) for key in ("lora_name", "lora_path"))
        if not bodies.field(body, "load_inplace", bool, False):
            return await self._add(name, path, lambda: read_folder(path))
        version = bodies.field(body, "weight_version", str, None)
        return await self._add(name, path, lambda: read_folder(path), in_place=True, version=version)

    async def load_tensors(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        name = of_type("lora_name", body.get("lora_name"), str)
        settings = of_type("config_dict", body.get("config_dict"), dict)
        tensors = tensor_reader(body)
        return await self._add(name, "", lambda: (settings, dict(tensors())))

    async def _add(
        self, name: str, path: str, source: Source, in_place: bool = False, version: str | None = None
    ) -> web.Response:
        """`in_place`: it becomes the adapter of this name between two tokens, also for the requests that run; the
        weights have `version` then, and the answer has the adapter's checksums."""

        def prepare() -> tuple[Adapter, dict[str, int]]:
            settings, tensors = source()
            adapter = parse_adapter(self._adapters.module, settings, tensors, path)
            return adapter, adapter.checksums() if in_place else {}

        try:
            adapter, checksums = await waits.in_thread(prepare, f"adapter {name}", "client", LOAD_LIMIT_S)
            if in_place:
                await self._engine.ask("adapter update", lambda: self._engine.replace_adapter(name, adapter, version))
            else:
                await self._engine.ask("load adapter", lambda: self._adapters.add(name, adapter))
        except ArealiteError as error:
            return self._answer(str(error))
        self._adapters.names[name] = path
        return self._answer("", **({"checksums": checksums} if in_place else {}))

    async def unload(self, request: web.Request) -> web.Response:
        """New requests are refused at once; answered when those that use it have ended."""
        body = await read_object(request)
        name = of_type("lora_name", body.get("lora_name"), str)
        if self._adapters.names.pop(name, None) is None and self._adapters.lacks(name):
            return self._answer(f"lora_name: no adapter named {name!r} is loaded")
        deadline = time.monotonic() + UNLOAD_LIMIT_S
        while not await self._engine.ask("unload adapter", lambda: self._removed(name)):
            if time.monotonic() > deadline:
                return self._answer(f"requests still use {name!r} after {UNLOAD_LIMIT_S:g} s")
            await asyncio.sleep(POLL_S)
        return self._answer("")

    def _removed(self, name: str) -> bool:
        batcher = self._engine.batcher
        if any(sequence.request.lora == name for sequence in batcher.in_flight()):
            return False
        self._adapters.remove(name)
        batcher.scheduler.prefix.clear()  # the name may come back with other weights
        return True

    def _answer(self, error: str, **more_fields: Any) -> web.Response:
        body = {"rid": None, "http_worker_ipc": None, "success": not error, "error_message": error}
        more = {"error": {"message": error}, "message": error} if error else {}
        return web.json_response(
            {**body, **more, **more_fields, "loaded_adapters": self._adapters.names}, status=400 if error else 200
        )
