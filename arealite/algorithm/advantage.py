"""Advantages of tokens from the rewards of sequences. Called by engine/ppo/actor.py."""

from __future__ import annotations

import torch


def broadcast_to_tokens(per_sequence: torch.Tensor, sequence_of: torch.Tensor) -> torch.Tensor:
    """GRPO's outcome advantage: every token of a sequence gets the sequence's (arXiv:2402.03300, section 4.1.2).

    `per_sequence` [n]; `sequence_of` int64 [T], the sequence of each loss token. Returns [T].
    """
    return per_sequence[sequence_of]


def kl_to_go(token_rewards: torch.Tensor, sequence_of: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the token rewards from each token to the end of its sequence, float64 [T].

    G_t = sum over k >= t of gamma^(k - t) * r_k, where k counts loss tokens only, so that prompts and tool output
    take no time. `token_rewards` [T] are -weight * KL of each loss token, `sequence_of` int64 [T] is ascending.
    """
    rewards = token_rewards.to(torch.float64)
    if not rewards.numel():
        return rewards
    counts = torch.unique_consecutive(sequence_of, return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    row = torch.repeat_interleave(torch.arange(len(counts), device=rewards.device), counts)
    column = torch.arange(len(rewards), device=rewards.device) - starts[row]
    table = rewards.new_zeros(len(counts), int(counts.max()))
    table[row, column] = rewards
    for t in range(table.shape[1] - 2, -1, -1):
        table[:, t] += gamma * table[:, t + 1]
    return table[row, column]
