"""From raw rewards of sequences to advantages of tokens, but for norm.py. Called by engine/ppo/actor.py."""

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


def kl_to_go(token_rewards: torch.Tensor, sequence_of: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the token rewards from each token to the end of its sequence, float64 [T].

    G_t = sum over k >= t of gamma^(k - t) * r_k, where k counts loss tokens only, so that prompts and tool output
    take no time. `token_rewards` [T] are -weight * KL of each loss token, `sequence_of` int64 [T] is ascending.
    """
    out: list[float] = []
    total, later = 0.0, -1
    for reward, owner in zip(reversed(token_rewards.tolist()), reversed(sequence_of.tolist()), strict=True):
        total = reward + gamma * total if owner == later else reward
        later = owner
        out.append(total)
    return torch.tensor(out[::-1], dtype=torch.float64)
