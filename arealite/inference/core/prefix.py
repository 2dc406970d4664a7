"""Prefixes whose keys and values are in the page pool: a group's prompt, an interrupted request, a conversation so far.

Owned by the engine thread; scheduler.py asks it when a sequence is admitted and tells it what has been computed.
"""

from __future__ import annotations

import heapq
from collections.abc import MutableSequence
from dataclasses import dataclass, field

from arealite.inference.core.cache import PAGE_TOKENS, PagePool

TOKEN_BYTES = 4  # prefixes are compared as int32 bytes
PAGE_BYTES = PAGE_TOKENS * TOKEN_BYTES
EVICTED_SHARE = 16  # one of so many entries goes at least, since looking for the oldest looks at all


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
