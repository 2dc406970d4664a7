"""Where the tokens of one forward pass lie, and the attention that reads it: one packed row, no padding.

Built by model.py for each pass and handed through the Hugging Face modelling code as the keyword `kv_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from arealite.api.errors import ConfigError
from arealite.inference.cache import PAGE_TOKENS, SCRATCH_PAGE, PagePool, pages_for
from arealite.inference.sequence import Sequence

ATTENTION_NAME = "arealite_kv"  # under which transformers knows `packed_attention`
QUERIES_PER_CALL = 512  # queries of a long prompt whose scores exist at one time
KEYS_PER_CALL = 4096  # keys gathered at one time in decode: stays in a core's cache
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # windows are judged at load, with the context length


@dataclass(frozen=True)
class Bucket:
    """Decode rows [first, last) that read equally many pages. `table` [rows * pages] page numbers, row by row;
    `mask` [kv heads * rows, 1, pages * PAGE_TOKENS] additive float32, -inf past each row's own length."""

    first: int
    last: int
    table: torch.Tensor
    mask: torch.Tensor


@dataclass
class KVLayout:
    """One packed pass of T tokens. `slots` [T]: the pool's token place of each. Either `segments` (prefill: whole
    sequences as [start, end) of the pass) or `buckets` (decode: one token each) say what attends to what.

    Without a pool nothing is stored, and the shapes of keys and values are noted in `seen`, per layer.
    """

    pool: PagePool | None = None
    slots: torch.Tensor | None = None
    segments: list[tuple[int, int]] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    seen: dict[int, tuple[torch.Size, torch.Size]] = field(default_factory=dict)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kv_layout: KVLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer in transformers' attention interface.

    Args:
        query: [1, heads, T, head dim]; `key` and `value` [1, kv heads, T, head dim].

    Returns:
        [1, T, heads, head dim], and None for the weights.
    """
    if kv_layout is None:
        raise ConfigError("this model's code does not pass attention keywords on: the native server cannot serve it")
    odd = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if odd:
        raise ConfigError(f"this model's attention uses {', '.join(odd)}, which the native server does not support yet")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query[0], key[0], value[0]  # [heads, T, head dim]
    if kv_layout.pool is None or kv_layout.slots is None:
        kv_layout.seen[layer] = (k.shape, v.shape)
        return _prefill(q, k, v, [(0, q.shape[1])], scale)[None], None
    kv_layout.pool.keys[layer].index_copy_(1, kv_layout.slots, k)
    kv_layout.pool.values[layer].index_copy_(1, kv_layout.slots, v)
    if kv_layout.segments:
        return _prefill(q, k, v, kv_layout.segments, scale)[None], None
    return _decode(q, kv_layout.pool, layer, kv_layout.buckets, scale)[None], None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention of a batch: q [n, queries, D], k and v [n, keys, D], `mask` additive and float32, of a shape
    that broadcasts to [n, queries, keys]; [n, queries, D].

    Plain matrix products with the softmax in float32, as in the trainer. One query alone gives bit for bit what it
    gives among many, which fused kernels do not: so a token's logprob in decode is that of the trainer's packed pass.
    """
    scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale).add_(mask)
    return torch.bmm(torch.softmax(scores, -1).to(v.dtype), v)


def _prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: list[tuple[int, int]], scale: float
) -> torch.Tensor:
    """Causal attention within each segment; heads first in, [T, heads, head dim] out."""
    heads, num_tokens, head_dim = q.shape
    kv_heads = k.shape[0]
    out = q.new_empty(num_tokens, heads, head_dim)
    for start, end in segments:
        for first in range(start, end, QUERIES_PER_CALL):
            last = min(first + QUERIES_PER_CALL, end)
            mask = torch.full((last - first, last - start), -torch.inf, device=q.device).triu_(first - start + 1)
            # The query heads of one key head stand below each other: keys are not repeated.
            block = q[:, first:last].reshape(kv_heads, -1, head_dim)
            result = _attend(block, k[:, start:last], v[:, start:last], mask.repeat(heads // kv_heads, 1), scale)
            out[first:last] = result.view(heads, last - first, head_dim).transpose(0, 1)
    return out


def _decode(q: torch.Tensor, pool: PagePool, layer: int, buckets: list[Bucket], scale: float) -> torch.Tensor:
    """Each row's one query over its own pages; padding rows get zeros. [heads, T, head dim] in, [T, heads, head dim]
    out."""
    heads, num_rows, head_dim = q.shape
    keys, values = pool.tensor[layer]
    kv_heads = keys.shape[0]
    out = q.new_zeros(num_rows, heads, head_dim)
    for bucket in buckets:
        rows = bucket.last - bucket.first
        grouped = q[:, bucket.first : bucket.last].view(kv_heads, -1, rows, head_dim).transpose(1, 2)
        k = keys.index_select(1, bucket.table).view(kv_heads * rows, -1, head_dim)
        v = values.index_select(1, bucket.table).view(kv_heads * rows, -1, head_dim)
        result = _attend(grouped.reshape(kv_heads * rows, -1, head_dim), k, v, bucket.mask, scale)
        out[bucket.first : bucket.last] = result.view(kv_heads, rows, -1, head_dim).transpose(0, 1).flatten(1, 2)
    return out


def bucket_pages(num_tokens: int) -> int:
    """Pages a decode row of this length reads: 1, 2, 3, 4, 6, 8, 12, 16, ... so that at most a third is masked and
    the shape depends on nothing but the row's own length."""
    wanted = pages_for(num_tokens)
    power = 1
    while power < wanted:
        power *= 2
    return 3 * power // 4 if power >= 4 and 3 * power // 4 >= wanted else power


def _slot(sequence: Sequence, position: int) -> int:
    """The pool's token place of the sequence's token at this position."""
    return sequence.pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS


def prefill_layout(pool: PagePool, sequences: list[Sequence], lengths: list[int]) -> KVLayout:
    """The first `lengths[i]` tokens of each sequence, end to end."""
    slots: list[int] = []
    segments = []
    for sequence, length in zip(sequences, lengths, strict=True):
        segments.append((len(slots), len(slots) + length))
        slots += [_slot(sequence, position) for position in range(length)]
    return KVLayout(pool, torch.tensor(slots, device=pool.tensor.device), segments)


def decode_layout(pool: PagePool, sequences: list[Sequence], num_rows: int, keys_per_call: int) -> KVLayout:
    """One token of each sequence, at position `num_computed`; `sequences` must be sorted by `decode_order`. Rows from
    len(sequences) to `num_rows` are padding."""
    device = pool.tensor.device
    padding = [SCRATCH_PAGE * PAGE_TOKENS] * (num_rows - len(sequences))
    slots = [_slot(s, s.num_computed) for s in sequences] + padding
    buckets: list[Bucket] = []
    for num_pages, run in groupby(sequences, decode_order):
        rows = list(run)
        num_at_once = max(1, keys_per_call // (num_pages * PAGE_TOKENS))
        for start in range(0, len(rows), num_at_once):
            part = rows[start : start + num_at_once]
            table = [page for s in part for page in s.pages + [SCRATCH_PAGE] * (num_pages - len(s.pages))]
            lengths = torch.tensor([s.num_computed + 1 for s in part])
            past = torch.arange(num_pages * PAGE_TOKENS)[None] >= lengths[:, None]
            mask = torch.zeros(past.shape).masked_fill_(past, -torch.inf).repeat(pool.tensor.shape[2], 1)[:, None]
            first = buckets[-1].last if buckets else 0
            buckets.append(Bucket(first, first + len(part), torch.tensor(table, device=device), mask.to(device)))
    return KVLayout(pool, torch.tensor(slots, device=device), buckets=buckets)


def decode_order(sequence: Sequence) -> int:
    """Pages that this row reads in decode; as a sort key it puts rows of one bucket side by side."""
    return bucket_pages(sequence.num_computed + 1)
