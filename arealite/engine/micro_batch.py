"""Cuts a rank's share into micro-batches of tensors that the model can run. Called by engine/fsdp_engine.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from arealite.algorithm.losses import Denominators
from arealite.algorithm.packing import PrefixTree, micro_batches, prefix_tree
from arealite.api.errors import ConfigError
from arealite.api.types import PER_SEQUENCE, Batch
from arealite.engine.attention import Layout
from arealite.engine.memory import on_device
from arealite.engine.parallel.ranks import RankCollective

Uncut = Literal["sequence", "sample", "group"]


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
    sample_of: torch.Tensor  # int64 [P], the token's sample, counted from 0 in this micro-batch
    sample_tokens: torch.Tensor  # int64 [P], loss tokens of that sample in the whole batch
    edges: tuple[np.ndarray, np.ndarray]  # `predicting` and `row_of` on the host, which waits for no device then


@dataclass(frozen=True)
class Places:
    """What one of several token places computes of a micro-batch."""

    nodes: slice  # of its S nodes, as if padded to a multiple of the number of places
    rows: slice  # of `predicting`
    pairs: slice  # of `targets`


def places_of(micro: MicroBatch, place: int, num_places: int) -> Places:
    """Places hold equally many nodes, in order; each predicts where its nodes do."""
    if num_places == 1:
        return Places(slice(0, len(micro.tokens)), slice(0, len(micro.predicting)), slice(0, len(micro.targets)))
    width = -(-len(micro.tokens) // num_places)
    nodes = slice(place * width, (place + 1) * width)
    predicting, row_of = micro.edges
    rows = np.searchsorted(predicting, [nodes.start, nodes.stop])
    pairs = np.searchsorted(row_of, rows)
    return Places(nodes, slice(*rows.tolist()), slice(*pairs.tolist()))


def check_tokens(batch: Batch, num_embeddings: int, model: str) -> None:
    """Raises ConfigError for a token that the model has no embedding of."""
    if len(batch.tokens) and (highest := int(batch.tokens.max())) >= num_embeddings:
        raise ConfigError(
            f"the batch has token {highest}, and {model} only {num_embeddings} embedding rows: the tokenizer has tokens"
            " that the model lacks. Give the model rows for them (transformers' resize_token_embeddings, then"
            " save_pretrained), or take its own tokenizer"
        )


def cut(
    batch: Batch, capacity: int, device: torch.device, share_prompts: bool = True, uncut: Uncut = "sequence"
) -> list[MicroBatch]:
    """Micro-batches of at most `capacity` computed tokens over all sequences that have loss tokens.

    A sequence is computed up to the token that predicts its last loss token; what it shares with others of its
    micro-batch is computed once, unless `share_prompts` is off. What is `uncut` is in one micro-batch, whatever its
    size.
    """
    wanted: list[np.ndarray] = []
    chosen: list[int] = []
    for i in range(batch.num_sequences):
        positions = np.flatnonzero(batch.loss_mask[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]])
        if not len(positions):
            continue
        if positions[0] == 0:
            raise ValueError(
                f"task {batch.task_ids[i]}: the first token is marked as generated, but nothing predicts it"
            )
        chosen.append(i)
        wanted.append(positions)
    begins, sequences = batch.cu_seqlens[chosen], np.asarray(chosen, np.int64)
    inputs = [batch.tokens[b : b + positions[-1]] for b, positions in zip(begins, wanted, strict=True)]
    sample_of = batch.samples[1][sequences]
    uncut_ids = {"sequence": None, "sample": sample_of, "group": batch.group_ids[sequences]}[uncut]
    parts = micro_batches(inputs, batch.group_ids[sequences], capacity, share_prompts, uncut_ids)
    num_wanted = np.asarray([len(positions) for positions in wanted], np.int64)
    samples = np.stack([sample_of, np.bincount(sample_of, weights=num_wanted).astype(np.int64)[sample_of]], axis=1)
    return [
        assemble(batch.tokens, begins[m], [wanted[i] for i in m], sequences[m], device, share_prompts, samples[m])
        for m in parts
    ]


def count_loss(batch: Batch, ranks: RankCollective) -> Denominators:
    """Tokens in the loss and samples that have any, of all ranks. Collective."""
    counts = torch.tensor([int(batch.loss_mask.sum()), len(np.unique(batch.sample_ids[batch.owners[batch.loss_mask]]))])
    return Denominators(*ranks.reduce(counts, "sum").tolist())


def columns_of(
    batch: Batch, names: Sequence[str], micro: MicroBatch, device: torch.device
) -> dict[str, torch.Tensor | None]:
    """The batch's arrays of these names at the micro-batch's loss tokens, float32 [P] on `device`, of those by sequence
    the sequence's; None where the batch has none."""
    present: dict[str, np.ndarray] = {}
    for name in names:
        if (values := getattr(batch, name)) is not None:
            at = batch.owners[micro.at] if name in PER_SEQUENCE else micro.at
            present[name] = values[at].astype(np.float32, copy=False)
    rows = on_device(np.stack(list(present.values())), device) if present else ()  # one copy
    return dict.fromkeys(names) | dict(zip(present, rows, strict=True))


def idle(device: torch.device) -> MicroBatch:
    """A micro-batch that asks for nothing: a rank without work takes part in the others' collectives with it."""
    none = np.zeros(0, np.int64)
    return _on(device, none, prefix_tree([np.zeros(1, np.int64)]), none, none, none, np.zeros((0, 2), np.int64))


def assemble(
    tokens: np.ndarray,
    begins: np.ndarray,
    wanted: list[np.ndarray],
    sequences: np.ndarray,
    device: torch.device,
    share: bool = True,
    samples: np.ndarray | None = None,
) -> MicroBatch:
    """One micro-batch: of the sequences that begin at `begins` [n] in `tokens` [T] the tokens at the positions `wanted`
    (n arrays, ascending, from 1 in each sequence). `sequences` [n]: what they are called; `samples` int64 [n, 2]: the
    sample of each, and the loss tokens of that. If not given each is a sample by itself."""
    if samples is None:
        samples = np.stack([sequences, [len(positions) for positions in wanted]], axis=1)
    tree = prefix_tree([tokens[b : b + positions[-1]] for b, positions in zip(begins, wanted, strict=True)], share)
    in_order = [wanted[i] for i in tree.order]
    # For every loss token: the node that predicts it, its place in the batch, its sample; by ascending node.
    nodes = np.concatenate([path[positions - 1] for path, positions in zip(tree.paths, in_order, strict=True)])
    owner = np.repeat(tree.order, [len(positions) for positions in in_order])
    at = begins[owner] + np.concatenate(in_order)
    by_node = np.argsort(nodes, kind="stable")
    samples[:, 0] = np.unique(samples[:, 0], return_inverse=True)[1]
    return _on(device, tokens, tree, nodes[by_node], at[by_node], sequences, samples[owner[by_node]])


def _on(
    device: torch.device,
    tokens: np.ndarray,
    tree: PrefixTree,
    nodes: np.ndarray,
    at: np.ndarray,
    sequences: np.ndarray,
    samples: np.ndarray,
) -> MicroBatch:
    predicting, row_of = np.unique(nodes, return_inverse=True)
    arrays = (tree.tokens, tree.depth, predicting, row_of, tokens[at], samples.T)
    inputs, positions, predicted, rows, targets, (sample_of, counts) = (on_device(x, device) for x in arrays)
    layout, edges = Layout(tree, device), (predicting, row_of)
    return MicroBatch(inputs, positions, layout, predicted, rows, targets, at, sequences, sample_of, counts, edges)
