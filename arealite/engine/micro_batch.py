"""Cuts a rank's share into micro-batches of tensors that the model can run. Called by engine/fsdp_engine.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from arealite.algorithm.packing import PrefixTree, micro_batches, prefix_tree
from arealite.api.types import Batch
from arealite.engine.attention import plan_layout
from arealite.engine.model import PackedTokens


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes, and where its P logprobs belong."""

    packed: PackedTokens
    at: np.ndarray  # int64 [P], positions in the batch's per-token arrays
    sequences: np.ndarray  # int64, the batch's sequences in this micro-batch
    sequence_of: torch.Tensor  # int64 [P], index into `sequences`

    @property
    def num_nodes(self) -> int:
        return len(self.packed.tokens)


def cut(batch: Batch, capacity: int, device: torch.device) -> list[MicroBatch]:
    """Micro-batches of at most `capacity` computed tokens over all sequences that have loss tokens.

    A sequence is computed up to the token that predicts its last loss token; what it shares with others of its
    micro-batch is computed once.
    """
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    chosen: list[int] = []
    for i in range(batch.num_sequences):
        begin, end = int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1])
        positions = np.flatnonzero(batch.loss_mask[begin:end])
        if not len(positions):
            continue
        if positions[0] == 0:
            raise ValueError(
                f"task {batch.task_ids[i]}: the first token is marked as generated, but nothing predicts it"
            )
        chosen.append(i)
        inputs.append(batch.tokens[begin : begin + positions[-1]])
        targets.append(positions)
    plans = micro_batches(inputs, batch.group_ids[chosen], capacity)
    out = []
    for members in plans:
        tree = prefix_tree([inputs[m] for m in members])
        sequences = np.asarray([chosen[m] for m in members], dtype=np.int64)
        nodes, at, sequence_of = _pairs(batch, tree, sequences, [targets[m] for m in members])
        out.append(_assemble(batch.tokens[at], tree, nodes, at, sequences, sequence_of, device))
    return out


def idle(device: torch.device) -> MicroBatch:
    """A micro-batch that asks for nothing: a rank without work takes part in the others' collectives with it."""
    tree = prefix_tree([np.zeros(1, np.int64)])
    none = np.zeros(0, np.int64)
    return _assemble(none, tree, none, none, none, none, device)


def _pairs(
    batch: Batch, tree: PrefixTree, sequences: np.ndarray, targets: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every loss token: the node that predicts it, its place in the batch, its sequence; by ascending node."""
    nodes = [path[targets[m] - 1] for m, path in zip(tree.order, tree.paths, strict=True)]
    at = [batch.cu_seqlens[sequences[m]] + targets[m] for m in tree.order]
    owner = [np.full(len(targets[m]), m) for m in tree.order]
    flat = [np.concatenate(x) for x in (nodes, at, owner)]
    by_node = np.argsort(flat[0], kind="stable")
    return flat[0][by_node], flat[1][by_node], flat[2][by_node]


def _assemble(
    targets: np.ndarray,
    tree: PrefixTree,
    nodes: np.ndarray,
    at: np.ndarray,
    sequences: np.ndarray,
    sequence_of: np.ndarray,
    device: torch.device,
) -> MicroBatch:
    # Without a wanted token the first node is asked for nothing, so that every weight still gets its (zero) gradient.
    predicting, row_of = np.unique(nodes, return_inverse=True) if len(nodes) else (np.zeros(1, np.int64), nodes)

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device)

    packed = PackedTokens(
        tokens=tensor(tree.tokens),
        positions=tensor(tree.depth),
        layout=plan_layout(tree, device),
        predicting=tensor(predicting),
        row_of=tensor(row_of),
        targets=tensor(targets),
    )
    return MicroBatch(packed, at, sequences, tensor(sequence_of))
