"""The policy: advantages from rewards, and the GRPO update. Used by training scripts and arealite/trainer.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from arealite.algorithm.advantage import gae, normalise, overlong_penalty, shape_rewards, sum_to_go
from arealite.algorithm.losses import (
    Denominators,
    behaviour_weight,
    clipped_loss,
    kl_loss,
    kl_value,
    policy_ratio,
    token_weights,
)
from arealite.api.cli_args import NormConfig, PPOActorConfig
from arealite.api.config_rules import needs_prox_logp
from arealite.api.errors import ConfigError
from arealite.api.types import Batch, Dims
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.micro_batch import MicroBatch, Uncut
from arealite.engine.training_stats import Update, token_means

NOT_IN_LOSS = "none of its tokens is in the loss"
CUT_OFF = f"{NOT_IN_LOSS}: all answers were cut off, and actor.mask_truncated leaves those out"
NOT_FINITE = "its update was skipped: loss or gradient was not finite"


@dataclass(frozen=True)
class TokenColumns:
    """What the loss needs besides the current logprobs, for the P loss tokens of one micro-batch; float32 [P]."""

    advantages: torch.Tensor
    behaviour_logp: torch.Tensor
    prox_logp: torch.Tensor | None  # None: the proximal policy is the current one. Used if the loss is decoupled
    ref_logp: torch.Tensor | None
    sample_of: torch.Tensor  # int64 [P], the token's sample, counted from 0 in this micro-batch, where all of it is
    sample_tokens: torch.Tensor  # int64 [P], loss tokens of that sample


def grpo_loss_fn(
    logp: torch.Tensor, entropy: torch.Tensor, columns: TokenColumns, config: PPOActorConfig, over: Denominators
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Share of one micro-batch in the loss of the whole update, and sums for the statistics.

    Per token: w * max(-A r, -A clip(r)) + kl_weight * KL - entropy_weight * H, with r = policy / proximal and
    w = proximal / behaviour policy, weighed by `token_weights`. Unless the loss is decoupled, the behaviour policy
    takes the proximal one's place, and w = 1. `logp`, `entropy` float32 [P] with gradient.
    """
    level = config.importance_sampling_level
    sample_of, prox, behaviour = columns.sample_of, columns.prox_logp, columns.behaviour_logp
    if not config.use_decoupled_loss:
        prox = behaviour
    elif prox is None:
        prox = logp.detach()
    correction, cap = config.behav_imp_correction, config.behav_imp_weight_cap
    weight = behaviour_weight(prox, behaviour, sample_of, level, correction, cap)
    ratio = policy_ratio(logp, prox, sample_of, level)
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
    total = (loss * token_weights(columns.sample_tokens, config.loss_aggregation, over)).sum()
    raw_weight = behaviour_weight(prox, behaviour, sample_of, "token", "none", cap)
    return total, {
        "entropy": entropy.detach().sum(),
        "kl": kl.sum(),
        "clip_ratio": is_clipped.sum(),
        "importance_weight_mean": raw_weight.sum(),
        "importance_weight_max": raw_weight.amax(),
        "behav_kl": kl_value(behaviour, logp.detach(), "k3").sum(),
    }


PolicyLoss = Callable[
    [torch.Tensor, torch.Tensor, TokenColumns, PPOActorConfig, Denominators], tuple[torch.Tensor, dict[str, Any]]
]
OWN = "loss_fn."  # before the names of its statistics in those of an update, which has others


class FSDPPPOActor(FSDPEngine):
    """The trained policy. Each step: compute_logp (where `needs_prox_logp`), compute_advantages, grpo_update."""

    config: PPOActorConfig

    def __init__(
        self,
        config: PPOActorConfig,
        dims: Dims | None = None,
        loss_fn: PolicyLoss = grpo_loss_fn,
        layouts: tuple[Dims, ...] = (),
    ) -> None:
        """`loss_fn`: called as `grpo_loss_fn` is, with at least one token. What it returns beside the loss is logged:
        sums over tokens as means over the tokens of the step, the largest of what ends in _max."""
        is_by_token = config.importance_sampling_level == "token" and loss_fn is grpo_loss_fn
        uncut: Uncut = "sequence" if is_by_token else "sample"
        super().__init__(config, dims=dims, updates_per_step=config.ppo_n_minibatches, uncut=uncut, layouts=layouts)
        self._loss_fn = loss_fn
        self.after_advantages: Callable[[Batch], object] = lambda batch: None  # on the ranks with the model
        self.untrained: dict[str, str] = {}
        if config.max_new_tokens is None and (
            config.overlong_tokens or config.loss_aggregation == "seq-mean-token-sum-norm"
        ):
            raise ConfigError(
                "actor.max_new_tokens is not given, but overlong_tokens counts back from it and loss_aggregation"
                " seq-mean-token-sum-norm divides by it: set it"
            )

    @property
    def needs_prox_logp(self) -> bool:
        """Whether batch.prox_logp must be computed before the update.

        With one update per step the proximal policy is the very policy that the update's forward pass computes, so
        `prox_logp` None means the same (but for rounding, where micro-batches differ) at no cost.
        """
        return needs_prox_logp(self.config)

    def compute_advantages(self, batch: Batch) -> None:
        """Fill batch.advantages (float32 [T], 0 outside the loss) from batch.rewards. Collective.

        overlong penalty -> bias, scale, clip -> reward_norm -> (+ KL to go, when kl_in is "reward") -> adv_norm. Means
        and deviations of rewards are over samples, each once, whatever its number of rows. Where turns have rewards of
        their own (batch.turn_returns), a token's return takes the place of its sample's reward, shaped like it, with
        the mean and deviation of the rewards.

        With a critic's batch.values the reward stands at the last loss token, KL at each, and GAE takes the place of
        the sum; what a token earns is how much its return exceeds that of the next one. batch.returns are filled too,
        with what the critic is to learn (from truncated answers as well). Time is that of the sample: its rows follow
        each other in the batch's order. On ranks without the model nothing is filled.
        """
        if not self.is_here:
            return
        config = self.config
        first, sample_of = batch.samples
        at, owner = _in_time(batch, sample_of)
        groups, rewards = torch.from_numpy(batch.group_ids[first]), torch.from_numpy(batch.rewards[first])
        penalty = torch.zeros(len(first), dtype=torch.float64)
        if config.overlong_tokens:
            assert config.max_new_tokens is not None
            generated = torch.bincount(owner, minlength=len(first))
            factor = config.overlong_penalty_factor
            penalty = overlong_penalty(generated, config.max_new_tokens, config.overlong_tokens, factor)
        shaping = config.reward_bias, config.reward_scaling, config.reward_clip
        shaped = shape_rewards(rewards + penalty, *shaping)
        earned = shaped[owner]
        if batch.turn_returns is not None:
            earned = shape_rewards(torch.from_numpy(batch.turn_returns[at]) + penalty[owner], *shaping)
        earned = self._normalise(shaped, groups, config.reward_norm, (earned, owner))
        costs = self._kl_costs(batch, at)
        if batch.values is None:
            tokens = earned if costs is None else earned - sum_to_go(costs, owner, config.gamma)
        else:
            following = torch.cat([earned[1:], earned.new_zeros(1)])[: len(earned)]
            is_last = torch.cat([owner[1:] != owner[:-1], owner.new_ones(1, dtype=torch.bool)])[: len(owner)]
            of_tokens = torch.where(is_last, earned, earned - following) - (0.0 if costs is None else costs)
            values = torch.from_numpy(batch.values[at])
            tokens = gae(of_tokens, values, owner, config.gamma, config.gae_lambda)
            batch.returns = _spread(tokens + values, at, len(batch.tokens))
        in_loss = self._in_loss(batch)[at]
        tokens, owner, at = tokens[in_loss], owner[in_loss], at[in_loss]
        if config.adv_norm is not None:
            tokens = self._normalise(tokens, groups[owner], config.adv_norm)
        batch.advantages = _spread(tokens, at, len(batch.tokens))
        self.after_advantages(batch)

    def _kl_costs(self, batch: Batch, at: np.ndarray) -> torch.Tensor | None:
        """What the loss tokens at `at` pay for their distance from the reference; None when KL is not in the reward."""
        if self.config.kl_in != "reward" or not self.config.kl_weight:
            return None
        old = torch.from_numpy(_required(batch.prox_logp, "prox_logp")[at]).double()
        ref = torch.from_numpy(_required(batch.ref_logp, "ref_logp")[at]).double()
        return self.config.kl_weight * kl_value(old, ref, self.config.kl_estimator)

    def _in_loss(self, batch: Batch) -> np.ndarray:
        """bool [T]: generated tokens, but for those of truncated answers where `mask_truncated` leaves them out."""
        return batch.loss_mask & ~(batch.truncated & self.config.mask_truncated)[batch.owners]

    def _normalise(
        self,
        x: torch.Tensor,
        groups: torch.Tensor,
        norm: NormConfig,
        of: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return normalise(x, groups, norm.mean, norm.std, norm.leave_one_out, norm.eps, self.ranks.reduce, of)

    def grpo_update(self, batch: Batch) -> dict[str, float]:
        """Train on the step's batch: one optimiser update per mini-batch, each on its own groups. Collective.

        Returns statistics over all ranks; `skipped` is 1 when no update was applied. Then `self.untrained` holds, on
        all ranks, {id: reason} of the tasks that nothing was learned from. Raises NumericalError. Nothing ({}) on ranks
        without the model.
        """
        if not self.is_here:
            return {}
        config = self.config
        _required(batch.advantages, "advantages")
        if self.needs_prox_logp:
            _required(batch.prox_logp, "prox_logp")
        if config.kl_weight:
            _required(batch.ref_logp, "ref_logp")
        whole = replace(batch, loss_mask=self._in_loss(batch))
        untrained: dict[str, str] = {}  # this rank's

        def note(part: Batch, update: Update | None) -> None:
            kept = {part.task_ids[i] for i in np.unique(part.owners[part.loss_mask])}
            why = CUT_OFF if config.mask_truncated else NOT_IN_LOSS
            untrained.update(dict.fromkeys(set(part.task_ids) - kept, why))
            if update is not None and update.skipped:
                untrained.update(dict.fromkeys(kept, NOT_FINITE))

        columns = ("advantages", "logprobs", "prox_logp", "ref_logp")
        stats, updates = self.learn(whole, self._loss, columns, note)
        self.untrained = {task: why for each in self.ranks.gather(untrained) for task, why in each.items()}
        stats["num_tokens"] = float(sum(update.over.num_tokens for update in updates))
        names = {name for u in updates for name in u.statistics if name.startswith(OWN)}
        means = token_means(updates, [name for name in names if not name.endswith("_max")])
        for name in names - means.keys():
            means[name] = max((u.statistics[name] for u in updates if not u.skipped), default=0.0)
        means = {name.removeprefix(OWN): value for name, value in sorted(means.items())}
        if taken := sorted(stats.keys() & means.keys()):
            raise ConfigError(
                f"loss_fn returned the statistics {', '.join(taken)}, which others are called: choose other names"
            )
        return stats | means

    ppo_update = grpo_update

    def _loss(
        self,
        micro: MicroBatch,
        logp: torch.Tensor,
        entropy: torch.Tensor,
        *,
        over: Denominators,
        advantages: torch.Tensor,
        logprobs: torch.Tensor,
        prox_logp: torch.Tensor | None,
        ref_logp: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        columns = TokenColumns(advantages, logprobs, prox_logp, ref_logp, micro.sample_of, micro.sample_tokens)
        over = replace(over, max_tokens=self.config.max_new_tokens or 1)
        return _checked(self._loss_fn(logp, entropy, columns, self.config, over), logp)


SOURCES = {
    "advantages": "actor.compute_advantages(batch)",
    "prox_logp": "batch.prox_logp = actor.compute_logp(batch)",
    "ref_logp": "batch.ref_logp = ref.compute_logp(batch)",
}


def _in_time(batch: Batch, sample_of: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Where the loss tokens are, sample by sample, in the order in which each was sampled, and the sample of each;
    int64."""
    at = np.flatnonzero(batch.loss_mask)
    owner = sample_of[batch.owners[at]]
    order = np.argsort(owner, kind="stable")
    return at[order], torch.from_numpy(owner[order])


def _spread(tokens: torch.Tensor, at: np.ndarray, num_tokens: int) -> np.ndarray:
    """float32 [num_tokens], `tokens` where they are, 0 elsewhere."""
    out = np.zeros(num_tokens, dtype=np.float32)
    out[at] = tokens.float().numpy()
    return out


def _required(values: np.ndarray | None, name: str) -> np.ndarray:
    if values is None:
        raise ConfigError(f"batch.{name} is not set, but this configuration needs it: call {SOURCES[name]} before")
    return values


def _checked(returned: Any, like: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a loss function returned, statistics as tensors beside `like` under their names in an update."""
    form = "expected (loss, {name: number}), a scalar tensor with gradient and sums over the tokens"
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise ConfigError(f"loss_fn returned {type(returned).__name__}; {form}")
    loss, parts = returned
    if not (isinstance(loss, torch.Tensor) and loss.shape == () and loss.requires_grad):
        raise ConfigError(f"loss_fn returned the loss {loss!r}; {form}")
    found = {}
    for name, value in parts.items():
        try:
            found[f"{OWN}{name}"] = torch.as_tensor(value, device=like.device).detach().double().reshape(())
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"loss_fn returned the statistic {name} = {value!r}: {error}; {form}") from error
    return loss, found
