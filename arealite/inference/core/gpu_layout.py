"""A pass by the kernels of a GPU: single tokens by the one of decode, pieces of prompts by the trainer's own.

Made by served_model.py for each pass, and by graphs.py for passes that are replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from arealite.inference.core.cache import PagePool, pages_for
from arealite.inference.core.layout import KVLayout, paged_attention, to_device, token_slots
from arealite.inference.core.sequence import Span
from arealite.kernels.varlen import PackedRows, varlen_attention

if TYPE_CHECKING:
    from arealite.kernels.gpu import GpuKernels

WIDTH_STEP = 16  # page numbers of a row are filled up to a multiple: the kernel reads aligned rows faster


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

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """As KVLayout.attend."""
        n, parts = self._num_singles, []
        last = q.shape[1] - self._num_padding
        if n:
            single, key, value = (x[:, :n].transpose(0, 1) for x in (q, k, v))
            rows = self._rows
            where = self.pool.tensor[layer], rows.tables, rows.lens
            parts.append(self._kernels.decode(single, key, value, *where, window or 0, scale, rows.max_keys))
        if self._pieces.spans:
            parts.append(self._attend_pieces(q[:, n:last], k[:, n:last], v[:, n:last], layer, scale, window))
        if self._num_padding:
            parts.append(q.new_zeros(self._num_padding, len(q), q.shape[2]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_pieces(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """What they see is gathered from the pages, unless it is themselves alone."""
        self._pieces.store(k, v, layer)
        if not _has_varlen(q):
            return paged_attention(q, self._pieces, layer, scale, window, None)
        if any(span.start for span in self._pieces.spans):
            k, v = (x[layer].index_select(1, self._seen) for x in (self.pool.keys, self.pool.values))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return varlen_attention(q, k, v, self._packed, scale, window)


def _has_varlen(q: torch.Tensor) -> bool:
    """Whether the trainer's kernel knows such queries."""
    return q.is_cuda and q.dtype != torch.float32


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
    own = np.concatenate([token_slots(span) for span in spans])
    seen = np.concatenate([token_slots(Span(span.sequence, 0, span.end)) for span in spans])
    counts, ends = [0, *(span.count for span in spans)], [0, *(span.end for span in spans)]
    return [own, seen, np.cumsum(counts, dtype=np.int32), np.cumsum(ends, dtype=np.int32)]
