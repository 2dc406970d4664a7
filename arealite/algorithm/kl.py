"""Estimators of KL(policy || reference) from sampled tokens, as numbers and as losses. Called by engine/ppo."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0  # beyond it exp() is as good as infinite, and would become one


def kl_value(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate, with d = logp - ref_logp and tokens sampled from the policy; any shape.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (http://joschu.net/blog/kl-approx.html). k1 and k3 are unbiased values,
    k3 and k2 are never negative. -d is bounded by 20 inside exp, which would overflow where the policies have parted.
    """
    d = logp - ref_logp
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return (-d).clamp(max=MAX_LOG_RATIO).exp() - 1 + d


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
