"""Attention over a prefix tree equals attention of every sequence by itself, values and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.algorithm.packing import prefix_tree
from arealite.api.errors import ConfigError
from arealite.engine import attention
from arealite.engine.attention import Layout, tree_attention

CPU = torch.device("cpu")


def plain(q, k, v, tree, scale):
    """Each sequence alone, key heads repeated, full softmax; the state of a shared node is the first sequence's."""
    out = [None] * len(tree.tokens)
    repeat = q.shape[1] // k.shape[1]
    for path in tree.paths:
        n = len(path)
        keys, values = k[path].repeat_interleave(repeat, 1), v[path].repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q[path], keys) * scale
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        rows = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        for i, node in enumerate(path):
            out[node] = rows[i] if out[node] is None else out[node]
    return torch.stack(out)


def check(sequences, heads=4, key_heads=2, dim=8):
    tree = prefix_tree([np.asarray(s, dtype=np.int64) for s in sequences])
    g = torch.Generator().manual_seed(len(tree.tokens))
    q, k, v = (torch.randn(len(tree.tokens), h, dim, generator=g) for h in (heads, key_heads, key_heads))
    weights = torch.randn(len(tree.tokens), heads, dim, generator=g)
    results = []
    for kind in ("tree", "plain"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if kind == "tree":
            where = Layout(tree, CPU)
            batched = [x.transpose(0, 1)[None] for x in inputs]
            out = tree_attention(torch.nn.Identity(), *batched, None, scaling=0.3, tree_layout=where)[0][0]
        else:
            out = plain(*inputs, tree, 0.3)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=8))
def test_equals_every_sequence_alone(sequences):
    check(sequences)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1)])
def test_heads(heads, key_heads):
    check([[1, 2, 3, 4, 5], [1, 2, 3, 9], [7] * 12], heads, key_heads)


def test_long_sequences_are_cut_into_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(attention, "MAX_QUERIES", 4)
    monkeypatch.setattr(attention, "MAX_SCORES", 40)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 9, n) for n in (23, 11, 4, 1)] + [[*range(20), 5], [*range(20), 6, 7]]
    check(sequences)
    where = Layout(prefix_tree([np.asarray(s) for s in sequences]), CPU)
    assert max(b.queries.shape[1] for b in where.blocks) == 4
    assert all(len(b.queries) == 1 or b.hidden.numel() <= 40 for b in where.blocks)


def test_padding_within_blocks_is_bounded():
    rng = np.random.default_rng(0)
    tree = prefix_tree([rng.integers(0, 10**6, n) for n in rng.integers(1, 400, 60)])
    where = Layout(tree, CPU)
    computed = sum(b.hidden.numel() for b in where.blocks)
    needed = sum(len(p) ** 2 for p in tree.paths)
    assert needed <= computed <= attention.PADDING_SLACK * needed


def test_bfloat16_stays_near_float32():
    tree = prefix_tree([np.arange(50), np.arange(30, 70)])
    q, k, v = (torch.randn(90, h, 16, generator=torch.Generator().manual_seed(h)).bfloat16() for h in (4, 2, 2))
    where = Layout(tree, CPU)
    got = attention._TreeAttention.apply(q, k, v, where.blocks, 0.25)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), plain(q.float(), k.float(), v.float(), tree, 0.25), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("kind", [{"softcap": 30.0}, {"sliding_window": 3}, {"s_aux": torch.zeros(4)}])
def test_other_kinds_of_attention_are_refused(kind):
    where = Layout(prefix_tree([np.arange(5)]), CPU)
    x = torch.zeros(1, 4, 5, 8)
    with pytest.raises(ConfigError):
        tree_attention(torch.nn.Identity(), x, x, x, None, tree_layout=where, **kind)


def test_the_layout_of_the_cuda_kernel(monkeypatch):
    """A plain stand-in for the kernel: the last query of a row sees the last of its keys, and so on backwards."""

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        rows = []
        for r in range(len(cu_q) - 1):
            own, keys, values = q[cu_q[r] : cu_q[r + 1]], k[cu_k[r] : cu_k[r + 1]], v[cu_k[r] : cu_k[r + 1]]
            hidden = torch.ones(len(own), len(keys)).triu(1 + len(keys) - len(own)).bool()
            scores = torch.einsum("qhd,khd->hqk", own, keys.repeat_interleave(2, 1)) * scale
            probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            rows.append(torch.einsum("hqk,khd->qhd", probs, values.repeat_interleave(2, 1)))
        return torch.cat(rows)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    tree = prefix_tree([np.asarray(s) for s in ([1, 2, 3], [1, 2], [1, 2, 3], [5, 4], [1, 2, 3, 9, 9], [5])])
    q, k, v = (torch.randn(len(tree.tokens), h, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    got = attention._varlen_attention(q, k, v, Layout(tree, CPU), 0.3)
    torch.testing.assert_close(got, plain(q, k, v, tree, 0.3), atol=2e-5, rtol=1e-4)
