"""Norms, rotary embedding and gated units of Hugging Face modules, each replaced by one call into the kernels.

Called by model.py after load, on modules of its own. A module is changed only if a probe on random numbers shows that
every bit stays what it was; any other is left alone.
"""

from __future__ import annotations

import copy
import functools
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from arealite.algorithm.kernels import DIM_STEP, Kernels

_ROTATE = "apply_rotary_pos_emb"  # the function of every modelling file of transformers that has this embedding
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_PROBE_ROWS = 3


def fuse(module: Any, kernels: Kernels) -> None:
    """Replace what can be replaced in `module`, in place."""
    norms: dict[tuple[type, int, float], bool | None] = {}
    rotaries: dict[type, FunctionType | None] = {}
    for part in module.modules():
        kind: Any = type(part)
        own = vars(part)
        eps = own.get("variance_epsilon", own.get("eps"))
        if kind.__name__.endswith("RMSNorm") and isinstance(eps, float) and set(own["_parameters"]) == {"weight"}:
            key = (kind, part.weight.numel(), eps)
            if key not in norms:
                norms[key] = _norm_kind(part, kernels, eps)
            plus_one = norms[key]
            if plus_one is not None:
                part.forward = functools.partial(kernels.rms_norm, weight=part.weight, eps=eps, plus_one=plus_one)
        elif set(own["_modules"]) == _GATED:
            _fuse_gated(part, kernels)
        elif _ROTATE in kind.forward.__code__.co_names and "head_dim" in own:
            if kind not in rotaries:
                rotaries[kind] = _with_rotation(kind.forward, kernels, part.head_dim)
            forward = rotaries[kind]
            if forward is not None:
                part.forward = MethodType(forward, part)


def _random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).bfloat16()


def _norm_kind(norm: Any, kernels: Kernels, eps: float) -> bool | None:
    """Whether it multiplies by one plus the weight; None when the kernel does not give its bits."""
    probe = copy.deepcopy(norm)
    width = probe.weight.numel()
    if width % DIM_STEP:
        return None
    probe.weight.copy_(_random(width))
    x = _random(_PROBE_ROWS, width)
    wanted = probe(x)
    fits = [kind for kind in (False, True) if torch.equal(kernels.rms_norm(x, probe.weight, eps, kind), wanted)]
    return fits[0] if fits else None


def _fuse_gated(unit: Any, kernels: Kernels) -> None:
    """down(silu(gate(x)) * up(x))"""
    gate, up, down = unit.gate_proj, unit.up_proj, unit.down_proj
    if any(type(layer) is not nn.Linear for layer in (gate, up, down)) or gate.out_features % DIM_STEP:
        return

    def forward(x: torch.Tensor) -> torch.Tensor:
        return down(kernels.silu_times(gate(x), up(x)))

    x = _random(_PROBE_ROWS, gate.in_features)
    if torch.equal(forward(x), unit(x)):
        unit.forward = forward


def _with_rotation(forward: Any, kernels: Kernels, dim: int) -> FunctionType | None:
    """The attention layer's own code with another rotary function among its globals; None when bits would change."""
    plain = forward.__globals__[_ROTATE]

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return plain(q, k, cos, sin)
        kernels.rotate(q, cos, sin)
        kernels.rotate(k, cos, sin)
        return q, k

    # What the layer makes of its products: [1, T, heads, dim], seen with the heads first.
    q, k = (_random(1, _PROBE_ROWS, heads, dim).transpose(1, 2) for heads in (4, 2))
    cos, sin = _random(2, 1, _PROBE_ROWS, dim)
    wanted = plain(q, k, cos, sin)
    if dim % DIM_STEP or not all(map(torch.equal, rotate(q, k, cos, sin), wanted)):
        return None
    changed = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTATE: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed
