"""Cuts a rank's share into micro-batches of tensors that the model can run. Called by engine/fsdp_engine.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from arealite.algorithm.packing import PrefixTree, micro_batches, prefix_tree
from arealite.api.errors import ConfigError
from arealite.api.types import Batch
from arealite.engine.attention import Layout
from arealite.engine.memory import on_device


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes, the S nodes of a prefix tree, and the P tokens whose logprobs are wanted."""

    tokens: torch.Tensor  # int64 [S]
    positions: torch.Tensor  # int64 [S], from 0 in each sequence
    layout: Layout
    predicting: torch.Tensor  # int64 [R], nodes whose next-token distribution is wanted, each once
    row_of: torch.Tensor  # int64 [P], ascending, index into `predicting`
    targets: torch.Tensor  # int64 [P]
    at: np.ndarray  # int64 [P], positions in the batch's per-token arrays
    sequences: np.ndarray  # int64, the batch's sequences in this micro-batch
    sequence_of: torch.Tensor  # int64 [P], index into `sequences`


@dataclass(frozen=True)
class Part:
    """What one of several token places computes of a micro-batch."""

    nodes: slice  # of its S nodes, as if padded to a multiple of the number of places
    rows: slice  # of `predicting`
    pairs: slice  # of `targets`


def part(micro: MicroBatch, place: int, num_places: int) -> Part:
    """Places hold equally many nodes, in order; each predicts where its nodes do."""
    if num_places == 1:
        return Part(slice(0, len(micro.tokens)), slice(0, len(micro.predicting)), slice(0, len(micro.targets)))
    width = -(-len(micro.tokens) // num_places)
    nodes = slice(place * width, (place + 1) * width)
    edges = micro.predicting.new_tensor([nodes.start, nodes.stop])
    rows = torch.searchsorted(micro.predicting, edges)
    pairs = torch.searchsorted(micro.row_of, rows)
    (first, last), (begin, end) = torch.stack([rows, pairs]).tolist()
    return Part(nodes, slice(first, last), slice(begin, end))


def check_tokens(batch: Batch, num_embeddings: int, model: str) -> None:
    """Raises ConfigError for a token that the model has no embedding of."""
    if len(batch.tokens) and (highest := int(batch.tokens.max())) >= num_embeddings:
        raise ConfigError(
            f"the batch has token {highest}, and {model} only {num_embeddings} embedding rows: the tokenizer has tokens"
            " that the model lacks. Give the model rows for them (transformers' resize_token_embeddings, then"
            " save_pretrained), or take its own tokenizer"
        )


def cut(
    batch: Batch, capacity: int, device: torch.device, share_prompts: bool = True, keep_groups: bool = False
) -> list[MicroBatch]:
    """Micro-batches of at most `capacity` computed tokens over all sequences that have loss tokens.

    A sequence is computed up to the token that predicts its last loss token; what it shares with others of its
    micro-batch is computed once, unless `share_prompts` is off. `keep_groups`: a group is in one micro-batch, whatever
    its size.
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
    out = []
    for members in micro_batches(inputs, batch.group_ids[chosen], capacity, share_prompts, keep_groups):
        tree = prefix_tree([inputs[m] for m in members], share_prompts)
        sequences = np.asarray([chosen[m] for m in members])
        wanted = [targets[members[m]] for m in tree.order]
        # For every loss token: the node that predicts it, its place in the batch, its sequence; by ascending node.
        nodes = np.concatenate([path[positions - 1] for path, positions in zip(tree.paths, wanted, strict=True)])
        owner = np.repeat(tree.order, [len(positions) for positions in wanted])
        at = batch.cu_seqlens[sequences[owner]] + np.concatenate(wanted)
        by_node = np.argsort(nodes, kind="stable")
        out.append(_assemble(batch.tokens, tree, nodes[by_node], at[by_node], sequences, owner[by_node], device))
    return out


def idle(device: torch.device) -> MicroBatch:
    """A micro-batch that asks for nothing: a rank without work takes part in the others' collectives with it."""
    none = np.zeros(0, np.int64)
    return _assemble(none, prefix_tree([np.zeros(1, np.int64)]), none, none, none, none, device)


def _assemble(
    all_tokens: np.ndarray,
    tree: PrefixTree,
    nodes: np.ndarray,
    at: np.ndarray,
    sequences: np.ndarray,
    sequence_of: np.ndarray,
    device: torch.device,
) -> MicroBatch:
    predicting, row_of = np.unique(nodes, return_inverse=True)

    def tensor(x: np.ndarray) -> torch.Tensor:
        return on_device(x, device)

    return MicroBatch(
        tokens=tensor(tree.tokens),
        positions=tensor(tree.depth),
        layout=Layout(tree, device),
        predicting=tensor(predicting),
        row_of=tensor(row_of),
        targets=tensor(all_tokens[at]),
        at=at,
        sequences=sequences,
        sequence_of=tensor(sequence_of),
    )
