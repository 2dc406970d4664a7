"""Supervised fine-tuning of a language model. Used by arealite/supervised.py and scripts."""

from __future__ import annotations

import math
from typing import Any

import torch

from arealite.algorithm.losses import Denominators
from arealite.api.types import Batch
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.micro_batch import MicroBatch, count_loss


def lm_loss(
    micro: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor, *, over: Denominators
) -> tuple[torch.Tensor, dict[str, Any]]:
    """-mean logp over the loss tokens of all ranks, however they are split; this micro-batch's share."""
    return -logp.sum() / over.num_tokens, {}


class FSDPLMEngine(FSDPEngine):
    def train_lm(self, batch: Batch) -> dict[str, float]:
        """One optimiser update; statistics over all ranks, `ppl` = exp(loss). Collective. Raises NumericalError."""
        stats, updates = self.learn(batch, lm_loss)
        num_tokens = float(sum(update.over.num_tokens for update in updates) or 1)
        return {**stats, "ppl": perplexity(stats["loss"]), "num_tokens": num_tokens}

    def evaluate_lm(self, batch: Batch) -> dict[str, float]:
        """`loss` and `ppl` of the batch under the current weights, over all ranks. Collective."""
        num_tokens = max(count_loss(batch, self.ranks).num_tokens, 1)
        total = torch.tensor([self.compute_logp(batch, 1.0).sum(dtype="float64")])
        loss = -float(self.ranks.reduce(total, "sum")) / num_tokens
        return {"loss": loss, "ppl": perplexity(loss), "num_tokens": float(num_tokens)}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf
