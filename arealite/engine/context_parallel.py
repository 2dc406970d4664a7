"""Context parallel (Ulysses, arXiv:2309.14509): ranks hold parts of the tokens, and in attention parts of the heads.

Called by engine/parallelize.py. Only attention mixes tokens, so nothing else of a model changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface

from arealite.engine.attention import tree_attention

ULYSSES = "arealite_tree_ulysses"


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
    c, group = context_ranks.size(), context_ranks.get_group()
    repeats = c // math.gcd(c, key.shape[1])
    heads = [query, *(x.repeat_interleave(repeats, 1) for x in (key, value))]
    # [c, (H + 2 K) / c, n, D]: what goes to each rank, then what came from each.
    parts = torch.cat([x[0].unflatten(0, (c, -1)) for x in heads], 1)
    sizes = [x.shape[1] // c for x in heads]
    whole = _exchange(parts, group).transpose(0, 1).flatten(1, 2)[None]  # [1, (H + 2 K) / c, c * n, D]
    query, key, value = whole.split(sizes, 1)
    out, _ = tree_attention(module, query, key, value, attention_mask, **settings)
    # [c, n, H / c, D] of the tokens of each rank, then of the heads of each.
    back = _exchange(out[0].unflatten(0, (c, -1)), group)
    return back.transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register(ULYSSES, ulysses_attention)


def _exchange(x: torch.Tensor, group: Any) -> torch.Tensor:
    """x[i] goes to rank i; what comes from rank i is the result's [i]."""
    out: torch.Tensor = _AllToAll.apply(x, group)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grad, ctx.group), None
