"""Prefix trees and micro-batches: every token is where it should be, and budgets hold."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.algorithm.packing import (
    common_prefix,
    first_fit_decreasing,
    karmarkar_karp,
    micro_batches,
    prefix_tree,
)

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=7), max_size=9)


def arrays(sequences):
    return [np.asarray(s, dtype=np.int64) for s in sequences]


@settings(deadline=None, max_examples=150)
@given(SEQUENCES)
def test_tree_has_a_node_per_distinct_prefix(sequences):
    tree = prefix_tree(arrays(sequences))
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert len(tree.tokens) == len(tree.depth) == len(prefixes)
    assert sorted(tree.order.tolist()) == list(range(len(sequences)))
    node_of: dict[tuple[int, ...], int] = {}
    for row, i in enumerate(tree.order):
        path = tree.paths[row]
        assert tree.tokens[path].tolist() == sequences[i]
        assert tree.depth[path].tolist() == list(range(len(sequences[i])))
        for n, node in enumerate(path):
            assert node_of.setdefault(tuple(sequences[i][: n + 1]), int(node)) == node
        begin, end = tree.first_node[row], tree.first_node[row + 1]
        assert path[len(path) - (end - begin) :].tolist() == list(range(begin, end))


def test_order_is_that_of_large_numbers_too():
    tree = prefix_tree(arrays([[300, 1], [2, 5], [300, 0], [70000]]))
    assert [int(i) for i in tree.order] == [1, 2, 0, 3]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 12))
def test_bins_hold_everything_once_within_capacity(sizes, capacity):
    bins = first_fit_decreasing(sizes, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    for chosen in bins:
        assert len(chosen) == 1 or sum(sizes[i] for i in chosen) <= capacity
    lower = -(-sum(min(s, capacity) for s in sizes) // capacity)
    assert len(bins) <= max(2 * lower, 1)


def test_the_largest_find_their_bins_first():
    assert first_fit_decreasing([3, 3, 3, 7, 7, 7], 10) == [[3, 0], [4, 1], [5, 2]]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 6))
def test_parts_hold_everything_once_and_are_about_equal(sizes, num_parts):
    parts = karmarkar_karp(sizes, num_parts)
    assert len(parts) == num_parts and sorted(i for p in parts for i in p) == list(range(len(sizes)))
    sums = [sum(sizes[i] for i in p) for p in parts]
    # What largest differencing never exceeds: the largest number, which greedy lists can reach.
    assert max(sums) - min(sums) <= max(sizes, default=0)


def test_parts_are_more_even_than_longest_first():
    sums = sorted(sum(p) for p in ([[8, 7, 6, 5, 4][i] for i in part] for part in karmarkar_karp([8, 7, 6, 5, 4], 2)))
    assert sums == [14, 16]  # longest first: 13 and 17


def test_micro_batches_are_of_equal_size_where_that_fits():
    rows = arrays([[i] * n for i, n in enumerate((6, 5, 4, 3, 2))])
    batches = micro_batches(rows, np.arange(5), 11)
    assert sorted(sum(len(rows[i]) for i in b) for b in batches) == [10, 10]
    rows = arrays([[i] * n for i, n in enumerate((6, 6, 5, 5, 5))])
    batches = micro_batches(rows, np.arange(5), 15)  # the most even two that differencing finds are 16 and 11
    assert sorted(sum(len(rows[i]) for i in b) for b in batches) == [12, 15]


@settings(deadline=None, max_examples=50)
@given(SEQUENCES)
def test_without_sharing_every_sequence_has_its_own_nodes(sequences):
    tree = prefix_tree(arrays(sequences), share=False)
    assert len(tree.tokens) == sum(map(len, sequences)) == len(np.unique(np.concatenate([*tree.paths, [-1]]))) - 1
    assert [tree.tokens[path].tolist() for path in tree.paths] == [sequences[i] for i in tree.order]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=1, max_size=6)), max_size=9),
       st.integers(1, 16))  # fmt: skip
def test_micro_batches_hold_everything_once_within_the_budget(rows, capacity):
    sequences, groups = arrays([s for _, s in rows]), np.asarray([g for g, _ in rows], dtype=np.int64)
    batches = micro_batches(sequences, groups, capacity)
    assert sorted(i for b in batches for i in b) == list(range(len(rows)))
    for chosen in batches:
        assert len(chosen) == 1 or len(prefix_tree([sequences[i] for i in chosen]).tokens) <= capacity


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 1), min_size=1, max_size=6)), max_size=9),
       st.integers(1, 16), st.booleans())  # fmt: skip
def test_what_must_stay_together_does(rows, capacity, share):
    """Samples of two groups, each of rows that need not be neighbours in lexicographic order."""
    sequences, samples = arrays([s for _, s in rows]), np.asarray([g for g, _ in rows], dtype=np.int64)
    batches = micro_batches(sequences, samples // 3, capacity, share, samples)
    assert sorted(i for b in batches for i in b) == list(range(len(rows)))
    for chosen in batches:
        inside = set(samples[chosen].tolist())
        assert len(inside) == 1 or len(prefix_tree([sequences[i] for i in chosen], share).tokens) <= capacity
        assert all(i in chosen for i in range(len(rows)) if samples[i] in inside)


def test_a_group_shares_its_prompt():
    prompt = list(range(10))
    rows = arrays([[*prompt, a] for a in (1, 2, 3, 1)] + [[99, *prompt, a] for a in (1, 2)])
    groups = np.asarray([0, 0, 0, 0, 1, 1])
    assert sorted(map(sorted, micro_batches(rows, groups, 13))) == [[0, 1, 2, 3], [4, 5]]
    assert len(prefix_tree(rows[:4]).tokens) == 13


def test_common_prefix():
    a, b = arrays([[1, 2, 3], [1, 2, 4, 5]])
    assert [common_prefix(a, b), common_prefix(a, a[:2]), common_prefix(a, a[:0])] == [2, 2, 0]
