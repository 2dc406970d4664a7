"""Decoder layers of the common kind as a dozen kernel calls, in place of some fifty calls of modules.

Made by served_model.py after load, for bf16 on a CPU with compiled kernels and for a GPU with its own. A layer keeps
its Hugging Face code beside: for passes with adapters, which hook into its linear layers, and for models in which the
two do not agree in every bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from arealite.inference.core.adapters import Adapters
from arealite.inference.core.layout import KVLayout, ShapeProbe
from arealite.kernels.cpu import DIM_STEP
from arealite.kernels.functions import AnyKernels
from arealite.kernels.linears import PackedLinears
from arealite.kernels.modules import GATED, norm_kind

logger = logging.getLogger(__name__)

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


class DirectLayers:
    """The decoder layers of `module` that are of the common kind, each with another forward."""

    def __init__(
        self, module: Any, kernels: AnyKernels, linears: PackedLinears, adapters: Adapters, probe: ShapeProbe
    ) -> None:
        """`probe` has seen every layer's attention."""
        self._layers = [layer for layer in module.modules() if vars(layer).get("_modules", {}).keys() == _PARTS]
        try:
            norms = [_LayerNorm.of(layer.input_layernorm, kernels) for layer in self._layers]
            parts = zip_longest(self._layers, norms, norms[1:])
            ahead: list[tuple[torch.Tensor, torch.Tensor]] = []
            forwards = [_direct(*part, ahead, kernels, linears, adapters, probe) for part in parts]
        except KeyError as error:  # a norm, a projection or a gate of another kind
            logger.info("layers stay as transformers has them: %s is of another kind", error)
            self._layers = forwards = []
        for layer, forward in zip(self._layers, forwards, strict=True):
            layer.forward = forward

    def keep_if_equal(self, run: Callable[[], torch.Tensor]) -> None:
        """`run` makes hidden states; layers that do not give the same bits as their plain code are undone."""
        found = run()
        forwards = [vars(layer).pop("forward") for layer in self._layers]
        if not torch.equal(found, run()):
            logger.info("layers stay as transformers has them: kernel calls alone gave other bits")
            return
        for layer, forward in zip(self._layers, forwards, strict=True):
            layer.forward = forward


@dataclass(frozen=True)
class _LayerNorm:
    weights: nn.Module
    kernels: AnyKernels
    kind: tuple[float, bool]

    @classmethod
    def of(cls, norm: nn.Module, kernels: AnyKernels) -> _LayerNorm:
        """Raises KeyError: it is not one of the kernels'."""
        return cls(norm, kernels, norm_kind(norm, kernels))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x, self.weights.weight, *self.kind)  # type: ignore[arg-type]

    def of_sum(self, x: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and its norm."""
        return self.kernels.add_rms_norm(x, added, self.weights.weight, *self.kind)  # type: ignore[arg-type]


def _direct(
    layer: Any,
    norm: _LayerNorm,
    following: _LayerNorm | None,
    ahead: list[tuple[torch.Tensor, torch.Tensor]],
    kernels: AnyKernels,
    linears: PackedLinears,
    adapters: Adapters,
    probe: ShapeProbe,
) -> Callable[..., torch.Tensor]:
    """`following`: the norm that the next layer begins with. This one computes it with its last sum, and leaves it in
    `ahead`, beside the states that it belongs to. Raises KeyError: a part of the layer is of another kind."""
    attn, mlp, plain = layer.self_attn, layer.mlp, layer.forward
    parts = dict(attn.named_children())
    if set(dict(mlp.named_children())) != GATED or not parts.keys() <= _PROJECTIONS | {"q_norm", "k_norm"}:
        raise KeyError(type(mlp).__name__)
    half = mlp.gate_proj.out_features
    if half % DIM_STEP:  # silu_times would pass the ends of rows
        raise KeyError(f"a width of {half}")
    qkv = linears.group([parts["q_proj"], parts["k_proj"], parts["v_proj"]])
    gates = linears.group([mlp.gate_proj, mlp.up_proj])
    out, down = linears.group([parts["o_proj"]]), linears.group([mlp.down_proj])
    inner_norm = _LayerNorm.of(layer.post_attention_layernorm, kernels)
    head_norms = [_LayerNorm.of(parts[name], kernels) for name in ("q_norm", "k_norm") if name in parts]
    number, dim = int(attn.layer_idx), int(attn.head_dim)
    heads = parts["q_proj"].out_features // dim, parts["k_proj"].out_features // dim
    scale, window = probe.settings[number]

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layout: Any = kwargs.get("kv_layout")
        cos, sin = kwargs.get("position_embeddings", (hidden_states[..., :0],) * 2)
        is_whole = cos.shape[-1] == dim and cos.dtype == hidden_states.dtype  # the kernel reads all of a head
        if not (is_whole and isinstance(layout, KVLayout) and layout.pool.kernels and adapters.is_empty):
            whole: torch.Tensor = plain(hidden_states, *args, **kwargs)
            return whole
        x = hidden_states[0]
        normed = ahead[0][1] if ahead and ahead[0][0] is hidden_states else norm(x)
        ahead.clear()
        whole = qkv(normed).view(len(x), -1, dim)
        q, k, v = whole.split((*heads, heads[1]), 1)
        if head_norms:
            q, k = (each(y) for each, y in zip(head_norms, (q, k), strict=True))
        for y in (q, k) if head_norms else (whole[:, : sum(heads)],):
            turned = y.transpose(0, 1)[None]
            kernels.rotate(turned, cos, sin, turned)
        q, k, v = (y.transpose(0, 1) for y in (q, k, v))
        seen = layout.attend(q, k, v, number, scale, window)
        x, normed = inner_norm.of_sum(x, out(seen.view(len(x), -1)))
        both = gates(normed)
        added = down(kernels.silu_times(both[:, :half], both[:, half:]))
        if following is None:
            return (x + added)[None]
        x, normed = following.of_sum(x, added)
        states = x[None]
        ahead.append((states, normed))
        return states

    return forward
