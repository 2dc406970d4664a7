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
from arealite.kernels import varlen

CPU = torch.device("cpu")


def plain(q, k, v, tree, scale, window=10**6):
    """Each sequence alone, key heads repeated, full softmax; the state of a shared node is the first sequence's."""
    out = [None] * len(tree.tokens)
    repeat = q.shape[1] // k.shape[1]
    for path in tree.paths:
        n = len(path)
        keys, values = k[path].repeat_interleave(repeat, 1), v[path].repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q[path], keys) * scale
        hidden = torch.ones(n, n).triu(1).bool() | torch.ones(n, n).tril(-window).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
        rows = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        for i, node in enumerate(path):
            out[node] = rows[i] if out[node] is None else out[node]
    return torch.stack(out)


def check(sequences, heads=4, key_heads=2, dim=8, window=None):
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
            kind = {"scaling": 0.3, "sliding_window": window}
            out = tree_attention(torch.nn.Identity(), *batched, None, tree_layout=where, **kind)[0][0]
        else:
            out = plain(*inputs, tree, 0.3, window or 10**6)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(0, 10))
def test_equals_every_sequence_alone(sequences, window):
    check(sequences, window=window or None)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1)])
def test_heads(heads, key_heads):
    check([[1, 2, 3, 4, 5], [1, 2, 3, 9], [7] * 12], heads, key_heads)


@pytest.mark.parametrize("window", [None, 1, 6, 22])
def test_long_sequences_are_cut_into_blocks_of_queries(monkeypatch, window):
    monkeypatch.setattr(attention, "MAX_QUERIES", 4)
    monkeypatch.setattr(attention, "MAX_SCORES", 40)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 9, n) for n in (23, 11, 4, 1)] + [[*range(20), 5], [*range(20), 6, 7]]
    check(sequences, window=window)
    blocks = Layout(prefix_tree([np.asarray(s) for s in sequences]), CPU).blocks(window)
    assert max(b.queries.shape[1] for b in blocks) == 4
    assert all(len(b.queries) == 1 or b.hidden.numel() <= 40 for b in blocks)
    assert max(b.keys.shape[1] for b in blocks) == min(23, (window or 99) + 3)


def test_padding_within_blocks_is_bounded():
    rng = np.random.default_rng(0)
    tree = prefix_tree([rng.integers(0, 10**6, n) for n in rng.integers(1, 400, 60)])
    where = Layout(tree, CPU)
    computed = sum(b.hidden.numel() for b in where.blocks(None))
    needed = sum(len(p) ** 2 for p in tree.paths)
    assert needed <= computed <= attention.PADDING_SLACK * needed


def test_bfloat16_stays_near_float32():
    tree = prefix_tree([np.arange(50), np.arange(30, 70)])
    q, k, v = (torch.randn(90, h, 16, generator=torch.Generator().manual_seed(h)).bfloat16() for h in (4, 2, 2))
    where = Layout(tree, CPU)
    got = attention._TreeAttention.apply(q, k, v, where.blocks(None), 0.25)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), plain(q.float(), k.float(), v.float(), tree, 0.25), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("kind", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_other_kinds_of_attention_are_refused(kind):
    where = Layout(prefix_tree([np.arange(5)]), CPU)
    x = torch.zeros(1, 4, 5, 8)
    with pytest.raises(ConfigError):
        tree_attention(torch.nn.Identity(), x, x, x, None, tree_layout=where, **kind)


def plain_rows(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """A stand-in for the CUDA kernel: the last query of a row sees the last of its keys, and so on backwards."""
    assert window_size[1] == 0 and cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    rows = []
    for r in range(len(cu_q) - 1):
        own, keys, values = q[cu_q[r] : cu_q[r + 1]], k[cu_k[r] : cu_k[r + 1]], v[cu_k[r] : cu_k[r + 1]]
        last = len(keys) - len(own)
        hidden = torch.ones(len(own), len(keys)).triu(1 + last).bool()
        hidden |= torch.ones(len(own), len(keys)).tril(last - (window_size[0] + 1 or 99)).bool()
        scores = torch.einsum("qhd,khd->hqk", own, keys.repeat_interleave(2, 1)) * scale
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", probs, values.repeat_interleave(2, 1)))
    return torch.cat(rows)


def plain_rows_of_heads(*args, enable_gqa, **kwargs):
    """As newer releases of PyTorch have it."""
    assert enable_gqa
    return plain_rows(*args, **kwargs)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("kernel", [plain_rows, plain_rows_of_heads])
def test_the_layout_of_the_cuda_kernel(monkeypatch, kernel, window):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    tree = prefix_tree([np.asarray(s) for s in ([1, 2, 3], [1, 2], [1, 2, 3], [5, 4], [1, 2, 3, 9, 9], [5])])
    q, k, v = (torch.randn(len(tree.tokens), h, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    nodes, rows = Layout(tree, CPU).varlen
    got = varlen.varlen_attention(q, varlen.gather(k, nodes), varlen.gather(v, nodes), rows, 0.3, window)
    torch.testing.assert_close(got, plain(q, k, v, tree, 0.3, window or 99), atol=2e-5, rtol=1e-4)


def test_gradients_of_what_many_rows_share_are_rounded_once():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    at = torch.tensor([0, 2] + [1] * 256)
    grad = torch.randn(len(at), 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    varlen.gather(x, at).backward(grad)
    exact = torch.zeros(3, 8, dtype=torch.float64).index_add_(0, at, grad.double())
    assert torch.equal(x.grad, exact.bfloat16())


def test_sequences_longer_than_a_window_equal_transformers(tmp_path):
    """Gemma 3: layers with a window of 4 and with full attention, by turns, and a rope for each."""
    from support.batches import actor_config, random_batch, started
    from support.inference import plain_logprobs
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from arealite.engine.fsdp_engine import FSDPEngine

    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    batch = random_batch(vocabulary=512)
    engine = started(FSDPEngine(actor_config(tmp_path), trainable=False))
    try:
        got = engine.compute_logp(batch)
    finally:
        engine.destroy()
    for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        expected = plain_logprobs(model, batch.tokens[begin:end]).numpy()
        mask = batch.loss_mask[begin:end][1:]
        np.testing.assert_allclose(got[begin + 1 : end][mask], expected[mask], atol=2e-5)
