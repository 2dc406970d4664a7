"""PPO's critic: the value of every state in which a token was chosen. Used by arealite/trainer.py and scripts."""

from __future__ import annotations

import time

import numpy as np
import torch

from arealite.algorithm.losses import clipped_value_loss
from arealite.api.cli_args import PPOCriticConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Batch, Dims
from arealite.engine.fsdp_engine import Update
from arealite.engine.memory import on_device
from arealite.engine.micro_batch import MicroBatch
from arealite.engine.ppo.actor import token_means
from arealite.engine.value_model import FSDPValueEngine


class FSDPPPOCritic(FSDPValueEngine):
    """Each step: batch.values = compute_values(batch) before actor.compute_advantages, and ppo_update after it."""

    config: PPOCriticConfig

    def __init__(self, config: PPOCriticConfig, dims: Dims | None = None) -> None:
        super().__init__(config, trainable=True, dims=dims)
        self.updates_per_step = config.ppo_n_minibatches

    def ppo_update(self, batch: Batch) -> dict[str, float]:
        """Learn batch.returns: one optimiser update per mini-batch, each on its own groups. Collective.

        The loss is the mean of `clipped_value_loss` over all loss tokens of all ranks. Returns statistics over all
        ranks; `explained_variance` is that of the returns by batch.values. Raises NumericalError.
        """
        started = time.perf_counter()
        if batch.values is None or batch.returns is None:
            raise ConfigError(
                "batch.values or batch.returns is not set, and the critic learns from them: call batch.values ="
                " critic.compute_values(batch), then actor.compute_advantages(batch)"
            )
        num_parts = self.config.ppo_n_minibatches
        part_of = batch.group_ids * num_parts // max(batch.num_groups, 1)
        updates: list[tuple[Update, int]] = []
        for index in range(num_parts):
            part = batch.select(np.flatnonzero(part_of == index))
            num_tokens = self.count_tokens(part)
            if num_tokens:
                updates.append((self._update_on(part, num_tokens), num_tokens))
        self.version += 1
        return {
            **self.summary([update for update, _ in updates], time.perf_counter() - started),
            **token_means(updates, ("clip_ratio", "value_mean")),
            "explained_variance": self._explained_variance(batch, batch.values, batch.returns),
        }

    def _update_on(self, part: Batch, num_tokens: int) -> Update:
        def loss_fn(micro: MicroBatch, values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            assert part.values is not None and part.returns is not None
            old, returns = on_device(np.stack([part.values[micro.at], part.returns[micro.at]]), self.device)
            loss, is_clipped = clipped_value_loss(values, old, returns, self.config.eps_clip)
            return loss.sum() / num_tokens, {"clip_ratio": is_clipped.sum(), "value_mean": values.detach().sum()}

        return self.update(part, loss_fn)

    def _explained_variance(self, batch: Batch, values: np.ndarray, returns: np.ndarray) -> float:
        """1 - Var(R - V) / Var(R) over the loss tokens of all ranks; 0 where all returns are equal."""
        mask = batch.loss_mask
        columns = [x[mask].astype(np.float64) for x in (returns, returns - values)]
        sums = [len(columns[0]), *(float((x**power).sum()) for x in columns for power in (1, 2))]
        n, r, rr, e, ee = self.collective.reduce(torch.tensor(sums, dtype=torch.float64), "sum").tolist()
        if n == 0 or rr / n - (r / n) ** 2 <= 1e-12:
            return 0.0
        return 1 - (ee / n - (e / n) ** 2) / (rr / n - (r / n) ** 2)
