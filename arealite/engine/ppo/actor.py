"""The policy: advantages from rewards, and the GRPO update. Used by training scripts and arealite/trainer.py."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from arealite.algorithm.advantage import broadcast_to_tokens, kl_to_go
from arealite.algorithm.kl import kl_loss, kl_value
from arealite.algorithm.norm import normalise
from arealite.algorithm.policy_loss import (
    Denominators,
    behaviour_weight,
    clipped_loss,
    policy_ratio,
    token_weights,
)
from arealite.algorithm.reward import overlong_penalty, shape_rewards
from arealite.api.cli_args import NormConfig, PPOActorConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Batch
from arealite.engine.fsdp_engine import FSDPEngine, Update
from arealite.engine.micro_batch import MicroBatch


@dataclass(frozen=True)
class TokenColumns:
    """What the loss needs besides the current logprobs, for the P loss tokens of one micro-batch; float32 [P]."""

    advantages: torch.Tensor
    behaviour_logp: torch.Tensor
    prox_logp: torch.Tensor | None  # None: the proximal policy is the current one
    ref_logp: torch.Tensor | None
    sequence_of: torch.Tensor  # int64 [P]


def grpo_loss_fn(
    logp: torch.Tensor, entropy: torch.Tensor, columns: TokenColumns, config: PPOActorConfig, over: Denominators
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Share of one micro-batch in the loss of the whole update, and sums for the statistics.

    Per token: w * max(-A r, -A clip(r)) + kl_weight * KL - entropy_weight * H, with r = policy / proximal and
    w = proximal / behaviour policy (1 unless the loss is decoupled), weighed by `token_weights`. `logp`, `entropy`
    float32 [P] with gradient.
    """
    level = config.importance_sampling_level
    sequence_of, behaviour = columns.sequence_of, columns.behaviour_logp
    prox = logp.detach() if columns.prox_logp is None else columns.prox_logp
    if config.use_decoupled_loss:
        weight = behaviour_weight(
            prox, behaviour, sequence_of, level, config.behav_imp_correction, config.behav_imp_weight_cap
        )
    else:
        weight = torch.ones_like(logp)
    ratio = policy_ratio(logp, prox, sequence_of, level)
    high = config.eps_clip if config.eps_clip_higher is None else config.eps_clip_higher
    surrogate, is_clipped = clipped_loss(ratio, columns.advantages, config.eps_clip, high, config.c_clip)
    loss = weight * surrogate
    if config.entropy_weight:
        loss = loss - config.entropy_weight * entropy
    kl = torch.zeros_like(logp)
    if columns.ref_logp is not None:
        kl = kl_value(logp.detach(), columns.ref_logp, config.kl_estimator)
        if config.kl_in == "loss" and config.kl_weight:
            importance = (ratio * weight).detach()
            loss = loss + config.kl_weight * kl_loss(logp, columns.ref_logp, config.kl_estimator, importance)
    total = (loss * token_weights(sequence_of, config.loss_aggregation, over)).sum()
    raw_weight = (prox - behaviour).detach().exp()
    return total, {
        "entropy": entropy.detach().sum(),
        "kl": kl.sum(),
        "clip_ratio": is_clipped.sum(),
        "importance_weight_mean": raw_weight.sum(),
        "importance_weight_max": raw_weight.amax() if len(raw_weight) else raw_weight.new_zeros(()),
        "behav_kl": kl_value(behaviour, logp.detach(), "k3").sum(),
    }


class FSDPPPOActor(FSDPEngine):
    """The trained policy. Each step: compute_logp (where `needs_prox_logp`), compute_advantages, grpo_update."""

    config: PPOActorConfig

    def __init__(self, config: PPOActorConfig) -> None:
        super().__init__(config, trainable=True)
        if config.overlong_tokens and config.max_new_tokens is None:
            raise ConfigError("actor.overlong_tokens needs actor.max_new_tokens, where the penalty is full: set it")
        if config.loss_aggregation == "seq-mean-token-sum-norm" and config.max_new_tokens is None:
            raise ConfigError(
                "loss_aggregation seq-mean-token-sum-norm divides by actor.max_new_tokens, which is not given: set it"
            )

    @property
    def needs_prox_logp(self) -> bool:
        """Whether batch.prox_logp must be computed before the update.

        With one update per step the proximal policy is the very policy that the update's forward pass computes, so
        `prox_logp` None means the same at no cost.
        """
        config = self.config
        later = config.ppo_n_minibatches > 1 and config.use_decoupled_loss
        return later or (config.kl_in == "reward" and config.kl_weight != 0)

    def compute_advantages(self, batch: Batch) -> None:
        """Fill batch.advantages (float32 [T], 0 outside the loss) from batch.rewards. Collective.

        overlong penalty -> bias, scale, clip -> reward_norm -> (+ KL to go, when kl_in is "reward") -> adv_norm.
        """
        config = self.config
        sequence_of = np.repeat(np.arange(batch.num_sequences), batch.lengths)[batch.loss_mask]
        owner = torch.from_numpy(sequence_of)
        groups = torch.from_numpy(batch.group_ids)
        rewards = torch.from_numpy(batch.rewards)
        if config.overlong_tokens:
            assert config.max_new_tokens is not None
            num_tokens = torch.bincount(owner, minlength=batch.num_sequences)
            factor = config.overlong_penalty_factor
            rewards = rewards + overlong_penalty(num_tokens, config.max_new_tokens, config.overlong_tokens, factor)
        shaped = shape_rewards(rewards, config.reward_bias, config.reward_scaling, config.reward_clip)
        tokens = broadcast_to_tokens(self._normalise(shaped, groups, config.reward_norm), owner)
        if config.kl_in == "reward" and config.kl_weight:
            old = batch.logprobs if batch.prox_logp is None else batch.prox_logp
            ref = _required(batch.ref_logp, "ref_logp", "the KL in the reward")
            old, ref = old[batch.loss_mask].astype(np.float64), ref[batch.loss_mask].astype(np.float64)
            kl = kl_value(torch.from_numpy(old), torch.from_numpy(ref), config.kl_estimator)
            tokens = tokens + kl_to_go(-config.kl_weight * kl, owner, config.gamma)
        if config.adv_norm is not None:
            tokens = self._normalise(tokens, groups[owner], config.adv_norm)
        batch.advantages = np.zeros(len(batch.tokens), dtype=np.float32)
        batch.advantages[batch.loss_mask] = tokens.float().numpy()

    def _normalise(self, x: torch.Tensor, groups: torch.Tensor, norm: NormConfig) -> torch.Tensor:
        return normalise(x, groups, norm.mean, norm.std, norm.leave_one_out, norm.eps, self.collective.reduce)

    def grpo_update(self, batch: Batch) -> dict[str, float]:
        """Train on the step's batch: one optimiser update per mini-batch, each on its own groups. Collective.

        Returns statistics over all ranks; `skipped` is 1 when no update was applied. Raises NumericalError.
        """
        started = time.perf_counter()
        config = self.config
        _required(batch.advantages, "advantages", "grpo_update")
        if batch.prox_logp is None and self.needs_prox_logp:
            raise ConfigError("batch.prox_logp is not set: call batch.prox_logp = actor.compute_logp(batch) first")
        if config.kl_weight:
            _required(batch.ref_logp, "ref_logp", "kl_weight above 0")
        mask = batch.loss_mask
        if config.mask_truncated:
            mask = mask & ~np.repeat(batch.truncated, batch.lengths)
        whole = replace(batch, loss_mask=mask)
        mini_batch_of = batch.group_ids * config.ppo_n_minibatches // max(batch.num_groups, 1)
        updates: list[tuple[Update, int]] = []
        for index in range(config.ppo_n_minibatches):
            part = whole.select(np.flatnonzero(mini_batch_of == index))
            over = self._denominators(part)
            if over.num_tokens:
                updates.append((self._update_on(part, over), over.num_tokens))
        self.version += 1
        return {**_summary(updates), "update_s": time.perf_counter() - started}

    ppo_update = grpo_update

    def _denominators(self, part: Batch) -> Denominators:
        owner = np.repeat(np.arange(part.num_sequences), part.lengths)
        counts = torch.tensor([int(part.loss_mask.sum()), len(np.unique(owner[part.loss_mask]))])
        num_tokens, num_sequences = self.collective.reduce(counts, "sum").tolist()
        return Denominators(num_tokens, num_sequences, self.config.max_new_tokens or 1)

    def _update_on(self, part: Batch, over: Denominators) -> Update:
        def column(values: np.ndarray, micro: MicroBatch) -> torch.Tensor:
            return torch.from_numpy(values[micro.at]).to(self.device)

        def loss_fn(
            micro: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            assert part.advantages is not None
            prox = part.prox_logp
            if prox is None and not self.config.use_decoupled_loss:
                prox = part.logprobs
            columns = TokenColumns(
                advantages=column(part.advantages, micro),
                behaviour_logp=column(part.logprobs, micro),
                prox_logp=None if prox is None else column(prox, micro),
                ref_logp=None if part.ref_logp is None else column(part.ref_logp, micro),
                sequence_of=micro.sequence_of,
            )
            return grpo_loss_fn(logp, entropy[micro.packed.row_of], columns, self.config, over)

        return self.update(part, loss_fn)


def _required(values: np.ndarray | None, name: str, purpose: str) -> np.ndarray:
    if values is None:
        raise ConfigError(f"batch.{name} is not set, but {purpose} needs it: compute it before")
    return values


def _summary(updates: list[tuple[Update, int]]) -> dict[str, float]:
    """Means over the updates that were applied; token statistics weighed by tokens."""
    applied = [u for u in updates if not u[0].skipped]
    tokens = sum(n for _, n in applied)
    stats = {
        "num_tokens": float(sum(n for _, n in updates)),
        "skipped": float(not applied),
        "num_skipped_updates": float(len(updates) - len(applied)),
        "lr": updates[-1][0].lr if updates else 0.0,
    }
    for name in ("loss", "grad_norm"):
        values = [getattr(u, name) for u, _ in applied or updates]
        stats[name] = sum(values) / max(len(values), 1)
    for name in ("entropy", "kl", "clip_ratio", "importance_weight_mean", "behav_kl"):
        stats[name] = sum(u.statistics[name] for u, _ in applied) / max(tokens, 1)
    stats["importance_weight_max"] = max((u.statistics["importance_weight_max"] for u, _ in applied), default=0.0)
    return stats
