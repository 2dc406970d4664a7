"""The KV cache: pages of fixed size, and who needs which.

Owned by the engine thread (scheduler.py and prefix.py allocate and free, served_model.py reads and writes the tensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from arealite.kernels.functions import AnyKernels

PAGE_TOKENS = 16
SCRATCH_PAGE = 0  # written by padding rows, read by nobody's unmasked keys


def pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class PagePool:
    """All keys and values, `tensor` [layers, 2, kv heads, pages, PAGE_TOKENS, head dim], and who needs which page:
    sequences hold pages, entries of the prefix cache keep them.

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
        kernels: AnyKernels | None = None,
    ) -> None:
        """With `kernels`, these alone read and write pages, in an order of elements of their own."""
        self.kernels = kernels
        self.num_pages = pages_for(num_tokens)
        self._dims = (num_layers, 2, num_kv_heads, self.num_pages + 1, PAGE_TOKENS, head_dim)
        self._kind = dtype, device
        self.take_memory()
        self._holders = [0] * (self.num_pages + 1)  # sequences
        self._keepers = [0] * (self.num_pages + 1)  # entries of the prefix cache
        self.num_idle = 0  # pages that are kept and not held
        self._free = list(range(self.num_pages, 0, -1))

    def take_memory(self) -> None:
        """Zeros for all pages."""
        self.tensor = _lazy_zeros(self._dims, *self._kind)
        # Views per layer, [kv heads, pages * PAGE_TOKENS, head dim]: what a step writes its new tokens to.
        self.keys, self.values = (list(part) for part in self.tensor.flatten(3, 4).unbind(1))

    def give_memory(self) -> None:
        """Nobody holds or keeps a page: their memory is for others, until `take_memory`."""
        self.tensor = self.tensor.new_empty(0)
        self.keys, self.values = [], []
        if self.tensor.is_cuda:
            torch.cuda.empty_cache()

    @property
    def has_memory(self) -> bool:
        return bool(self.keys)

    @property
    def num_tokens(self) -> int:
        return self.num_pages * PAGE_TOKENS

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num: int) -> list[int]:
        """`num` pages with one holder each; so many must be free."""
        pages = [self._free.pop() for _ in range(num)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder of each page, none of which is free."""
        for page in pages:
            self.num_idle -= not self._holders[page]
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Give up one hold on each page; one that nobody holds or keeps is free again."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                if self._keepers[page]:
                    self.num_idle += 1
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """An entry of the prefix cache for a page that somebody holds."""
        self._keepers[page] += 1

    def forget(self, page: int) -> None:
        """The opposite."""
        self._keepers[page] -= 1
        if self.is_free(page):
            self.num_idle -= 1
            self._free.append(page)

    def is_idle(self, page: int) -> bool:
        return not self._holders[page]

    def is_free(self, page: int) -> bool:
        return not self._holders[page] and not self._keepers[page]

    def copy_page(self, source: int, target: int) -> None:
        self.tensor[:, :, :, target].copy_(self.tensor[:, :, :, source])

    def clean(self, pages: Iterable[int]) -> None:
        """Zero the pages that nobody else holds. A NaN left behind would reach later holders through masked positions
        (0 * NaN)."""
        self.tensor[:, :, :, [SCRATCH_PAGE, *(page for page in pages if self._holders[page] == 1)]] = 0


def _lazy_zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory on a CPU is committed by the operating system only when first touched."""
    if device.type != "cpu":
        return torch.zeros(dims, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(dims) * dtype.itemsize, np.uint8)).view(dtype).view(dims)
