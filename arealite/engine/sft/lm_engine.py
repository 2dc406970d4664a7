"""Supervised fine-tuning of a language model. Used by arealite/supervised.py and scripts."""

from __future__ import annotations

import math
import time

import torch

from arealite.api.types import Batch
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.micro_batch import MicroBatch


class FSDPLMEngine(FSDPEngine):
    """The loss is -mean logp over the loss tokens of all ranks, however they are split."""

    def train_lm(self, batch: Batch) -> dict[str, float]:
        """One optimiser update; statistics over all ranks, `ppl` = exp(loss). Collective. Raises NumericalError."""
        started = time.perf_counter()
        num_tokens = max(self.count_tokens(batch), 1)

        def loss_fn(
            micro: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return -logp.sum() / num_tokens, {}

        update = self.update(batch, loss_fn)
        self.version += 1
        stats = self.summary([update], time.perf_counter() - started)
        return {**stats, "ppl": perplexity(update.loss), "num_tokens": float(num_tokens)}

    def evaluate_lm(self, batch: Batch) -> dict[str, float]:
        """`loss` and `ppl` of the batch under the current weights, over all ranks. Collective."""
        num_tokens = max(self.count_tokens(batch), 1)
        total = torch.tensor([self.compute_logp(batch, 1.0).sum(dtype="float64")])
        loss = -float(self.collective.reduce(total, "sum")) / num_tokens
        return {"loss": loss, "ppl": perplexity(loss), "num_tokens": float(num_tokens)}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf
