"""A reward model from pairs of a preferred and a rejected answer. Used by arealite/supervised.py and scripts."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from arealite.algorithm.losses import pair_loss
from arealite.api.types import Batch
from arealite.engine.micro_batch import MicroBatch
from arealite.engine.value_model import FSDPValueEngine


class FSDPRWEngine(FSDPValueEngine):
    """The score of a sequence is the value at its last token.

    A batch has two sequences per group, `rewards` 1 for the preferred and 0 for the rejected one; each ends in a token
    that is not part of it, the only one in the loss mask, whose predecessor is scored. Pairs are never cut apart: a
    micro-batch holds both sequences, or more tokens than the budget where they need them.
    """

    auto_class: Any = AutoModelForSequenceClassification
    keep_groups = True

    def train_rw(self, batch: Batch) -> dict[str, float]:
        """One optimiser update with the mean of `pair_loss` over all pairs of all ranks; `accuracy` is the share of
        pairs whose preferred answer scores higher; equal scores count half. Collective. Raises NumericalError."""
        started = time.perf_counter()
        num_pairs = max(self.count_tokens(batch) // 2, 1)

        def loss_fn(micro: MicroBatch, scores: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            sequences = micro.sequences[micro.sequence_of.cpu().numpy()] if len(scores) else micro.at
            order = torch.from_numpy(pairs_first(batch, sequences)).to(scores.device)
            return self._compare(scores[order].view(len(order) // 2, 2), num_pairs)

        update = self.update(batch, loss_fn)
        self.version += 1
        stats = self.summary([update], time.perf_counter() - started)
        chosen = {name: update.statistics[name] for name in ("accuracy", "margin")}
        return {**stats, **chosen, "num_pairs": float(num_pairs)}

    def evaluate_rw(self, batch: Batch) -> dict[str, float]:
        """`loss`, `accuracy` and `margin` under the current weights, over all ranks. Collective."""
        num_pairs = max(self.count_tokens(batch) // 2, 1)
        scores = torch.from_numpy(self.compute_values(batch)[batch.loss_mask])
        order = torch.from_numpy(pairs_first(batch, np.arange(batch.num_sequences)))
        loss, parts = self._compare(scores[order].view(len(order) // 2, 2), num_pairs)
        sums = torch.stack([loss, parts["accuracy"], parts["margin"]]).double()
        found = self.collective.reduce(sums, "sum").tolist()
        return dict(zip(("loss", "accuracy", "margin"), found, strict=True)) | {"num_pairs": float(num_pairs)}

    @staticmethod
    def _compare(pairs: torch.Tensor, num_pairs: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Shares of `pairs` [n, 2], preferred and rejected, in the means over `num_pairs`."""
        chosen, rejected = pairs.unbind(1)
        margin = (chosen - rejected).detach()
        return pair_loss(chosen, rejected).sum() / num_pairs, {
            "accuracy": margin.sign().add(1).sum() / 2 / num_pairs,
            "margin": margin.sum() / num_pairs,
        }


def pairs_first(batch: Batch, sequences: np.ndarray) -> np.ndarray:
    """The order of `sequences` (int64 [2 n], of the batch) that puts each preferred one right before its other."""
    return np.lexsort((-batch.rewards[sequences], batch.group_ids[sequences]))
