"""The policy gradient losses of the PPO family, per token, and how tokens are weighed into one number.

Called by engine/ppo/actor.py. All tensors here hold loss tokens only, end to end: nothing is masked by a product, so
that a NaN outside the loss cannot leak in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from arealite.algorithm.kl import MAX_LOG_RATIO


@dataclass(frozen=True)
class Denominators:
    """What a loss is divided by, counted over ALL ranks and micro-batches of one optimiser update, before any split."""

    num_tokens: int  # loss tokens
    num_sequences: int  # sequences with at least one loss token
    max_tokens: int = 1  # the constant T_max of Dr.GRPO (arXiv:2503.20783)


def token_weights(sequence_of: torch.Tensor, aggregation: str, over: Denominators) -> torch.Tensor:
    """float32 [T] weights w such that sum(w * loss) over all ranks and micro-batches is the aggregate.

    token-mean (DAPO): 1 / M. seq-mean-token-mean (GRPO): 1 / (N * T_i). seq-mean-token-sum-norm (Dr.GRPO):
    1 / (N * T_max). M loss tokens, N sequences, T_i loss tokens of the token's own sequence, which must be whole.
    `sequence_of` int64 [T].
    """
    ones = torch.ones(sequence_of.shape, dtype=torch.float64, device=sequence_of.device)
    if aggregation == "token-mean":
        weights = ones / max(over.num_tokens, 1)
    elif aggregation == "seq-mean-token-mean":
        weights = ones / (max(over.num_sequences, 1) * torch.bincount(sequence_of)[sequence_of])
    else:
        weights = ones / (max(over.num_sequences, 1) * over.max_tokens)
    return weights.float()


def sequence_mean(x: torch.Tensor, sequence_of: torch.Tensor) -> torch.Tensor:
    """Mean of `x` over each token's sequence, given back to every token; [T]."""
    size = int(sequence_of.max()) + 1 if sequence_of.numel() else 0
    count = torch.bincount(sequence_of, minlength=size).to(x.dtype)
    return (x.new_zeros(size).index_add(0, sequence_of, x) / count.clamp(min=1))[sequence_of]


def policy_ratio(logp: torch.Tensor, prox_logp: torch.Tensor, sequence_of: torch.Tensor, level: str) -> torch.Tensor:
    """r = policy / proximal policy for every token, [T].

    Level "sequence" is GSPO-token (arXiv:2507.18071, eq. 14): s_i = exp(mean over the sequence of log r), whose value
    every token carries while the gradient goes through the token's own logp.
    """
    log_ratio = (logp - prox_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if level == "sequence":
        mean = sequence_mean(log_ratio.detach(), sequence_of)
        return mean.exp() * (logp - logp.detach()).exp()
    return log_ratio.exp()


def behaviour_weight(
    prox_logp: torch.Tensor,
    behaviour_logp: torch.Tensor,
    sequence_of: torch.Tensor,
    level: str,
    correction: str,
    cap: float,
) -> torch.Tensor:
    """w = proximal / behaviour policy of decoupled PPO (arXiv:2110.00641, eq. 12), [T], without gradient.

    Above `cap`: "mask" sets it to 0 (the token leaves the numerator, denominators stay), "truncate" to the cap,
    "none" leaves it. Level "sequence" takes the geometric mean over the sequence, as the ratio does.
    """
    log_weight = (prox_logp - behaviour_logp).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if level == "sequence":
        log_weight = sequence_mean(log_weight, sequence_of)
    weight = log_weight.exp()
    if correction == "mask":
        return torch.where(weight <= cap, weight, torch.zeros_like(weight))
    return weight.clamp(max=cap) if correction == "truncate" else weight


def clipped_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, eps_low: float, eps_high: float, dual_clip: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate, to be minimised, and where a clip holds (bool); both [T].

    max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)) (arXiv:1707.06347, eq. 7; eps_high of its own: DAPO's
    clip-higher). `dual_clip` c > 1 bounds it by -c A where A < 0 (arXiv:1912.09729, eq. 5).
    """
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = torch.maximum(plain, clipped)
    is_clipped = clipped > plain
    if dual_clip is not None:
        bound = -dual_clip * advantages
        is_bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(is_bounded, bound, loss)
        is_clipped = is_clipped | is_bounded
    return loss, is_clipped
