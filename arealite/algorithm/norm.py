"""Normalisation of rewards and advantages, by prompt group or over the whole batch. Called by engine/ppo/actor.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

AllReduce = Callable[[torch.Tensor, str], torch.Tensor]


def alone(tensor: torch.Tensor, op: str) -> torch.Tensor:
    """The reduction over ranks when there is one rank."""
    return tensor


def normalise(
    x: torch.Tensor,
    groups: torch.Tensor,
    mean: str = "group",
    std: str = "group",
    leave_one_out: bool = False,
    eps: float = 1e-6,
    all_reduce: AllReduce = alone,
) -> torch.Tensor:
    """y = (x - mean) / (std + eps), float64 [n]; `groups` int64 [n] are non-negative group ids in any order.

    Statistics of level "group" are over the entries of equal id (GRPO, arXiv:2402.03300, eq. 2), which must all be on
    this rank; those of level "batch" are over all entries of all ranks, by `all_reduce(tensor, "sum" or "max")`. The
    standard deviation is unbiased (n - 1). `leave_one_out` takes the entry itself out of the mean (RLOO,
    arXiv:2402.14740): mean_i = (sum - x_i) / (n - 1).

    Entries of a set (the mean's or the deviation's) without spread, singletons among them, are exactly 0: in floating
    point their mean can differ from them by a rounding error, which a tiny deviation would blow up to order 1.
    """
    x = x.to(torch.float64)
    moments = {level: _moments(x, groups, level, all_reduce) for level in dict.fromkeys((mean, std)) if level != "none"}
    y = x
    if mean != "none":
        count, total, _, _ = moments[mean]
        y = x - ((total - x) / (count - 1).clamp(min=1) if leave_one_out else total / count)
    if std != "none":
        y = y / (moments[std][2] + eps)
    for *_, constant in moments.values():
        y = torch.where(constant, 0.0, y)
    return y


def _moments(
    x: torch.Tensor, groups: torch.Tensor, level: str, all_reduce: AllReduce
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every entry: count, sum and standard deviation of its set, and whether all entries of the set are equal."""
    sets, reduce = (torch.zeros_like(groups), all_reduce) if level == "batch" else (groups, alone)
    num_sets = int(sets.max()) + 1 if sets.numel() else 1

    def sum_of(values: torch.Tensor) -> torch.Tensor:
        return reduce(values.new_zeros(num_sets).index_add_(0, sets, values), "sum")[sets]

    def largest_of(values: torch.Tensor) -> torch.Tensor:
        lowest = values.new_full((num_sets,), -torch.inf)
        return reduce(lowest.scatter_reduce(0, sets, values, "amax"), "max")[sets]

    count, total = sum_of(torch.ones_like(x)), sum_of(x)
    squares = sum_of((x - total / count).square())
    return count, total, (squares / (count - 1).clamp(min=1)).sqrt(), largest_of(x) == -largest_of(-x)
