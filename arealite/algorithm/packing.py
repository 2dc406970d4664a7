"""Which sequences are computed together: prefix trees, micro-batches under a token budget, equal shares. Called by
engine/ and rollout/share.py.

Sequences that begin alike (the answers to one prompt; often their first tokens too) share the computation of what they
have in common: a causal model's state at a token depends on the tokens before it only.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PrefixTree:
    """n sequences as one tree with a node per distinct prefix; S nodes.

    Nodes are numbered so that those first seen in one sequence are consecutive. `order` int64 [n]: the sequences in
    lexicographic order, the order of all fields below. `first_node` [n + 1]: row r adds the nodes
    [first_node[r], first_node[r + 1]), the last ones of its path.
    """

    tokens: np.ndarray  # int64 [S], the node's token
    depth: np.ndarray  # int64 [S], its position, from 0
    order: np.ndarray
    first_node: np.ndarray
    paths: list[np.ndarray]  # per row: int64 [length], the node of each of its tokens


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of equal leading tokens."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def prefix_tree(sequences: Sequence[np.ndarray], share: bool = True) -> PrefixTree:
    """Build the tree of `sequences` (int64 [length] each, lengths from 0). Without `share` every sequence is a branch
    of its own, from its first token on.

    In lexicographic order a sequence shares its longest prefix with the one just before it, so one pass is enough.
    """
    keys = [s.astype(">i8").tobytes() for s in sequences]
    order = np.asarray(sorted(range(len(sequences)), key=keys.__getitem__), dtype=np.int64)
    previous = path = np.zeros(0, np.int64)
    paths, tokens, depth, first_node = [], [previous], [previous], [0]
    for i in order.tolist():
        row = sequences[i]
        shared = common_prefix(previous, row) if share else 0
        added = len(row) - shared
        path = np.concatenate([path[:shared], np.arange(first_node[-1], first_node[-1] + added)])
        tokens.append(row[shared:])
        depth.append(np.arange(shared, len(row)))
        first_node.append(first_node[-1] + added)
        paths.append(path)
        previous = row
    return PrefixTree(np.concatenate(tokens), np.concatenate(depth), order, np.asarray(first_node), paths)


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Partition range(len(sizes)) into few bins of at most `capacity`; a larger entry gets a bin of its own.

    First-fit decreasing (Johnson 1973; at most 11/9 of the optimum plus 6/9 of a bin). Ties go by index, so the result
    is the same on every machine.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((b for b, left in enumerate(room) if left >= sizes[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(i)
        room[place] -= sizes[i]
    return bins


def karmarkar_karp(sizes: Sequence[float], num_parts: int) -> list[list[int]]:
    """Partition range(len(sizes)) into `num_parts` parts, some maybe empty, whose sums differ little.

    Largest differencing (Karmarkar and Karp 1982) for many parts: of the partial partitions, the two with the widest
    spreads are joined, the largest part of one with the smallest of the other, until one is left.
    """
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []  # (-spread, first index, parts, largest first)
    for i, size in enumerate(sizes):
        heap.append((-size, i, [(size, [i]), *((0.0, []) for _ in range(num_parts - 1))]))
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, first, a), (_, second, b) = heapq.heappop(heap), heapq.heappop(heap)
        parts = [(x + y, own + other) for (x, own), (y, other) in zip(a, reversed(b), strict=True)]
        parts.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (parts[-1][0] - parts[0][0], min(first, second), parts))
    return [sorted(part) for _, part in heap[0][2]] if heap else [[] for _ in range(num_parts)]


def micro_batches(
    sequences: Sequence[np.ndarray],
    group_ids: np.ndarray,
    capacity: int,
    share: bool = True,
    uncut_ids: np.ndarray | None = None,
) -> list[list[int]]:
    """Partition the sequences into few micro-batches of at most `capacity` tree nodes (a longer sequence stands alone),
    of equal sizes where that needs no more of them.

    Groups stay together where they fit, since their sequences share prefixes; a group that does not fit is cut in
    lexicographic order, where neighbours share most. `group_ids` int64 [n]. Without `share` sequences stand alone.
    Sequences of a group with equal `uncut_ids` (int64 [n]) stay together in any case, alone where they do not fit.
    """
    uncut_ids = np.arange(len(sequences)) if uncut_ids is None else uncut_ids
    group_ids = group_ids if share else uncut_ids
    pieces: list[tuple[int, list[int]]] = []  # tree nodes, sequences
    for group in np.unique(group_ids):
        members = np.flatnonzero(group_ids == group)
        tree = prefix_tree([sequences[i] for i in members.tolist()], share)
        units: dict[int, list[int]] = {}  # rows of the tree
        for row, uncut in enumerate(uncut_ids[members[tree.order]].tolist()):
            units.setdefault(uncut, []).append(row)
        piece: list[int] = []
        size, is_in_piece = 0, np.zeros(len(tree.tokens), np.bool_)
        for rows in units.values():
            nodes = tree.paths[rows[0]] if len(rows) == 1 else np.unique(np.concatenate([tree.paths[r] for r in rows]))
            added = int((~is_in_piece[nodes]).sum())
            if piece and size + added > capacity:
                pieces.append((size, piece))
                piece, size, added, is_in_piece = [], 0, len(nodes), np.zeros_like(is_in_piece)
            is_in_piece[nodes] = True
            piece += members[tree.order[rows]].tolist()
            size += added
        pieces.append((size, piece))
    sizes = [size for size, _ in pieces]
    bins = first_fit_decreasing(sizes, capacity)
    even = karmarkar_karp(sizes, len(bins))
    fits = all(len(chosen) == 1 or sum(sizes[p] for p in chosen) <= capacity for chosen in even)
    return [[i for p in chosen for i in pieces[p][1]] for chosen in (even if fits else bins)]
