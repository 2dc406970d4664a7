"""A reward model from pairs of a preferred and a rejected answer. Used by arealite/supervised.py and scripts."""

from __future__ import annotations

import torch

from arealite.algorithm.losses import Denominators, pair_loss
from arealite.api.cli_args import TrainEngineConfig
from arealite.api.types import Batch, Dims
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.micro_batch import MicroBatch, count_loss
from arealite.engine.packed_model import REWARD


def rw_loss(
    micro: MicroBatch | None,
    scores: torch.Tensor,
    *,
    over: Denominators,
    group_ids: torch.Tensor,
    rewards: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Share of the pairs among `scores` [2 n] in the mean of `pair_loss` over all pairs, and in those of `accuracy`
    (whether the preferred answer scores higher; equal scores count half) and `margin`."""
    num_pairs = max(over.num_samples // 2, 1)
    preferred_first = torch.argsort(2 * group_ids - rewards)
    chosen, rejected = scores[preferred_first].view(-1, 2).unbind(1)
    margin = (chosen - rejected).detach()
    return pair_loss(chosen, rejected).sum() / num_pairs, {
        "accuracy": margin.sign().add(1).sum() / 2 / num_pairs,
        "margin": margin.sum() / num_pairs,
    }


class FSDPRWEngine(FSDPEngine):
    """The score of a sequence is the value at its last token.

    A batch has two sequences per group, `rewards` 1 for the preferred and 0 for the rejected one; each ends in a token
    that is not part of it, the only one in the loss mask, whose predecessor is scored. Pairs are never cut apart: a
    micro-batch holds both sequences, or more tokens than the budget where they need them.
    """

    def __init__(self, config: TrainEngineConfig, dims: Dims | None = None) -> None:
        super().__init__(config, dims=dims, head=REWARD, uncut="group")

    def train_rw(self, batch: Batch) -> dict[str, float]:
        """One optimiser update with `rw_loss`; statistics over all ranks. Collective. Raises NumericalError."""
        stats, updates = self.learn(batch, rw_loss, ("group_ids", "rewards"))
        for update in updates:
            stats |= {name: update.statistics[name] for name in ("accuracy", "margin")}
        return {**stats, "num_pairs": float(sum(update.over.num_samples // 2 for update in updates) or 1)}

    def evaluate_rw(self, batch: Batch) -> dict[str, float]:
        """`loss`, `accuracy` and `margin` under the current weights, over all ranks. Collective."""
        over, mask = count_loss(batch, self.ranks), batch.loss_mask
        owner = batch.owners[mask]
        columns = (self.compute_values(batch)[mask], batch.group_ids[owner], batch.rewards[owner])
        scores, groups, rewards = map(torch.from_numpy, columns)
        loss, parts = rw_loss(None, scores, over=over, group_ids=groups, rewards=rewards)
        sums = torch.stack([loss, parts["accuracy"], parts["margin"]]).double()
        means = dict(zip(("loss", *parts), self.ranks.reduce(sums, "sum").tolist(), strict=True))
        return {**means, "num_pairs": float(max(over.num_samples // 2, 1))}
