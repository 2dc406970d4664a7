"""PyTorch's FlashAttention kernel for packed sequences on GPUs. Called by engine/attention.py, and by the server."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PackedRows:
    """Where the queries and the keys of each row lie, end to end: int32 [rows + 1] on the device, the first of them 0;
    and the most of both that a row has. A row's queries are the last of its keys; every row has one at least."""

    queries: torch.Tensor
    keys: torch.Tensor
    max_queries: int
    max_keys: int


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: PackedRows, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal softmax attention within each row; differentiable. q [T_q, H, D], k and v [T_k, K, D], all bf16 or fp16;
    heads H are a multiple of key heads K, D is a multiple of 8 up to 256. Returns [T_q, H, D].

    `window`: how many of the last keys, its own included, a query sees (None: all).
    """
    from torch.nn.attention.varlen import varlen_attn

    # Older releases of PyTorch have no such argument: there heads may always differ.
    is_asked = "enable_gqa" in inspect.signature(varlen_attn).parameters
    heads: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if is_asked else {}
    where = rows.queries, rows.keys, rows.max_queries, rows.max_keys
    # A bound to the right, 0, is always given: without it the kernel lays out rows of one query each in another way,
    # which its backward pass does not know.
    seen = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, *where, scale=scale, window_size=seen, **heads)
    assert isinstance(out, torch.Tensor)
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(at)
        ctx.shape = x.shape
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (at,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        return total.index_add_(0, at, grad.float()).to(grad.dtype), None


def gather(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """x[at], rows; of a row that is taken more than once the gradients are added in float32 and rounded once."""
    gathered: torch.Tensor = _GatherRows.apply(x, at)
    return gathered
