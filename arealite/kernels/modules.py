"""Norms, rotary embedding, gated units and linear layers of Hugging Face modules, each replaced by a call of kernels.

Called by inference/core/served_model.py and engine/model.py. A module is changed only if a probe on random numbers
shows that it computes the same, to a bf16's rounding; any other is left alone, and so is whatever is no bf16 on their
device.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from arealite.kernels.cpu import DIM_STEP, Kernels
from arealite.kernels.functions import AnyKernels, fits, linear, rms_norm, rotate, silu_times

_ROTATE = "apply_rotary_pos_emb"  # the function of every modelling file of transformers that has this embedding
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_PROBE_ROWS = 3


logger = logging.getLogger(__name__)


@torch.no_grad()
def fuse(module: Any, kernels: AnyKernels) -> None:
    """Replace norms, rotary embeddings and gated units that can be replaced in `module`, in place. Parameters are
    looked up when a module is called."""
    rotaries: dict[type, FunctionType | None] = {}
    left: Counter[str] = Counter()
    for part in module.modules():
        kind: Any = type(part)
        own = vars(part)
        plain = inspect.unwrap(kind.forward)  # below the decorators of newer versions
        replaced: Any = None
        if kind.__name__.endswith("RMSNorm"):
            with suppress(KeyError):
                replaced = _norm(part, kernels, *norm_kind(part, kernels))
        elif set(own["_modules"]) == GATED:
            replaced = _gated(part, kernels) if _is_silu_times(part, kernels) else None
        elif _ROTATE in plain.__code__.co_names and "head_dim" in own:
            if kind not in rotaries:
                rotaries[kind] = _with_rotation(plain, kernels, part.head_dim)
            forward = rotaries[kind]
            replaced = None if forward is None else MethodType(forward, part)
        else:
            continue
        if replaced is None:
            left[kind.__name__] += 1
        else:
            part.forward = replaced
    if left:
        words = ", ".join(f"{count} {name}" for name, count in left.items())
        logger.info("left to PyTorch, because the kernels compute something else: %s", words)


def fuse_linears(module: Any, kernels: Kernels | None) -> None:
    """Compute the linear layers in `module` by kernels.functions.linear, in bf16 on a CPU, with their gradients."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = _linear(part, kernels)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, kernels: Kernels | None) -> Any:
    plain = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.weight, layer.bias
        return linear(kernels, x, weight, bias) if fits(x, weight) else plain(x)

    return forward


def _random(kernels: AnyKernels, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).bfloat16().to(kernels.device)


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the rounding of a few bf16."""
    return bool((a.float() - b.float()).norm() <= 2**-7 * b.float().norm())


@torch.no_grad()
def norm_kind(norm: Any, kernels: AnyKernels) -> tuple[float, bool]:
    """Its eps, and whether it multiplies by one plus the weight. Raises KeyError: the kernel computes neither."""
    own = vars(norm)
    eps = own.get("variance_epsilon", own.get("eps"))
    if set(own["_parameters"]) != {"weight"} or not isinstance(eps, float) or norm.weight.numel() % DIM_STEP:
        raise KeyError(type(norm).__name__)
    probe, x = copy.copy(norm), _random(kernels, _PROBE_ROWS, norm.weight.numel())
    probe._parameters = {"weight": nn.Parameter(_random(kernels, norm.weight.numel()))}
    wanted = type(norm).forward(probe, x)
    for plus_one in (False, True):
        if _agree(rms_norm(kernels, x, probe.weight, eps, plus_one), wanted):
            return eps, plus_one
    raise KeyError(type(norm).__name__)


def _norm(norm: Any, kernels: AnyKernels, eps: float, plus_one: bool) -> Any:
    plain, on = norm.forward, kernels.device.type

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = norm.weight
        return rms_norm(kernels, x, weight, eps, plus_one) if fits(x, weight, on=on) else plain(x)

    return forward


def _is_silu_times(unit: Any, kernels: AnyKernels) -> bool:
    """Whether it computes down(silu(gate(x)) * up(x)), by its own code on small layers."""
    probe = copy.copy(unit)
    kind: Any = {"dtype": torch.bfloat16, "device": kernels.device}
    layers = {name: nn.Linear(DIM_STEP, DIM_STEP, **kind) for name in sorted(GATED)[1:]}
    for layer in layers.values():
        layer.weight.copy_(_random(kernels, DIM_STEP, DIM_STEP))
    probe._modules = {**layers, "act_fn": unit.act_fn}
    x = _random(kernels, _PROBE_ROWS, DIM_STEP) * DIM_STEP**-0.5  # gates of about 1, where activations differ most
    return _agree(_gated(probe, kernels)(x), type(unit).forward(probe, x))


def _gated(unit: Any, kernels: AnyKernels) -> Any:
    plain, on = unit.forward, kernels.device.type

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not fits(x, on=on):
            return plain(x)
        gate, up = unit.gate_proj(x), unit.up_proj(x)
        if fits(gate, up, on=on) and not gate.shape[-1] % DIM_STEP:
            return unit.down_proj(silu_times(kernels, gate, up))
        return unit.down_proj(unit.act_fn(gate) * up)

    return forward


def _with_rotation(forward: Any, kernels: AnyKernels, dim: int) -> FunctionType | None:
    """The attention layer's own code with another rotary function; None when it would compute something else."""
    plain, on = forward.__globals__[_ROTATE], kernels.device.type

    def rotate_both(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not fits(q, k, cos, sin, on=on) or cos.shape[-1] != q.shape[-1] or len(q) > 1:
            return plain(q, k, cos, sin)
        return rotate(kernels, q, cos, sin), rotate(kernels, k, cos, sin)

    # What the layer makes of its products: [1, T, heads, dim], seen with the heads first.
    q, k = (_random(kernels, 1, _PROBE_ROWS, heads, dim).transpose(1, 2) for heads in (4, 2))
    cos, sin = _random(kernels, 2, 1, _PROBE_ROWS, dim)
    wanted = plain(q, k, cos, sin)
    if dim % DIM_STEP or not all(map(_agree, rotate_both(q, k, cos, sin), wanted)):
        return None
    changed = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTATE: rotate_both},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed
