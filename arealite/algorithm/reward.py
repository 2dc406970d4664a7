"""From raw rewards to shaped ones, before normalisation. Called by engine/ppo/actor.py."""

from __future__ import annotations

import torch


def overlong_penalty(num_tokens: torch.Tensor, max_tokens: int, tail_tokens: int, factor: float) -> torch.Tensor:
    """DAPO's soft punishment of long answers (arXiv:2503.14476, eq. 13), float64 [n], between -factor and 0.

    `num_tokens` [n] generated tokens L: 0 up to max_tokens - tail_tokens, then factor * ((max - tail) - L) / tail,
    -factor from max_tokens on.
    """
    excess = num_tokens.to(torch.float64) - (max_tokens - tail_tokens)
    return -factor * (excess / tail_tokens).clamp(0.0, 1.0)


def shape_rewards(rewards: torch.Tensor, bias: float, scaling: float, clip: float | None) -> torch.Tensor:
    """(rewards + bias) * scaling, clipped to +- clip; float64 [n]."""
    shaped = (rewards.to(torch.float64) + bias) * scaling
    return shaped if clip is None else shaped.clamp(-clip, clip)
