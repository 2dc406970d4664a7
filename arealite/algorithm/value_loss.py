"""The critic's loss per token, and the reward model's per pair. Called by engine/ppo/critic.py and engine/rw/."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


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
