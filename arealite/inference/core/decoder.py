"""Decoder layers of the common kind as a dozen kernel calls, in place of some fifty calls of modules.

Made by served_model.py after load, for bf16 on a CPU with compiled kernels and for a GPU with its own. A layer keeps
its Hugging Face code beside: for passes with adapters, which hook into its linear layers, and for models in which the
two do not agree in every bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch

from arealite.inference.core.adapters import Adapters
from arealite.inference.core.layout import KVLayout, ShapeProbe
from arealite.kernels.cpu import DIM_STEP
from arealite.kernels.functions import AnyKernels
from arealite.kernels.linears import PackedLinears
from arealite.kernels.modules import GATED, HEAD_NORMS, PROJECTIONS, norm_kind

logger = logging.getLogger(__name__)

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


_Norm = tuple[torch.Tensor, float, bool]  # as kernels take it: weight, eps, plus_one


def call_kernels(
    module: Any,
    kernels: AnyKernels,
    linears: PackedLinears,
    adapters: Adapters,
    probe: ShapeProbe,
    run: Callable[[], torch.Tensor],
) -> None:
    """Give the decoder layers of `module` that are of the common kind another forward. `probe` has seen every layer's
    attention; `run` makes hidden states: where they are not the same bits as those of the plain code, it stays."""
    layers = [layer for layer in module.modules() if vars(layer).get("_modules", {}).keys() == _PARTS]
    try:
        norms = [_norm_of(layer.input_layernorm, kernels) for layer in layers]
        ahead: list[tuple[torch.Tensor, torch.Tensor]] = []
        parts = zip_longest(layers, norms, norms[1:])
        forwards = [_direct(*part, ahead, kernels, linears, adapters, probe) for part in parts]
    except KeyError as error:  # a norm, a projection or a gate of another kind
        logger.info("layers stay as transformers has them: %s is of another kind", error)
        return
    plain_states = run()
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    if not torch.equal(plain_states, run()):
        logger.info("layers stay as transformers has them: kernel calls alone gave other bits")
        for layer in layers:
            del layer.forward


def _norm_of(norm: Any, kernels: AnyKernels) -> _Norm:
    """Raises KeyError: it is not one of the kernels'."""
    return norm.weight, *norm_kind(norm, kernels)


def _direct(
    layer: Any,
    norm: _Norm,
    following: _Norm | None,
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
    if set(dict(mlp.named_children())) != GATED or not parts.keys() <= PROJECTIONS | HEAD_NORMS:
        raise KeyError(type(mlp).__name__)
    half = mlp.gate_proj.out_features
    if half % DIM_STEP:  # silu_times would pass the ends of rows
        raise KeyError(f"a width of {half}")
    qkv = linears.group([parts["q_proj"], parts["k_proj"], parts["v_proj"]])
    gates = linears.group([mlp.gate_proj, mlp.up_proj])
    out, down = linears.group([parts["o_proj"]]), linears.group([mlp.down_proj])
    inner_norm = _norm_of(layer.post_attention_layernorm, kernels)
    head_norms = [_norm_of(parts[name], kernels) for name in ("q_norm", "k_norm") if name in parts]
    dim = int(attn.head_dim)
    heads = parts["q_proj"].out_features // dim, parts["k_proj"].out_features // dim
    [setting] = [setting for setting in probe.seen if setting.layer == attn.layer_idx]

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layout: Any = kwargs.get("kv_layout")
        cos, sin = kwargs.get("position_embeddings", (hidden_states[..., :0],) * 2)
        is_whole = cos.shape[-1] == dim and cos.dtype == hidden_states.dtype  # the kernel reads all of a head
        if not (is_whole and isinstance(layout, KVLayout) and layout.pool.kernels and adapters.is_empty):
            whole: torch.Tensor = plain(hidden_states, *args, **kwargs)
            return whole
        x = hidden_states[0]
        normed = ahead[0][1] if ahead and ahead[0][0] is hidden_states else kernels.rms_norm(x, *norm)
        ahead.clear()
        whole = qkv(normed).view(len(x), -1, dim)
        q, k, v = whole.split((*heads, heads[1]), 1)
        if head_norms:
            q, k = (kernels.rms_norm(y, *each) for each, y in zip(head_norms, (q, k), strict=True))
        for y in (q, k) if head_norms else (whole[:, : sum(heads)],):
            turned = y.transpose(0, 1)[None]
            kernels.rotate(turned, cos, sin, turned)
        q, k, v = (y.transpose(0, 1) for y in (q, k, v))
        seen = layout.attend(q, k, v, setting)
        x, normed = kernels.add_rms_norm(x, out(seen.view(len(x), -1)), *inner_norm)
        gates_and_ups = gates(normed)
        added = down(kernels.silu_times(gates_and_ups[:, :half], gates_and_ups[:, half:]))
        if following is None:
            return (x + added)[None]
        x, normed = kernels.add_rms_norm(x, added, *following)
        states = x[None]
        ahead.append((states, normed))
        return states

    return forward
