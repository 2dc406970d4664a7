"""Attention over a prefix tree of packed sequences, plugged into transformers under the name ATTENTION.

Called by the layers of the Hugging Face model; engine/packed_model.py passes the `Layout` through the model's keyword
arguments. No T x T mask exists at any time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface

from arealite.algorithm.packing import PrefixTree
from arealite.api.errors import ConfigError
from arealite.devices import has_flash, is_gpu
from arealite.engine.memory import on_device
from arealite.kernels import cpu, functions
from arealite.kernels.cpu import Kernels, TreeRuns
from arealite.kernels.varlen import PackedRows, gather, varlen_attention

ATTENTION = "arealite_tree"
MAX_SCORES = 1 << 18  # query-key pairs per head that exist at one time: bounds memory, and keeps them in cache
MAX_SCORES_GPU = 1 << 24  # there is no such cache, and every block has its launches
MAX_QUERIES = 512  # queries per block of a long sequence
PADDING_SLACK = 1.25  # pairs computed per pair needed, at most, when sequences of different lengths share a block


@dataclass(frozen=True)
class Block:
    """n runs of queries of similar size. Padding queries point to node S (one past the last), padding keys to node 0,
    where no query sees them."""

    queries: torch.Tensor  # int64 [n, Lq], nodes
    keys: torch.Tensor  # int64 [n, Lk], nodes from the root, or from the first query's window, on
    hidden: torch.Tensor  # bool [n, 1, Lq, Lk], True where the key comes after the query, or before its window


@dataclass
class Layout:
    """How the S nodes of a PrefixTree see each other: each its ancestors and itself. Planned when first asked for."""

    tree: PrefixTree
    device: torch.device
    _blocks: dict[int | None, list[Block]] = field(default_factory=dict)
    _runs: dict[int | None, TreeRuns] = field(default_factory=dict)

    @property
    def max_keys(self) -> int:
        return max(len(path) for path in self.tree.paths)

    def blocks(self, window: int | None) -> list[Block]:
        """For the portable path; `window`: how many of the last keys, its own included, a query sees (None: all)."""
        if window not in self._blocks:
            self._blocks[window] = _blocks(self.tree, window or self.max_keys, self.device)
        return self._blocks[window]

    def runs(self, window: int | None) -> TreeRuns:
        """For the compiled kernels; `window` as for blocks."""
        if window not in self._runs:
            found = _runs(self.tree, window or self.max_keys)
            found.sort(key=lambda run: -run[0] * run[1])
            starts = np.cumsum([0, *map(len, self.tree.paths)])
            runs = np.asarray([(starts[row] + stop - keys, keys, num) for num, keys, row, stop in found], np.int32)
            self._runs[window] = TreeRuns(runs, np.concatenate(self.tree.paths).astype(np.int32), window or 0)
        return self._runs[window]

    @cached_property
    def varlen(self) -> tuple[torch.Tensor, PackedRows]:
        """The paths of all rows end to end, int64, and the rows, as varlen_attention takes them. A row asks for what it
        adds to the tree."""
        added = np.diff(self.tree.first_node)
        rows = np.flatnonzero(added)
        paths = [self.tree.paths[r] for r in rows]
        queries, keys = (
            on_device(np.cumsum([0, *sizes], dtype=np.int32), self.device) for sizes in (added[rows], map(len, paths))
        )
        key_nodes = on_device(np.concatenate(paths), self.device)
        return key_nodes, PackedRows(queries, keys, int(added.max()), self.max_keys)


def _runs(tree: PrefixTree, window: int) -> list[tuple[int, int, int, int]]:
    """(number of queries, number of keys, row, end of both on its path)"""
    runs: list[tuple[int, int, int, int]] = []
    for row, path in enumerate(tree.paths):
        end = len(path)
        begin = end - int(tree.first_node[row + 1] - tree.first_node[row])
        for stop in range(end, begin, -MAX_QUERIES):
            num_queries = min(MAX_QUERIES, stop - begin)
            runs.append((num_queries, min(stop, num_queries + window - 1), row, stop))
    return runs


def _blocks(tree: PrefixTree, window: int, device: torch.device) -> list[Block]:
    runs = sorted(_runs(tree, window))
    max_scores = MAX_SCORES_GPU if is_gpu(device) else MAX_SCORES
    blocks: list[Block] = []
    chosen: list[tuple[int, int, int, int]] = []
    needed = 0
    for run in runs:
        num_keys = max(run[1], *(r[1] for r in chosen)) if chosen else run[1]
        computed = (len(chosen) + 1) * run[0] * num_keys
        if chosen and (computed > max_scores or computed > PADDING_SLACK * (needed + run[0] * run[1])):
            blocks.append(_block(tree, chosen, window, device))
            chosen, needed = [], 0
        chosen.append(run)
        needed += run[0] * run[1]
    return [*blocks, _block(tree, chosen, window, device)] if chosen else blocks


def _block(tree: PrefixTree, runs: list[tuple[int, int, int, int]], window: int, device: torch.device) -> Block:
    num_queries, num_keys = max(r[0] for r in runs), max(r[1] for r in runs)
    queries = np.full((len(runs), num_queries), len(tree.tokens), dtype=np.int64)
    keys = np.zeros((len(runs), num_keys), dtype=np.int64)
    own_key = np.zeros((len(runs), num_queries, 1), dtype=np.int64)  # the column of `keys` that is the query itself
    for i, (asked, seen, row, stop) in enumerate(runs):
        queries[i, :asked] = tree.paths[row][stop - asked : stop]
        keys[i, :seen] = tree.paths[row][stop - seen : stop]
        own_key[i, :asked, 0] = np.arange(seen - asked, seen)
    column = np.arange(num_keys)
    hidden = (column > own_key) | (column <= own_key - window)
    return Block(
        torch.from_numpy(queries).to(device),
        torch.from_numpy(keys).to(device),
        torch.from_numpy(hidden)[:, None].to(device),
    )


class _TreeAttention(torch.autograd.Function):
    """Softmax attention block by block, in matrix products; probabilities are computed again in the backward pass.

    (PyTorch's fused attention for CPU takes ten times as long in the backward pass of short sequences, and computes
    what sequences share once per sequence.) Shapes: q [S, H, D], k and v [S, K, D], S nodes, H heads, K key heads.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: list[Block], scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.scale = blocks, scale
        out = q.new_empty(len(q) + 1, *q.shape[1:])
        for block in blocks:
            probs, _, _, values = _attend(q, k, v, block, scale)
            rows = _ungroup(functions.matmul(probs, values), block, q.shape)
            out.index_copy_(0, block.queries.reshape(-1), rows)
        return out[:-1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        grad_q = q.new_empty(len(q) + 1, *q.shape[1:])
        # A prompt's keys collect from all its answers: a sum in float32.
        grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        grad_v = torch.zeros_like(grad_k)
        grad = functional.pad(grad, (0, 0, 0, 0, 0, 1))  # padding queries: no gradient
        for block in ctx.blocks:
            probs, queries, keys, values = _attend(q, k, v, block, ctx.scale)
            above = _group(_pick(grad, block.queries), k.shape[1])
            by_value = functions.matmul(probs.transpose(1, 2), above).float()
            slopes = functions.matmul(above, values.transpose(1, 2))
            scores = torch._softmax_backward_data(slopes, probs, -1, probs.dtype).mul_(ctx.scale)
            grad_q.index_copy_(0, block.queries.reshape(-1), _ungroup(functions.matmul(scores, keys), block, q.shape))
            flat = block.keys.reshape(-1)
            grad_v.index_add_(0, flat, _to_nodes(by_value, block))
            grad_k.index_add_(0, flat, _to_nodes(functions.matmul(scores.transpose(1, 2), queries).float(), block))
        return grad_q[:-1], grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


class _CompiledAttention(torch.autograd.Function):
    """The same by the kernels, for bf16 on a CPU: a block's scores stay in the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        compiled: Kernels,
        seen: TreeRuns,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.setting = compiled, seen, scale
        return compiled.tree_attention(q, k, v, seen, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        compiled, seen, scale = ctx.setting
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return *compiled.tree_attention_grad(*ctx.saved_tensors, grad, seen, scale), None, None, None


def _pick(x: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """x[nodes] with any row for padding; [n, L, heads, D]."""
    return x.index_select(0, nodes.reshape(-1).clamp(max=len(x) - 1)).view(*nodes.shape, *x.shape[1:])


def _group(x: torch.Tensor, num_key_heads: int) -> torch.Tensor:
    """[n, L, H, D] -> [n * K, H / K * L, D]: the query heads of one key head, below each other."""
    n, length, heads, dim = x.shape
    x = x.view(n, length, num_key_heads, heads // num_key_heads, dim)
    return x.permute(0, 2, 3, 1, 4).reshape(n * num_key_heads, -1, dim)


def _ungroup(x: torch.Tensor, block: Block, shape: torch.Size) -> torch.Tensor:
    """The inverse of `_group`, as rows [n * L, H, D]."""
    n, length = block.queries.shape
    return x.view(n, shape[1], length, shape[2]).transpose(1, 2).reshape(n * length, shape[1], shape[2])


def _to_nodes(x: torch.Tensor, block: Block) -> torch.Tensor:
    """[n * K, Lk, D] -> rows [n * Lk, K, D]."""
    n, length = block.keys.shape
    return x.view(n, -1, length, x.shape[-1]).transpose(1, 2).reshape(n * length, -1, x.shape[-1])


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities [n * K, G * Lq, Lk], queries [n * K, G * Lq, D], keys and values [n * K, Lk, D] of one block."""
    num_key_heads = k.shape[1]
    queries = _group(_pick(q, block.queries), num_key_heads)
    keys = _group(_pick(k, block.keys), num_key_heads)
    values = _group(_pick(v, block.keys), num_key_heads)
    scores = functions.matmul(queries, keys.transpose(1, 2)).float().mul_(scale)
    n, _, num_queries, num_keys = block.hidden.shape
    scores.view(n, -1, num_queries, num_keys).masked_fill_(block.hidden, -math.inf)
    return torch.softmax(scores, -1).to(q.dtype), queries, keys, values


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tree_layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, N, D], key and value [1, K, N, D]; returns [1, N, H, D].

    Of the N tokens the first are the layout's S nodes, the others padding.

    Dropout is never applied: it would make the trained policy differ from the one that sampled.

    Raises:
        ConfigError: the model's attention is of a kind that this function does not compute.
    """
    assert tree_layout is not None, "the model is called through engine/packed_model.py, which passes the layout"
    if softcap is not None or s_aux is not None:
        raise ConfigError(
            f"{type(module).__name__} uses attention soft-capping or sinks, which packed training does not compute yet;"
            " choose a model without them"
        )
    window = sliding_window if sliding_window is not None and sliding_window < tree_layout.max_keys else None
    # Padding behind the nodes is seen by nobody and gets zeros.
    num_nodes = len(tree_layout.tree.tokens)
    num_padding = query.shape[2] - num_nodes
    q, k, v = (x[0, :, :num_nodes].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    is_readable = not q.shape[-1] % cpu.DIM_STEP and all(x.stride(-1) == 1 for x in (q, k, v))  # by compiled kernels
    if has_flash(q):
        nodes, rows = tree_layout.varlen
        out = varlen_attention(q, gather(k, nodes), gather(v, nodes), rows, scale, window)
    elif is_readable and functions.fits(q, k, v) and (compiled := cpu.load()) is not None:
        out = _CompiledAttention.apply(q, k, v, compiled, tree_layout.runs(window), scale)
    else:
        out = _TreeAttention.apply(q, k, v, tree_layout.blocks(window), scale)
    return (functional.pad(out, (0, 0, 0, 0, 0, num_padding)) if num_padding else out)[None], None


# No mask function is registered under this name, so that transformers builds no mask.
AttentionInterface.register(ATTENTION, tree_attention)
