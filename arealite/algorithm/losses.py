"""Losses per token, and how tokens are weighed: the policy gradients of the PPO family, the KL to a reference, the
critic's loss, and the reward model's per pair. Called by the roles in engine/.

All tensors here hold loss tokens only, end to end: nothing is masked by a product, so that a NaN outside the loss
cannot leak in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

MAX_LOG_RATIO = 20.0  # beyond it exp() is as good as infinite, and would become one


@dataclass(frozen=True)
class Denominators:
    """What a loss is divided by, counted over ALL ranks and micro-batches of one optimiser update, before any split."""

    num_tokens: int  # loss tokens
    num_samples: int  # samples with at least one loss token
    max_tokens: int = 1  # the constant T_max of Dr.GRPO (arXiv:2503.20783)


def token_weights(sample_tokens: torch.Tensor, aggregation: str, over: Denominators) -> torch.Tensor:
    """float32 [T] weights w such that sum(w * loss) over all ranks and micro-batches is the aggregate.

    token-mean (DAPO): 1 / M. seq-mean-token-mean (GRPO): 1 / (N * T_i). seq-mean-token-sum-norm (Dr.GRPO):
    1 / (N * T_max). M loss tokens, N samples, T_i loss tokens of the token's own sample, in all of its rows:
    `sample_tokens`, int64 [T].
    """
    divisor = torch.ones(sample_tokens.shape, dtype=torch.float64, device=sample_tokens.device)
    if aggregation == "token-mean":
        divisor *= over.num_tokens
    elif aggregation == "seq-mean-token-mean":
        divisor *= over.num_samples * sample_tokens
    else:
        divisor *= over.num_samples * over.max_tokens
    return divisor.reciprocal().float()


def sample_mean(x: torch.Tensor, sample_of: torch.Tensor) -> torch.Tensor:
    """Mean of `x` over each token's sample, which must be whole, given back to every token; [T]."""
    size = int(sample_of.max()) + 1 if sample_of.numel() else 0
    count = torch.bincount(sample_of, minlength=size).to(x.dtype)
    return (x.new_zeros(size).index_add(0, sample_of, x) / count.clamp(min=1))[sample_of]


def policy_ratio(logp: torch.Tensor, prox_logp: torch.Tensor, sample_of: torch.Tensor, level: str) -> torch.Tensor:
    """r = policy / proximal policy for every token, [T].

    Level "sequence" is GSPO-token (arXiv:2507.18071, eq. 14): s_i = exp(mean over the sample of log r), whose value
    every token carries while the gradient goes through the token's own logp.
    """
    log_ratio = (logp - prox_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if level == "sequence":
        mean = sample_mean(log_ratio.detach(), sample_of)
        return mean.exp() * (logp - logp.detach()).exp()
    return log_ratio.exp()


def behaviour_weight(
    prox_logp: torch.Tensor,
    behaviour_logp: torch.Tensor,
    sample_of: torch.Tensor,
    level: str,
    correction: str,
    cap: float,
) -> torch.Tensor:
    """w = proximal / behaviour policy of decoupled PPO (arXiv:2110.00641, eq. 12), [T], without gradient.

    Above `cap`: "mask" sets it to 0 (the token leaves the numerator, denominators stay), "truncate" to the cap,
    "none" leaves it. Level "sequence" takes the geometric mean over the sample, as the ratio does.
    """
    log_weight = (prox_logp - behaviour_logp).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if level == "sequence":
        log_weight = sample_mean(log_weight, sample_of)
    weight = log_weight.exp()
    if correction == "mask":  # written so that a NaN stays one: the update must not go on without its token
        return torch.where(weight > cap, 0.0, weight)
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


def kl_value(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate, with d = logp - ref_logp and tokens sampled from the policy; any shape.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (http://joschu.net/blog/kl-approx.html). k1 and k3 are unbiased values,
    k3 and k2 are never negative: k3, a difference of nearly equal numbers, is taken in float64 by expm1. -d is bounded
    by 20 inside exp, which would overflow where the policies have parted.
    """
    d = logp - ref_logp
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return ((-d.double()).clamp(max=MAX_LOG_RATIO).expm1() + d).clamp(min=0).to(d.dtype)


def kl_loss(
    logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str, importance: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Per-token KL term: the value of `estimator`, with the gradient of KL(policy || reference).

    The gradient of KL is E[d * grad logp], which is that of k2. Differentiating the others as they stand goes wrong:
    k1's gradient is 0 on average, k3's is that of the reverse divergence. So k1 and k3 keep their value and take k2's
    gradient. `importance` (no gradient) is policy / behaviour for tokens sampled from an older policy; it makes value
    and gradient unbiased there (DeepSeek-V3.2, section 3.1).
    """
    slope = kl_value(logp, ref_logp, "k2")
    value = kl_value(logp.detach(), ref_logp, estimator)
    return importance * (value + slope - slope.detach())


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """max((V - R)^2, (V_clip - R)^2) / 2 with V_clip = V_old + clip(V - V_old, +- eps), and where the clip holds
    (bool); both [T]. Where it holds, the value has moved further towards the return than it may in one step, and has
    no gradient."""
    clipped = old_values + (values - old_values).clamp(-eps, eps)
    plain, bounded = (values - returns).square() / 2, (clipped - returns).square() / 2
    return torch.maximum(plain, bounded), bounded > plain


def pair_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(chosen - rejected), [pairs] (Bradley-Terry; arXiv:2203.02155, eq. 1)."""
    return -logsigmoid(chosen - rejected)
