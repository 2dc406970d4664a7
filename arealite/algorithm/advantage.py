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


def sum_to_go(x: torch.Tensor, sequence_of: torch.Tensor, factor: float) -> torch.Tensor:
    """Discounted sum of `x` [T] from each token to the end of its sequence, float64 [T].

    G_t = sum over k >= t of factor^(k - t) * x_k, where k counts loss tokens only, so that prompts and tool output
    take no time. `sequence_of` int64 [T] is ascending. Of -weight * KL of each token this is the KL to go.
    """
    count = torch.bincount(sequence_of)
    to_the_end = count.cumsum(0)[sequence_of] - 1 - torch.arange(len(x))
    rows = x.new_zeros(int(count.max()) if len(x) else 0, len(count), dtype=torch.float64)  # the last tokens first
    rows[to_the_end, sequence_of] = x.double()
    for earlier, later in zip(rows[1:], rows, strict=False):
        earlier += factor * later
    return rows[to_the_end, sequence_of]


def gae(
    rewards: torch.Tensor, values: torch.Tensor, sequence_of: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """Generalised advantage estimates of loss tokens (arXiv:1506.02438, eq. 16), float64 [T]; returns are A + V.

    A_t = sum over k of (gamma * lambda)^k * delta_(t+k), delta_t = r_t + gamma * V_(t+1) - V_t. `rewards` and
    `values` are [T]; V_t is the value of the state in which token t was chosen. Time counts loss tokens, as in
    `sum_to_go`. After the last one comes 0, also where an answer was cut off at its limit: the limit belongs to the
    task, and the reward speaks of the answer as it is. (A value there would pay for an answer that nobody will ever
    see the end of.)
    """
    values = values.double()
    following = torch.cat([values[1:], values.new_zeros(1)])[: len(values)]
    is_last = torch.cat([sequence_of[1:] != sequence_of[:-1], sequence_of.new_ones(1, dtype=torch.bool)])[: len(values)]
    deltas = rewards.double() + gamma * torch.where(is_last, 0.0, following) - values
    return sum_to_go(deltas, sequence_of, gamma * gae_lambda)
