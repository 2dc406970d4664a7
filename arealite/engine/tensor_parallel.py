"""Tensor parallel: a layer's heads and columns over several ranks, and between its blocks its tokens over the same
ranks (sequence parallel, arXiv:2205.05198). Called by engine/parallelize.py.

Weights are stored as DTensors, so that FSDP, the optimizer, checkpoints and exports know what each rank has of them.
Modules compute on plain tensors; the communication is in the two functions of this file and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

try:  # the names since torch 2.13, which warns of the old ones
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

BY_ROWS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
BY_COLUMNS = {"o_proj", "down_proj"}


def tensor_parallel(layers: Collection[nn.Module], mesh: DeviceMesh, apart: Collection[nn.Module]) -> None:
    """Spread decoder layers over `mesh`, but for the modules `apart`, which keep their weights whole.

    A layer's input and output are this rank's tokens; its attention, and its mlp unless that has modules `apart`, run
    on the tokens of all ranks with this rank's heads and columns.
    """
    # Gathering what is sharded twice takes two steps, which DTensor finds worth a warning on every rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for layer in layers:
        for name, module in layer.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not own or module in apart:
                continue
            for key, parameter in own.items():
                spread = DTensor.from_local(*_own_slice(f"{name}.{key}", parameter.detach(), mesh), run_check=False)
                module.register_parameter(key, nn.Parameter(spread, requires_grad=parameter.requires_grad))
            compute_on_local(module)
        for block in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
            if not any(module in apart for module in block.modules()):
                _with_all_tokens(block, mesh.get_group())


def _own_slice(
    name: str, parameter: torch.Tensor, mesh: DeviceMesh
) -> tuple[torch.Tensor, DeviceMesh, list[Placement]]:
    """What this rank stores of a parameter, called `name` in its layer."""
    parts = set(name.split("."))
    dim: int | None = None
    if parts & BY_ROWS and "lora_A" not in parts:
        dim = 0
    elif parts & BY_COLUMNS and "lora_B" not in parts:
        dim = 1
    if dim is None:
        return parameter, mesh, [Replicate()]
    return parameter.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(), mesh, [Shard(dim)]


def compute_on_local(module: nn.Module) -> None:
    """Plain tensors in place of DTensors while `module` computes. What each rank has whole gets gradients from this
    rank's tokens or heads alone: FSDP sums them over the ranks before its own reduction."""
    stored: dict[str, Any] = {}

    def take(module: nn.Module, _: Any) -> None:
        for key, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                stored[key] = parameter
                by_gradient = [Partial() if place.is_replicate() else place for place in parameter.placements]
                module._parameters[key] = parameter.to_local(grad_placements=by_gradient)

    def put_back(module: nn.Module, *_: Any) -> None:
        module._parameters.update(stored)
        stored.clear()

    module.register_forward_pre_hook(take)
    # Recomputation of a checkpointed layer ends in the midst of it with an exception.
    module.register_forward_hook(put_back, always_call=True)


def _with_all_tokens(block: nn.Module, group: Any) -> None:
    """`block` gets the tokens of all ranks, once, and each rank the sum of all ranks' outputs for its tokens."""
    gather: Callable[..., torch.Tensor] = _GatherTokens.apply
    scatter: Callable[..., torch.Tensor] = _ScatterSums.apply

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (gather(args[0], group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": gather(kwargs["hidden_states"], group)}

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        return (scatter(out[0], group), *out[1:]) if isinstance(out, tuple) else scatter(out, group)

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(after)


def _gathered(x: torch.Tensor, group: Any) -> torch.Tensor:
    out = x.new_empty(dist.get_world_size(group), *x.shape[1:])
    all_gather_single(out, x.contiguous(), group=group)
    return out.flatten(0, 1)[None]


def _scattered(x: torch.Tensor, group: Any) -> torch.Tensor:
    by_rank = x[0].contiguous().unflatten(0, (dist.get_world_size(group), -1))
    out = torch.empty_like(by_rank[:1])
    reduce_scatter_single(out, by_rank, group=group)
    return out


class _GatherTokens(torch.autograd.Function):
    """[1, N, H] of each of t ranks -> [1, t * N, H] on all; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scattered(grad, ctx.group), None


class _ScatterSums(torch.autograd.Function):
    """[1, t * N, H] on each of t ranks -> on each [1, N, H], its tokens of the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gathered(grad, ctx.group), None
