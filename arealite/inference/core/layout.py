"""Where the tokens of one forward pass lie, and the attention that reads it: one packed row, no padding.

Built by served_model.py for each pass (by graphs.py for those that are replayed on a GPU), and handed through the
Hugging Face modelling code as the keyword `kv_layout`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from arealite.api.errors import ConfigError
from arealite.devices import has_flash, is_gpu
from arealite.inference.core.cache import PAGE_TOKENS, SCRATCH_PAGE, PagePool, pages_for
from arealite.inference.core.sequence import Span
from arealite.kernels.cpu import Kernels, PagedSpans
from arealite.kernels.functions import matmul
from arealite.kernels.varlen import PackedRows, varlen_attention

if TYPE_CHECKING:
    from arealite.kernels.gpu import GpuKernels

ATTENTION_NAME = "arealite_kv"  # under which transformers knows `packed_attention`
WIDTH_STEP = 16  # page numbers of a row of decode are filled up to a multiple: the kernel reads aligned rows faster
QUERIES_PER_CALL = 512  # queries of long spans whose scores exist at one time
QUERIES_PER_PIECE = 64  # of one span that a core computes at a time: their scores stay near it
KEYS_PER_CALL = 4096  # keys of short spans gathered at one time: stays in a core's cache
ALIGNMENT = 16  # bytes between tensors that are copied together
KEYS_PER_CALL_GPU = 1 << 20  # there, few large calls
_UNSUPPORTED = {"s_aux", "position_bias"}


class LayerSetting(NamedTuple):
    """Of one layer's attention. `window`: keys that a query sees, its own included; None for all."""

    layer: int
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class PagedRuns:
    """Tokens [first, last) of a pass: n runs of L queries, each of which reads equally many pages of its sequence.

    `table` [n * pages]: page numbers, run by run. `queries` [n, 1, L, 1] and `keys` [n, 1, 1, pages * PAGE_TOKENS]:
    positions in the sequence.
    """

    first: int
    last: int
    table: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor


class KVLayout:
    """One packed pass over `spans`, end to end, padded to at least `num_rows` tokens, in the pages of `pool`.

    Neighbours of one `span_order` are computed together, unless `one_by_one`: then no result depends on what else is in
    the pass.
    """

    def __init__(self, pool: PagePool, spans: list[Span], num_rows: int = 0, one_by_one: bool = False) -> None:
        self.pool = pool
        self.spans = spans
        self._one_by_one = one_by_one
        self._num_padding = max(0, num_rows - sum(span.count for span in spans))
        self._blocks: dict[int | None, list[PagedRuns]] = {}

    @cached_property
    def slots(self) -> torch.Tensor:
        """[T]: each token's place in the pool."""
        padding = np.full(self._num_padding, SCRATCH_PAGE * PAGE_TOKENS)
        return to_device([np.concatenate([*map(token_slots, self.spans), padding])], self._device)[0]

    @cached_property
    def paged_spans(self) -> PagedSpans:
        """The same for the compiled kernels."""
        pieces, tables = array("i"), array("i")
        first = longest = 0
        for sequence, begin, count in self.spans:
            end = begin + count
            for start in range(begin, end, QUERIES_PER_PIECE):
                num = min(QUERIES_PER_PIECE, end - start)
                pieces.extend((first, start, num, len(tables)))
                first += num
            tables.extend(sequence.pages[: pages_for(end)])
            longest = max(longest, end)
        return PagedSpans(np.asarray(pieces).reshape(-1, 4), np.asarray(tables), first, longest)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: LayerSetting) -> torch.Tensor:
        """Store keys and values [kv heads, T, D] of one layer in the pool, and let queries [heads, T, D] see their
        sequences; [T, heads, D], zeros for padding."""
        kernels, pages = self.pool.kernels, self.pool.tensor[setting.layer]
        if isinstance(kernels, Kernels):
            return kernels.attention(q, k, v, pages, self.paged_spans, setting.window or 0, setting.scale)
        self.store(k, v, setting.layer)
        return paged_attention(q, self, setting)

    def store(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> None:
        """The tokens' keys and values [kv heads, T, D] to their places."""
        self.pool.keys[layer].index_copy_(1, self.slots, k)
        self.pool.values[layer].index_copy_(1, self.slots, v)

    def blocks(self, window: int | None) -> list[PagedRuns]:
        """What layers of this window compute, in pieces of bounded size; planned when first asked for."""
        if window in self._blocks:
            return self._blocks[window]
        keys_per_call = KEYS_PER_CALL if self._device.type == "cpu" else KEYS_PER_CALL_GPU
        pieces = [
            Span(span.sequence, start, min(QUERIES_PER_CALL, span.end - start))
            for span in self.spans
            for start in range(span.start, span.end, QUERIES_PER_CALL)
        ]
        arrays: list[np.ndarray] = []
        for (count, num_pages), run in groupby(pieces, lambda piece: span_order(piece, window)):
            alike = list(run)
            num_at_once = min(QUERIES_PER_CALL // count, keys_per_call // (num_pages * PAGE_TOKENS))
            num_at_once = 1 if self._one_by_one else max(1, num_at_once)
            for start in range(0, len(alike), num_at_once):
                arrays += _table(alike[start : start + num_at_once], num_pages)
        tensors = iter(to_device(arrays, self._device))
        ends = np.cumsum([0, *(queries.size for queries in arrays[1::3])]).tolist()
        parts = zip(ends, ends[1:], tensors, tensors, tensors, strict=False)
        self._blocks[window] = [PagedRuns(*fields) for fields in parts]
        return self._blocks[window]

    @property
    def _device(self) -> torch.device:
        return self.pool.tensor.device


def _table(pieces: list[Span], num_pages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Table, queries and keys of a PagedRuns: each piece reads the `num_pages` pages up to its last token, or the
    first ones if it has not so many."""
    count = pieces[0].count
    table = np.full((len(pieces), num_pages), SCRATCH_PAGE)
    first_pages = np.array([max(0, pages_for(piece.end) - num_pages) for piece in pieces])
    for row, first_page, piece in zip(table, first_pages, pieces, strict=True):
        pages = piece.sequence.pages[first_page : first_page + num_pages]
        row[: len(pages)] = pages
    queries = np.array([piece.start for piece in pieces])[:, None] + np.arange(count)
    keys = first_pages[:, None] * PAGE_TOKENS + np.arange(num_pages * PAGE_TOKENS)
    return table.reshape(-1), queries[:, None, :, None], keys[:, None, None, :]


@dataclass
class ShapeProbe:
    """Stands in for a layout of one token, and notes the shapes of key and value of every layer."""

    seen: dict[LayerSetting, tuple[torch.Size, torch.Size]] = field(default_factory=dict)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    kv_layout: KVLayout | ShapeProbe | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer in transformers' attention interface.

    Args:
        query: [1, heads, T, head dim]; `key` and `value` [1, kv heads, T, head dim].
        sliding_window: keys that a query sees, its own included; None or 0 for all.

    Returns:
        [1, T, heads, head dim], and None for the weights.
    """
    if kv_layout is None:
        raise ConfigError("this model's code does not pass attention keywords on: the native server cannot serve it")
    if not _UNSUPPORTED.isdisjoint(kwargs) and (odd := [name for name in _UNSUPPORTED if kwargs.get(name) is not None]):
        raise ConfigError(f"this model's attention uses {', '.join(odd)}, which the native server does not support yet")
    q, k, v = query[0], key[0], value[0]  # [heads, T, head dim]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    setting = LayerSetting(int(module.layer_idx), scale, sliding_window or None, softcap)  # type: ignore[arg-type]
    if isinstance(kv_layout, ShapeProbe):
        kv_layout.seen[setting] = k.shape, v.shape
        return v.repeat_interleave(len(q) // len(v), 0).transpose(0, 1)[None], None  # one token sees itself
    return kv_layout.attend(q, k, v, setting)[None], None


def paged_attention(q: torch.Tensor, layout: KVLayout, setting: LayerSetting) -> torch.Tensor:
    """Each query over its sequence's tokens up to its own, in the pool's pages; padding rows get zeros.

    Plain matrix products with the softmax in float32, as in the trainer. One query alone gives bit for bit what it
    gives among many, which fused kernels do not: so a token's logprob in decode is that of the trainer's packed pass.

    Args:
        q: [heads, T, head dim].

    Returns:
        [T, heads, head dim].
    """
    heads, num_tokens, head_dim = q.shape
    layer, scale, window, softcap = setting
    keys, values = layout.pool.tensor[layer]  # [kv heads, pages, PAGE_TOKENS, head dim]
    kv_heads = len(keys)
    out = q.new_zeros(num_tokens, heads, head_dim)
    for block in layout.blocks(window):
        n, _, num_queries, _ = block.queries.shape
        batch = kv_heads * n
        # The query heads of one key head stand below each other: keys are not repeated.
        grouped = q[:, block.first : block.last].view(kv_heads, -1, n, num_queries, head_dim).transpose(1, 2)
        placed = out[block.first : block.last].view(n, num_queries, heads, head_dim)
        k = keys.index_select(1, block.table).view(batch, -1, head_dim)
        v = values.index_select(1, block.table).view(batch, -1, head_dim)
        step = num_queries if is_gpu(q) else QUERIES_PER_PIECE
        for part in (slice(start, start + step) for start in range(0, num_queries, step)):
            queries, shape = block.queries[:, :, part], (kv_heads, n, heads // kv_heads, -1)
            scores = matmul(grouped[..., part, :].reshape(batch, -1, head_dim), k.transpose(1, 2)).float().mul_(scale)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            hidden = block.keys > queries  # what comes later, or too long before
            if window is not None:
                hidden.logical_or_(block.keys <= queries - window)
            scores.view(*shape, k.shape[1]).masked_fill_(hidden, -torch.inf)
            result = matmul(torch.softmax(scores, -1).to(v.dtype), v).view(*shape, head_dim)
            placed[:, part] = result.permute(1, 3, 0, 2, 4).reshape(n, -1, heads, head_dim)
    return out


@dataclass(frozen=True)
class DecodeRows:
    """One token of each of B sequences. `tables` int32 [B, n]: their pages; `lens` int32 [B]: keys that each sees, its
    own included, 0 for padding; `max_keys`: at least the largest of `lens`."""

    tables: torch.Tensor
    lens: torch.Tensor
    max_keys: int


class GpuLayout(KVLayout):
    """Any spans. The first ones, up to one of several tokens, are decoded; the others are pieces."""

    def __init__(self, pool: PagePool, kernels: GpuKernels, spans: list[Span], num_rows: int = 0) -> None:
        super().__init__(pool, spans, num_rows)
        self._kernels = kernels
        self._num_singles = next((i for i, span in enumerate(spans) if span.count > 1), len(spans))
        singles, pieces = spans[: self._num_singles], spans[self._num_singles :]
        self._pieces = KVLayout(pool, pieces)
        arrays = [*(_tables(singles) if singles else []), *(_places(pieces) if pieces else [])]
        places = to_device(arrays, pool.tensor.device)
        if singles:
            self._rows = DecodeRows(places[0], places[1], max(span.end for span in singles))
        if pieces:
            self._pieces.slots, self._seen, queries, keys = places[-4:]
            self._packed = PackedRows(queries, keys, max(s.count for s in pieces), max(s.end for s in pieces))

    @classmethod
    def of_rows(cls, pool: PagePool, kernels: GpuKernels, rows: DecodeRows) -> GpuLayout:
        """A pass over one token of each row, whose places are only known on the GPU."""
        layout = cls(pool, kernels, [])
        layout._rows, layout._num_singles = rows, len(rows.lens)
        return layout

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: LayerSetting) -> torch.Tensor:
        """As KVLayout.attend."""
        n, parts = self._num_singles, []
        last = q.shape[1] - self._num_padding
        if n:
            single, key, value = (x[:, :n].transpose(0, 1) for x in (q, k, v))
            rows = self._rows
            where = self.pool.tensor[setting.layer], rows.tables, rows.lens
            bounds = setting.window or 0, setting.scale, rows.max_keys
            parts.append(self._kernels.decode(single, key, value, *where, *bounds))
        if self._pieces.spans:
            parts.append(self._attend_pieces(q[:, n:last], k[:, n:last], v[:, n:last], setting))
        if self._num_padding:
            parts.append(q.new_zeros(self._num_padding, len(q), q.shape[2]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_pieces(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: LayerSetting) -> torch.Tensor:
        """What they see is gathered from the pages, unless it is themselves alone."""
        self._pieces.store(k, v, setting.layer)
        if not _has_varlen(q):
            return paged_attention(q, self._pieces, setting)
        if any(span.start for span in self._pieces.spans):
            k, v = (x[setting.layer].index_select(1, self._seen) for x in (self.pool.keys, self.pool.values))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return varlen_attention(q, k, v, self._packed, setting.scale, setting.window)


def _has_varlen(q: torch.Tensor) -> bool:
    """Whether the trainer's kernel knows such queries."""
    return has_flash(q)


def _tables(spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Pages int32 [B, n] and keys int32 [B] of single tokens."""
    lens = np.array([span.end for span in spans], np.int32)
    tables = np.zeros((len(spans), table_width(int(lens.max()))), np.int32)
    for row, span in zip(tables, spans, strict=True):
        num = pages_for(span.end)
        row[:num] = span.sequence.pages[:num]
    return tables, lens


def table_width(num_keys: int) -> int:
    """Page numbers in a row of a table for so many keys."""
    return -(-pages_for(num_keys) // WIDTH_STEP) * WIDTH_STEP


def _places(spans: list[Span]) -> list[np.ndarray]:
    """Of pieces: the pool's token places of their tokens and of all that they see, int64; where each one's queries and
    keys begin, int32 [n + 1]."""
    slots = np.concatenate([token_slots(span) for span in spans])
    seen = np.concatenate([token_slots(Span(span.sequence, 0, span.end)) for span in spans])
    counts, ends = [0, *(span.count for span in spans)], [0, *(span.end for span in spans)]
    return [slots, seen, np.cumsum(counts, dtype=np.int32), np.cumsum(ends, dtype=np.int32)]


class Transfer:
    """Tensors on a device for arrays of these shapes and types, in one memory that one copy fills. A GPU fetches it
    from locked memory in its own time, so that nobody waits for it."""

    def __init__(self, arrays: list[np.ndarray], device: torch.device) -> None:
        self._kinds = [(array.nbytes, torch.from_numpy(array).dtype, array.shape) for array in arrays]
        sizes = [-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes, _, _ in self._kinds]
        self._starts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self.tensors = self._parts(self._whole)

    def fill(self, arrays: list[np.ndarray]) -> None:
        """With arrays of the same shapes and types."""
        host = torch.empty(len(self._whole), dtype=torch.uint8, pin_memory=is_gpu(self._whole))
        for part, numbers in zip(self._parts(host), arrays, strict=True):
            part.copy_(torch.from_numpy(numbers))
        self._whole.copy_(host, non_blocking=True)

    def _parts(self, whole: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(self._starts, self._kinds, strict=True)
        return [whole[start : start + nbytes].view(dtype).view(shape) for start, (nbytes, dtype, shape) in pairs]


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors there, by a Transfer; on a CPU, the arrays themselves."""
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(array) for array in arrays]
    transfer = Transfer(arrays, device)
    transfer.fill(arrays)
    return transfer.tensors


@cache
def bucket_pages(num_tokens: int) -> int:
    """Pages a decode row of this length reads: 1, 2, 3, 4, 6, 8, 12, 16, ... so that at most a third is masked and
    the shape depends on nothing but the row's own length."""
    wanted = pages_for(num_tokens)
    power = 1
    while power < wanted:
        power *= 2
    return 3 * power // 4 if power >= 4 and 3 * power // 4 >= wanted else power


def span_order(span: Span, window: int | None = None) -> tuple[int, int]:
    """Queries, and pages that they read; as a sort key it puts spans that can be computed together side by side."""
    num_pages = bucket_pages(span.end) if span.count == 1 else pages_for(span.end)
    if window is not None:
        num_pages = min(num_pages, pages_for(window + span.count - 2) + 1)  # wherever the window begins in a page
    return span.count, num_pages


def token_slots(span: Span) -> np.ndarray:
    """The pool's token places of the span's tokens."""
    positions = np.arange(span.start, span.end)
    return np.asarray(span.sequence.pages)[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS
