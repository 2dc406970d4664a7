"""The KV cache: pages of fixed size, counted references, and an index of prompts that are already computed.

Owned by the engine thread (scheduler.py allocates and frees, model.py reads and writes the tensors).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

PAGE_TOKENS = 16
MAX_CACHED_PROMPTS = 256  # each keeps one row of logits
SCRATCH_PAGE = 0  # written by padding rows, read by nobody's unmasked keys


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class PagePool:
    """All keys and values, `tensor` [layers, 2, kv heads, pages, PAGE_TOKENS, head dim], and who holds which page.

    A page with more than one holder is never written at positions that another holder reads.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = pages_for(num_tokens)
        dims = (num_layers, 2, num_kv_heads, self.num_pages + 1, PAGE_TOKENS, head_dim)
        self.tensor = _lazy_zeros(dims, dtype, device)
        # Views per layer, [kv heads, pages * PAGE_TOKENS, head dim]: what a step writes its new tokens to.
        flat = self.tensor.flatten(3, 4)
        self.keys = [flat[layer, 0] for layer in range(num_layers)]
        self.values = [flat[layer, 1] for layer in range(num_layers)]
        self._holders = [0] * (self.num_pages + 1)
        self._free = list(range(self.num_pages, 0, -1))

    @property
    def num_tokens(self) -> int:
        return self.num_pages * PAGE_TOKENS

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num: int) -> list[int]:
        """`num` pages with one holder each; so many must be free."""
        pages = [self._free.pop() for _ in range(num)]
        self.hold(pages)
        return pages

    def hold(self, pages: list[int]) -> None:
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: list[int]) -> None:
        """Give up one hold on each page; a page without holders is free again."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def copy_page(self, source: int, target: int) -> None:
        self.tensor[:, :, :, target].copy_(self.tensor[:, :, :, source])

    def clean(self, pages: list[int]) -> None:
        """Zero the pages that nobody else holds. A NaN left behind would reach later holders through masked positions
        (0 * NaN)."""
        self.tensor[:, :, :, [SCRATCH_PAGE, *(page for page in pages if self._holders[page] == 1)]] = 0


def _lazy_zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory on a CPU is committed by the operating system only when first touched."""
    if device.type != "cpu":
        return torch.zeros(dims, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(dims) * dtype.itemsize, np.uint8)).view(dtype).view(dims)


@dataclass(frozen=True)
class CachedPrompt:
    """A computed prompt: its pages (the last may be partly filled) and the logits [V] after its last token."""

    pages: list[int]
    logits: torch.Tensor


class PromptIndex:
    """Prompts whose keys and values are in the pool, oldest use first, so that a group's prompt is computed once.

    Each entry holds its pages; entries are dropped when the pages are needed, and all of them when weights change.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._entries: OrderedDict[bytes, CachedPrompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: bytes) -> CachedPrompt | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def add(self, key: bytes, pages: list[int], logits: torch.Tensor) -> None:
        if key not in self._entries:
            self._pool.hold(pages)
            self._entries[key] = CachedPrompt(list(pages), logits)
        if len(self._entries) > MAX_CACHED_PROMPTS:
            self.evict_oldest()

    def evict_oldest(self) -> bool:
        """Drop one entry; False when there is none. Its pages become free unless a running sequence holds them too."""
        if not self._entries:
            return False
        _, entry = self._entries.popitem(last=False)
        self._pool.drop(entry.pages)
        return True

    def clear(self) -> None:
        while self.evict_oldest():
            pass
