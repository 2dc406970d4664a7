"""Norms, rotary embedding and gated units by the compiled kernels, each one call, with gradients where they are wanted.

Called by fusing.py, in whose modules these take the place of PyTorch's operations. Forward results have every bit of
those; gradients are computed in float32 and rounded once, and what can be computed again is not kept for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from arealite.algorithm.kernels import Kernels


def fits(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can read them."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.setting = kernels, eps, plus_one
        return kernels.rms_norm(x, weight, eps, plus_one)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kernels, eps, plus_one = ctx.setting
        return None, *kernels.rms_norm_grad(*ctx.saved_tensors, grad, eps, plus_one), None, None


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels, ctx.unpacked = kernels, None
        return kernels.silu_times(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = _SiluTimes.inputs(ctx)
        ctx.unpacked = None
        return None, *ctx.kernels.silu_times_grad(*inputs, grad)

    @staticmethod
    def inputs(ctx: Any) -> tuple[torch.Tensor, ...]:
        """Gate and up, kept until the backward pass is done: checkpointing hands them out once only."""
        if ctx.unpacked is None:
            ctx.unpacked = ctx.saved_tensors
        unpacked: tuple[torch.Tensor, ...] = ctx.unpacked
        return unpacked


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        out = _tokens_first(x)
        kernels.rotate(x, cos, sin, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out = _tokens_first(grad)
        ctx.kernels.rotate(grad if grad.stride(-1) == 1 else grad.contiguous(), *ctx.saved_tensors, out, back=True)
        return None, out, None, None


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """Room for a result [1, heads, T, D] that lies as the layers' own products do, heads of a token side by side."""
    return x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def rms_norm(kernels: Kernels, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """As Kernels.rms_norm."""
    if not torch.is_grad_enabled():
        return kernels.rms_norm(x, weight, eps, plus_one)
    normed: torch.Tensor = _Norm.apply(kernels, x, weight, eps, plus_one)
    return normed


def rotate(kernels: Kernels, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As Kernels.rotate; in place where no gradient is wanted."""
    if torch.is_grad_enabled():
        rotated: torch.Tensor = _Rotate.apply(kernels, x, cos, sin)
        return rotated
    kernels.rotate(x, cos, sin, x)
    return x


def gated(
    kernels: Kernels, gate: torch.Tensor, up: torch.Tensor, down: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """down(silu(gate) * up). What `down` keeps of its input for its gradient is computed again from gate and up."""
    if not torch.is_grad_enabled():
        return down(kernels.silu_times(gate, up))
    product: torch.Tensor = _SiluTimes.apply(kernels, gate, up)
    node: Any = product.grad_fn
    if node is None:
        return down(product)
    place, size = product.data_ptr(), product.numel()

    def keep(kept: torch.Tensor) -> Any:
        return kept.shape if kept.data_ptr() == place and kept.numel() == size else kept

    def bring_back(kept: Any) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kernels.silu_times(*_SiluTimes.inputs(node)).view(kept)

    with saved_tensors_hooks(keep, bring_back):
        return down(product)
