"""What tensor, context and expert parallel make of a model's layers. Called by engine/parallel/spread.py.

Weights are stored as DTensors, so that FSDP, the optimizer, checkpoints and exports know what each rank has of them.
Modules compute on plain tensors; the communication is in `communicate` and nowhere else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from transformers import AttentionInterface

from arealite.engine.attention import tree_attention

try:  # the names since torch 2.13, which warns of the old ones
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

BY_ROWS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
BY_COLUMNS = {"o_proj", "down_proj"}
ULYSSES = "arealite_tree_ulysses"

Call = Callable[[torch.Tensor], torch.Tensor]
# (tokens [N, H], the experts of each [N, k], their weights [N, k]) -> [N, H], as transformers calls its experts
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _Communication(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Call, back: Call) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(grad), None, None


def communicate(x: torch.Tensor, there: Call, back: Call) -> torch.Tensor:
    """there(x), a collective call whose gradient is `back`, another one."""
    out: torch.Tensor = _Communication.apply(x, there, back)
    return out


# --- tensor parallel: a layer's heads and columns over several ranks, and between its blocks its tokens over the same
# ranks (sequence parallel, arXiv:2205.05198)


def tensor_parallel(layers: Collection[nn.Module], mesh: DeviceMesh, apart: Collection[nn.Module]) -> None:
    """Spread decoder layers over `mesh`, but for the modules `apart`, which keep their weights whole.

    A layer's input and output are this rank's tokens; its attention, and its mlp unless that has modules `apart`, run
    on the tokens of all ranks with this rank's heads and columns.
    """
    # Gathering what is sharded twice takes two steps, which DTensor finds worth a warning on every rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for layer in layers:
        for name, module in layer.named_modules():
            if module not in apart:
                _store(module, mesh, partial(_dim_of, name))
        for part in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
            if not any(module in apart for module in part.modules()):
                _with_all_tokens(part, mesh.get_group())


def _dim_of(name: str, key: str) -> int | None:
    """Along which the parameter `key` of the module `name` of a layer is cut; None: each rank has all of it."""
    parts = {*name.split("."), key}
    if parts & BY_ROWS and "lora_A" not in parts:
        return 0
    return 1 if parts & BY_COLUMNS and "lora_B" not in parts else None


def _store(module: nn.Module, mesh: DeviceMesh, dim_of: Callable[[str], int | None]) -> None:
    """Keep of the module's own parameters what this rank has of them, as DTensors, and compute on plain tensors.

    What each rank has whole gets gradients from this rank's tokens or heads alone: FSDP sums them over the ranks before
    its own reduction.
    """
    stored: dict[str, Any] = {}
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters:
        return
    for key, parameter in parameters.items():
        local, dim = parameter.detach(), dim_of(key)
        if dim is not None:
            local = local.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
        placements: list[Placement] = [Replicate() if dim is None else Shard(dim)]
        spread = DTensor.from_local(local, mesh, placements, run_check=False)
        module.register_parameter(key, nn.Parameter(spread, requires_grad=parameter.requires_grad))

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


def _with_all_tokens(part: nn.Module, group: Any) -> None:
    """`part` gets the tokens of all ranks, once, and each rank the sum of all ranks' outputs for its tokens."""
    gathered, summed = partial(_gathered, group), partial(_summed, group)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (communicate(args[0], gathered, summed), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": communicate(kwargs["hidden_states"], gathered, summed)}

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return communicate(out[0], summed, gathered), *out[1:]
        return communicate(out, summed, gathered)

    part.register_forward_pre_hook(before, with_kwargs=True)
    part.register_forward_hook(after)


def _gathered(group: Any, x: torch.Tensor) -> torch.Tensor:
    """[1, N, H] of each of t ranks -> [1, t * N, H] on all."""
    out = x.new_empty(dist.get_world_size(group), *x.shape[1:])
    all_gather_single(out, x.contiguous(), group=group)
    return out.flatten(0, 1)[None]


def _summed(group: Any, x: torch.Tensor) -> torch.Tensor:
    """[1, t * N, H] on each of t ranks -> on each [1, N, H], its tokens of the sum over the ranks."""
    by_rank = x[0].contiguous().unflatten(0, (dist.get_world_size(group), -1))
    out = torch.empty_like(by_rank[:1])
    reduce_scatter_single(out, by_rank, group=group)
    return out


# --- context parallel (Ulysses, arXiv:2309.14509): ranks hold parts of the tokens, and in attention parts of the heads.
# Only attention mixes tokens, so nothing else of a model changes.


def context_parallel(model: Any, layers: Collection[nn.Module], mesh: DeviceMesh) -> None:
    """The attention of a transformers model over the tokens of all ranks of `mesh`, each with its heads."""
    model.config._attn_implementation = ULYSSES

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "context_ranks": mesh}  # which layers hand on to their attention function

    for layer in layers:
        layer.get_submodule("self_attn").register_forward_pre_hook(before, with_kwargs=True)


def ulysses_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    context_ranks: DeviceMesh,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As tree_attention, with n tokens of each of c ranks: query [1, H, n, D], key and value [1, K, n, D], H a multiple
    of c; returns [1, n, H, D]. Key heads are repeated where c does not divide their number."""
    c, swapped = context_ranks.size(), partial(_swapped, context_ranks.get_group())
    repeats = c // math.gcd(c, key.shape[1])
    heads = [query, *(x.repeat_interleave(repeats, 1) for x in (key, value))]
    # [c, (H + 2 K) / c, n, D]: what goes to each rank, then what came from each.
    parts = torch.cat([x[0].unflatten(0, (c, -1)) for x in heads], 1)
    sizes = [x.shape[1] // c for x in heads]
    whole = communicate(parts, swapped, swapped).transpose(0, 1).flatten(1, 2)[None]  # [1, (H + 2 K) / c, c * n, D]
    query, key, value = whole.split(sizes, 1)
    out, _ = tree_attention(module, query, key, value, attention_mask, **settings)
    # [c, n, H / c, D] of the tokens of each rank, then of the heads of each.
    back = communicate(out[0].unflatten(0, (c, -1)), swapped, swapped)
    return back.transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register(ULYSSES, ulysses_attention)


def _swapped(group: Any, x: torch.Tensor) -> torch.Tensor:
    """x[i] goes to rank i; what comes from rank i is the result's [i]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


# --- expert parallel: a layer's experts over several ranks, to which tokens travel and from which they come back
# (GShard, arXiv:2006.16668). Each rank routes its own tokens, so routers, norms and attention know nothing of it.


def expert_parallel(modules: Collection[Any], mesh: DeviceMesh) -> None:
    """Spread `modules`, the experts of a layer each, over `mesh`: every rank keeps the next n-th of them. What a module
    is called with and returns stays the same."""
    for module in modules:
        _store(module, mesh, lambda key: 0)
        module.num_experts //= mesh.size()
        module.forward = _by_dispatch(module.forward, module.num_experts, mesh.get_group())


def _by_dispatch(compute: Experts, num_own: int, group: Any) -> Experts:
    """`compute` has the experts of this rank, `num_own`, numbered from 0; the result is that of all ranks' experts."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        num_chosen, chosen = top_k_index.shape[-1], top_k_index.flatten()
        order = chosen.argsort(stable=True)  # by expert, so by rank
        there, here, experts = shared_out(chosen, num_own, group)
        out_and_in = partial(_sent, group, there, here), partial(_sent, group, here, there)
        tokens = communicate(hidden_states[order // num_chosen], *out_and_in)
        if not len(tokens):  # a token of zeros, so that all experts get their (zero) gradients
            tokens, experts = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])]), experts.new_zeros(1)
        out = compute(tokens, experts[:, None], top_k_weights.new_ones(len(tokens), 1))[: sum(here)]
        back = communicate(out, *reversed(out_and_in))
        back = torch.empty_like(back).index_copy(0, order, back).view(-1, num_chosen, back.shape[1])
        return (back * top_k_weights[:, :, None]).sum(1).to(hidden_states.dtype)

    return forward


def shared_out(chosen: torch.Tensor, num_own: int, group: Any) -> tuple[list[int], list[int], torch.Tensor]:
    """Of tokens that chose these experts [N]: how many go to each rank of the group, how many come from each, and which
    of this rank's experts, `num_own`, those that come have chosen. Collective."""
    num_ranks = dist.get_world_size(group)
    sent = torch.bincount(chosen, minlength=num_ranks * num_own).view(num_ranks, num_own)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    there, here = torch.stack([sent.sum(1), received.sum(1)]).tolist()
    experts = torch.arange(num_own, device=chosen.device).repeat(num_ranks)
    return there, here, experts.repeat_interleave(received.flatten())


def _sent(group: Any, send: list[int], receive: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Rows to all ranks of the group, `send` of them to each in order, for `receive` rows from each."""
    out = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out
