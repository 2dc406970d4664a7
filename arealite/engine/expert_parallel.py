"""Expert parallel: a layer's experts over several ranks, to which tokens travel and from which they come back (GShard,
arXiv:2006.16668). Called by engine/parallelize.py.

Each rank routes its own tokens, so routers, norms and attention know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from arealite.engine.tensor_parallel import compute_on_local

# (tokens [N, H], the experts of each [N, k], their weights [N, k]) -> [N, H], as transformers calls its experts
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def expert_parallel(modules: Collection[Any], mesh: DeviceMesh) -> None:
    """Spread `modules`, the experts of a layer each, over `mesh`: every rank keeps the next n-th of them. What a module
    is called with and returns stays the same."""
    for module in modules:
        for key, parameter in list(module.named_parameters(recurse=False)):
            own = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            spread = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            module.register_parameter(key, nn.Parameter(spread, requires_grad=parameter.requires_grad))
        module.num_experts //= mesh.size()
        compute_on_local(module)
        module.forward = _by_dispatch(module.forward, module.num_experts, mesh.get_group())


def _by_dispatch(compute: Experts, num_own: int, group: Any) -> Experts:
    """`compute` has the experts of this rank, `num_own`, numbered from 0; the result is that of all ranks' experts."""
    exchange: Callable[..., torch.Tensor] = _Exchange.apply

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        num_chosen, num_ranks = top_k_index.shape[-1], dist.get_world_size(group)
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)  # by expert, so by rank
        sent = torch.bincount(chosen, minlength=num_ranks * num_own).view(num_ranks, num_own)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        there, here = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        tokens = exchange(hidden_states[order // num_chosen], there, here, group)
        experts = torch.arange(num_own, device=chosen.device).repeat(num_ranks).repeat_interleave(received.flatten())
        if not len(tokens):  # a token of zeros, so that all experts get their (zero) gradients
            tokens, experts = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])]), experts.new_zeros(1)
        out = compute(tokens, experts[:, None], top_k_weights.new_ones(len(tokens), 1))[: sum(here)]
        back = exchange(out, here, there, group)
        back = torch.empty_like(back).index_copy(0, order, back).view(-1, num_chosen, back.shape[1])
        return (back * top_k_weights[:, :, None]).sum(1).to(hidden_states.dtype)

    return forward


class _Exchange(torch.autograd.Function):
    """Rows to all ranks of the group, `send` of them to each in order, for `receive` rows from each."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchanged(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchanged(rows: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
    out = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out
