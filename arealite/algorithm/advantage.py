"""From raw rewards of samples to advantages of tokens. Called by engine/ppo/actor.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

AllReduce = Callable[[torch.Tensor, str], torch.Tensor]


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


def normalise(
    x: torch.Tensor,
    groups: torch.Tensor,
    mean: str = "group",
    std: str = "group",
    leave_one_out: bool = False,
    eps: float = 1e-6,
    all_reduce: AllReduce = lambda tensor, _: tensor,
    of: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """y = (x - mean) / (std + eps), float64 [n]; `groups` int64 [n] are non-negative group ids in any order.

    Statistics of level "group" are over the entries of equal id (GRPO, arXiv:2402.03300, eq. 2), which must all be on
    this rank; those of level "batch" are over all entries of all ranks, by `all_reduce(tensor, "sum" or "max")`. The
    standard deviation is unbiased (n - 1). `leave_one_out` takes the entry itself out of the mean (RLOO,
    arXiv:2402.14740): mean_i = (sum - x_i) / (n - 1).

    Entries of a set (the mean's or the deviation's) without spread, singletons among them, are exactly 0: in floating
    point their mean can differ from them by a rounding error, which a tiny deviation would blow up to order 1. So the
    mean is the entry itself, and the deviation infinite.

    `of`: values [m], and int64 [m] the entry of each, whose mean and deviation are taken; y is that of the values then.
    """
    x = x.to(torch.float64)
    moments = {level: _moments(x, groups, level, all_reduce) for level in dict.fromkeys((mean, std)) if level != "none"}
    centre, divisor = torch.zeros_like(x), torch.ones_like(x)
    if mean != "none":
        count, total, _, constant = moments[mean]
        centre = torch.where(constant, x, (total - x) / (count - 1).clamp(min=1) if leave_one_out else total / count)
    if std != "none":
        *_, deviation, constant = moments[std]
        divisor = torch.where(constant, torch.inf, deviation + eps)
    if of is None:
        return (x - centre) / divisor
    values, entry = of
    return (values - centre[entry]) / divisor[entry]


def _moments(
    x: torch.Tensor, groups: torch.Tensor, level: str, all_reduce: AllReduce
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every entry: count, sum and standard deviation of its set, and whether all entries of the set are equal."""
    sets = torch.zeros_like(groups) if level == "batch" else groups
    num_sets = int(sets.max()) + 1 if sets.numel() else 1

    def of_sets(totals: torch.Tensor, op: str) -> torch.Tensor:
        return (all_reduce(totals, op) if level == "batch" else totals)[sets]

    def sum_of(values: torch.Tensor) -> torch.Tensor:
        return of_sets(values.new_zeros(num_sets).index_add_(0, sets, values), "sum")

    def largest_of(values: torch.Tensor) -> torch.Tensor:
        return of_sets(values.new_full((num_sets,), -torch.inf).scatter_reduce(0, sets, values, "amax"), "max")

    count, total = sum_of(torch.ones_like(x)), sum_of(x)
    squares = sum_of((x - total / count).square())
    return count, total, (squares / (count - 1).clamp(min=1)).sqrt(), largest_of(x) == -largest_of(-x)


def sum_to_go(x: torch.Tensor, sample_of: torch.Tensor, factor: float) -> torch.Tensor:
    """Discounted sum of `x` [T] from each token to the end of its sample, float64 [T].

    G_t = sum over k >= t of factor^(k - t) * x_k, where k counts loss tokens only, so that prompts and tool output
    take no time. `sample_of` int64 [T] is ascending. Of -weight * KL of each token this is the KL to go.
    """
    count = torch.bincount(sample_of)
    to_the_end = count.cumsum(0)[sample_of] - 1 - torch.arange(len(x))
    rows = x.new_zeros(int(count.max()) if len(x) else 0, len(count), dtype=torch.float64)  # the last tokens first
    rows[to_the_end, sample_of] = x.double()
    for earlier, later in zip(rows[1:], rows, strict=False):
        earlier += factor * later
    return rows[to_the_end, sample_of]


def gae(
    rewards: torch.Tensor, values: torch.Tensor, sample_of: torch.Tensor, gamma: float, gae_lambda: float
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
    is_last = torch.cat([sample_of[1:] != sample_of[:-1], sample_of.new_ones(1, dtype=torch.bool)])[: len(values)]
    deltas = rewards.double() + gamma * torch.where(is_last, 0.0, following) - values
    return sum_to_go(deltas, sample_of, gamma * gae_lambda)
