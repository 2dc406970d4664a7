"""The kernels of a device; linear layers, norms, rotary embedding and gated units by them, with gradients where wanted.

Called by modules.py, in whose modules these take the place of PyTorch's operations, and by engine/ for its products.
Gradients are computed in float32 and rounded once; what can be computed again is not kept for them.
"""

from __future__ import annotations

import logging
import os
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks

from arealite.devices import OLDEST_GPU, compute_capability, has_flash
from arealite.kernels import build, cpu
from arealite.kernels.cpu import Kernels

if TYPE_CHECKING:
    from arealite.kernels.gpu import GpuKernels

AnyKernels: TypeAlias = "Kernels | GpuKernels"
_Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_Gradients = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

logger = logging.getLogger(__name__)


def for_device(device: torch.device) -> AnyKernels | None:
    """The kernels that compute there; None, and a line in the log, where PyTorch does. Raises as build.wanted."""
    return cpu.load() if device.type == "cpu" else _of_gpus(device.type)


_OF_GPUS: dict[str, GpuKernels | None] = {}  # by kind of device


def use_kernels(kind: str, kernels: GpuKernels | None) -> None:
    """What `for_device` gives for this kind of accelerator from now on."""
    _OF_GPUS[kind] = kernels


def _of_gpus(kind: str) -> GpuKernels | None:
    if kind not in _OF_GPUS:
        use_kernels(kind, _tried(kind))
    return _OF_GPUS[kind]


def _tried(kind: str) -> GpuKernels | None:
    """On the current device."""
    try:
        if os.environ.get(build.VARIABLE) == build.OFF:
            raise OSError(f"{build.VARIABLE}={build.OFF}")
        if (compute_capability() or (0, 0)) < OLDEST_GPU:
            raise OSError(f"they are for NVIDIA GPUs of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or more")
        from arealite.kernels.gpu import GpuKernels

        kernels = GpuKernels(torch.device(kind))
        kernels.silu_times(*torch.ones(2, 1, 8, dtype=torch.bfloat16, device=kind))
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:  # triton needs a C compiler, too
        logger.warning("GPU kernels: none, PyTorch computes (%s)", error)
        return None
    logger.info("GPU kernels: by Triton")
    return kernels


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b; where PyTorch would multiply bf16 element by element, in float32 and rounded."""
    if fits(a, b) and not build.has_bf16_products():
        return (a.float() @ b.float()).bfloat16()
    return a @ b


def head_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [R, K] times the transpose of weight [V, K]: float32 on a GPU, else as `matmul`. No gradient.

    Rounded to bf16, a logit of 20 is 0.06 off: most of what server and trainer would differ by.
    """
    if has_flash(hidden):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return matmul(hidden, weight.t())


def product(kernels: Kernels | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N]; [..., N]. No gradient."""
    if kernels is not None and fits(x, weight) and not weight.shape[1] % 2 and x.numel():
        return kernels.product(x, kernels.pack([weight.contiguous()]), bias, len(weight))
    out = matmul(x, weight.t())
    return out if bias is None else out + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(kernels, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, by_x, by_weight, by_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            None,
            matmul(rows, weight).view(x.shape) if by_x else None,
            matmul(rows.t(), x.reshape(-1, x.shape[-1])) if by_weight else None,
            rows.sum(0, dtype=torch.float32).to(rows.dtype) if by_bias else None,
        )


def linear(
    kernels: Kernels | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `product`, with gradients. A row of the result has the same bits whatever rows are beside it, by kernels."""
    result: torch.Tensor = _Linear.apply(kernels, x, weight, bias)
    return result


def fits(*tensors: torch.Tensor, on: str = "cpu") -> bool:
    """Whether the kernels of that kind of device can read them."""
    return all(x.dtype == torch.bfloat16 and x.device.type == on for x in tensors)


class _Remade(torch.autograd.Function):
    """A function of two tensors, `compute`, whose result may be computed again, by the node that made it."""

    @staticmethod
    def forward(ctx: Any, compute: _Compute, gradients: _Gradients, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        ctx.compute, ctx.gradients, ctx.again = compute, gradients, None
        return compute(a, b)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.again = None
        return None, None, *ctx.gradients(*ctx.saved_tensors, grad)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: AnyKernels, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
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


def rms_norm(kernels: AnyKernels, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """As Kernels.rms_norm."""
    if not torch.is_grad_enabled():
        return kernels.rms_norm(x, weight, eps, plus_one)
    setting: dict[str, Any] = {"eps": eps, "plus_one": plus_one}
    return _remade(partial(kernels.rms_norm, **setting), partial(kernels.rms_norm_grad, **setting), x, weight)


def silu_times(kernels: AnyKernels, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As Kernels.silu_times."""
    if not torch.is_grad_enabled():
        return kernels.silu_times(gate, up)
    return _remade(kernels.silu_times, kernels.silu_times_grad, gate, up)


def rotate(kernels: AnyKernels, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As Kernels.rotate; in place where no gradient is wanted."""
    if torch.is_grad_enabled():
        rotated: torch.Tensor = _Rotate.apply(kernels, x, cos, sin)
        return rotated
    kernels.rotate(x, cos, sin, x)
    return x


_made: dict[tuple[int, int], tuple[Any, Any]] = {}  # by place: a result, still alive or not, and its node
_is_recomputing = False


def _remade(compute: _Compute, gradients: _Gradients, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _Remade.apply(compute, gradients, a, b)
    if _is_recomputing and result.grad_fn is not None:
        _made[_place(result)] = weakref.ref(result), result.grad_fn
    return result


def _place(x: torch.Tensor) -> tuple[int, int]:
    """Where it begins, in which memory; tensors without numbers have no address."""
    return x.untyped_storage()._cdata, int(x.storage_offset())


def _keep(kept: torch.Tensor) -> Any:
    result, node = _made.get(_place(kept), (lambda: None, None))
    whole = result()  # while it lives, nothing else is at its place
    is_same = whole is not None and whole.numel() == kept.numel() and kept.is_contiguous() and not kept._version
    return (node, kept.shape) if is_same else kept


def _bring_back(kept: Any) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    node, shape = kept
    if node.again is None:  # until the node's own gradient has been computed: several layers may ask
        node.again = node.compute(*node.saved_tensors)
    brought: torch.Tensor = node.again.view(shape)
    return brought


@contextmanager
def recomputing() -> Iterator[None]:
    """Within, layers keep no results of norms and of gates for their gradients: these are computed again."""
    global _is_recomputing
    _is_recomputing = True
    try:
        with saved_tensors_hooks(_keep, _bring_back):
            yield
    finally:
        _is_recomputing = False
        _made.clear()
