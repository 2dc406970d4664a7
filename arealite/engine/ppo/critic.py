"""PPO's critic: the value of every state in which a token was chosen. Used by arealite/trainer.py and scripts."""

from __future__ import annotations

import numpy as np
import torch

from arealite.algorithm.losses import Denominators, clipped_value_loss
from arealite.api.cli_args import PPOCriticConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Batch, Dims
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.micro_batch import MicroBatch
from arealite.engine.packed_model import VALUE
from arealite.engine.training_stats import token_means


class FSDPPPOCritic(FSDPEngine):
    """Each step: batch.values = compute_values(batch) before actor.compute_advantages, and ppo_update after it."""

    config: PPOCriticConfig

    def __init__(self, config: PPOCriticConfig, dims: Dims | None = None, layouts: tuple[Dims, ...] = ()) -> None:
        super().__init__(config, dims=dims, head=VALUE, updates_per_step=config.ppo_n_minibatches, layouts=layouts)

    def ppo_update(self, batch: Batch) -> dict[str, float]:
        """Learn batch.returns: one optimiser update per mini-batch, each on its own groups. Collective.

        The loss is the mean of `clipped_value_loss` over all loss tokens of all ranks. Returns statistics over all
        ranks; `explained_variance` is that of the returns by batch.values. Raises NumericalError.
        """
        columns = lessons(batch)
        stats, updates = self.learn(batch, self._loss, tuple(columns))
        return {
            **stats,
            **token_means(updates, ("clip_ratio", "value_mean")),
            "explained_variance": self._explained_variance(batch, **columns),
        }

    def _loss(
        self,
        micro: MicroBatch,
        predicted: torch.Tensor,
        *,
        over: Denominators,
        values: torch.Tensor,
        returns: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`predicted` [P] is what the critic says now, `values` [P] what it said at the start of the step."""
        loss, is_clipped = clipped_value_loss(predicted, values, returns, self.config.eps_clip)
        return loss.sum() / over.num_tokens, {"clip_ratio": is_clipped.sum(), "value_mean": predicted.detach().sum()}

    def _explained_variance(self, batch: Batch, values: np.ndarray, returns: np.ndarray) -> float:
        """1 - Var(R - V) / Var(R) over the loss tokens of all ranks; 0 where all returns are equal."""
        mask = batch.loss_mask
        columns = [x[mask].astype(np.float64) for x in (returns, returns - values)]
        sums = [len(columns[0]), *(float((x**power).sum()) for x in columns for power in (1, 2))]
        n, r, rr, e, ee = self.ranks.reduce(torch.tensor(sums, dtype=torch.float64), "sum").tolist()
        if n == 0 or rr / n - (r / n) ** 2 <= 1e-12:
            return 0.0
        return 1 - (ee / n - (e / n) ** 2) / (rr / n - (r / n) ** 2)


def lessons(batch: Batch) -> dict[str, np.ndarray]:
    """What a critic learns from, float32 [T]. Raises ConfigError: it is not there."""
    if batch.values is None or batch.returns is None:
        raise ConfigError(
            "batch.values or batch.returns is not set, and the critic learns from them: call batch.values ="
            " critic.compute_values(batch), then actor.compute_advantages(batch)"
        )
    return {"values": batch.values, "returns": batch.returns}
