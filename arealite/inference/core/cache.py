"""The KV cache: pages of fixed size, who needs which, and the prefixes whose keys and values they hold: a group's
prompt, an interrupted request, a conversation so far.

Owned by the engine thread (scheduler.py allocates, shares and frees, layout.py reads and writes the tensors).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field

import numpy as np
import torch

from arealite.devices import give_back
from arealite.kernels.functions import AnyKernels

PAGE_TOKENS = 16
TOKEN_BYTES = 4  # prefixes are compared as int32 bytes
PAGE_BYTES = PAGE_TOKENS * TOKEN_BYTES
EVICTED_SHARE = 16  # one of so many entries goes at least, since looking for the oldest looks at all
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
        """Zeros for all pages; on a CPU, memory that the operating system commits when it is first touched."""
        dtype, device = self._kind
        if device.type == "cpu":
            num_bytes = math.prod(self._dims) * dtype.itemsize
            self.tensor = torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(self._dims)
        else:
            self.tensor = torch.zeros(self._dims, dtype=dtype, device=device)
        # Views per layer, [kv heads, pages * PAGE_TOKENS, head dim]: what a step writes its new tokens to.
        self.keys, self.values = (list(part) for part in self.tensor.flatten(3, 4).unbind(1))

    def give_memory(self) -> None:
        """Nobody holds or keeps a page: their memory is for others, until `take_memory`."""
        self.tensor = self.tensor.new_empty(0)
        self.keys, self.values = [], []
        give_back()

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
        if not self._holders[page] and not self._keepers[page]:
            self.num_idle -= 1
            self._free.append(page)

    def is_idle(self, page: int) -> bool:
        return not self._holders[page]

    def copy_page(self, source: int, target: int) -> None:
        self.tensor[:, :, :, target].copy_(self.tensor[:, :, :, source])

    def clean(self, pages: Iterable[int]) -> None:
        """Zero the pages that nobody else holds. A NaN left behind would reach later holders through masked positions
        (0 * NaN)."""
        self.tensor[:, :, :, [SCRATCH_PAGE, *(page for page in pages if self._holders[page] == 1)]] = 0


@dataclass(eq=False)
class Node:
    """The tokens of one page (`key`) after those of `parent`. Only a node of PAGE_TOKENS tokens has children."""

    key: bytes
    page: int
    parent: Node | None
    children: dict[bytes, Node] = field(default_factory=dict)
    used_at: int = 0


class PrefixCache:
    """A tree of pages per adapter (None: the model itself). What is found has been compared token by token.

    Whoever holds a node's page holds those of all its ancestors, so a page that nobody holds has no children that
    somebody holds, and everything idle can be evicted, leaves first.
    """

    def __init__(self, pool: PagePool) -> None:
        self.epoch = 0  # of the weights: what was computed in another one is not for sharing
        self._pool = pool
        self._roots: dict[str | None, Node] = {}
        self._nodes: set[Node] = set()
        self._clock = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, adapter: str | None, key: bytes) -> tuple[list[int], int]:
        """The longest known prefix of these tokens: its pages, the last of which may be used in part, and its tokens.
        The caller holds the pages before anything else is done here."""
        path = self._walk(adapter, key)
        at = len(path) * PAGE_BYTES
        parent = path[-1] if path else self._root(adapter)
        tails = range(min(len(key) - at, PAGE_BYTES - TOKEN_BYTES), 0, -TOKEN_BYTES)
        tail = next((child for num in tails if (child := parent.children.get(key[at : at + num]))), None)
        if tail is not None:
            path.append(tail)
        self._touch(path)
        return [node.page for node in path], sum(len(node.key) for node in path) // TOKEN_BYTES

    def insert(self, adapter: str | None, key: bytes, pages: MutableSequence[int], with_tail: bool) -> None:
        """Remember the tokens of `key`, whose keys and values are in `pages`; a page filled in part only `with_tail`:
        positions after these tokens may still be written to.

        Pages that are known already take the place of the caller's own.
        """
        path = self._walk(adapter, key)
        for i, node in enumerate(path):
            if pages[i] != node.page:
                self._pool.hold([node.page])
                self._pool.drop([pages[i]])
                pages[i] = node.page
        parent = path[-1] if path else self._root(adapter)
        for at in range(len(path) * PAGE_BYTES, len(key), PAGE_BYTES):
            part = key[at : at + PAGE_BYTES]
            if len(part) < PAGE_BYTES and (not with_tail or part in parent.children):
                break
            node = Node(part, pages[at // PAGE_BYTES], parent)
            parent.children[part] = node
            self._pool.keep(node.page)
            self._nodes.add(node)
            path.append(node)
            parent = node
        self._touch(path)

    def make_room(self, num_pages: int) -> bool:
        """Have so many pages free, evicting those whose last use is longest ago; False, and nothing is evicted, when
        there are not so many that nobody holds."""
        pool = self._pool
        if pool.num_free >= num_pages:
            return True
        if pool.num_free + pool.num_idle < num_pages:
            return False
        wanted = max(num_pages, pool.num_free + len(self._nodes) // EVICTED_SHARE)
        leaves = [(node.used_at, node) for node in self._nodes if not node.children and pool.is_idle(node.page)]
        heapq.heapify(leaves)
        while leaves and pool.num_free < wanted:
            _, node = heapq.heappop(leaves)
            self._nodes.remove(node)
            pool.forget(node.page)
            parent = node.parent
            assert parent is not None  # roots are no entries
            del parent.children[node.key]
            if parent in self._nodes and not parent.children and pool.is_idle(parent.page):
                heapq.heappush(leaves, (parent.used_at, parent))
        return pool.num_free >= num_pages

    def clear(self) -> None:
        """Forget everything, also what sequences that run now will have computed when they end."""
        self.epoch += 1
        for node in self._nodes:
            self._pool.forget(node.page)
        self._nodes.clear()
        self._roots.clear()

    def _root(self, adapter: str | None) -> Node:
        return self._roots.setdefault(adapter, Node(b"", 0, None))

    def _walk(self, adapter: str | None, key: bytes) -> list[Node]:
        """The nodes of the key's whole pages, as far as they are known."""
        path: list[Node] = []
        node: Node | None = self._root(adapter)
        for at in range(0, len(key) - PAGE_BYTES + 1, PAGE_BYTES):
            node = node.children.get(key[at : at + PAGE_BYTES]) if node else None
            if node is None:
                break
            path.append(node)
        return path

    def _touch(self, path: list[Node]) -> None:
        """Used now; a parent later than its children, so that the oldest is always a leaf."""
        for node in reversed(path):
            self._clock += 1
            node.used_at = self._clock
