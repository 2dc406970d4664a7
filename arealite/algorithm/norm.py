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
    y = x
    flat = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    if mean != "none":
        sets, reduce = _sets(mean, groups, all_reduce)
        count, total, constant = _moments(x, sets, reduce)
        if leave_one_out:
            y = x - (total - x) / (count - 1).clamp(min=1)
        else:
            y = x - total / count
        flat |= constant
    if std != "none":
        sets, reduce = _sets(std, groups, all_reduce)
        count, total, constant = _moments(x, sets, reduce)
        squares = _sum_by(sets, (x - total / count).square(), reduce)[sets]
        y = y / ((squares / (count - 1).clamp(min=1)).sqrt() + eps)
        flat |= constant
    return torch.where(flat, torch.zeros_like(y), y)


def _sets(level: str, groups: torch.Tensor, all_reduce: AllReduce) -> tuple[torch.Tensor, AllReduce]:
    if level == "batch":
        return torch.zeros_like(groups), all_reduce
    return groups, alone


def _num_sets(sets: torch.Tensor) -> int:
    return int(sets.max()) + 1 if sets.numel() else 1


def _sum_by(sets: torch.Tensor, values: torch.Tensor, all_reduce: AllReduce) -> torch.Tensor:
    """Sum of `values` for every set id, over all ranks."""
    return all_reduce(values.new_zeros(_num_sets(sets)).index_add_(0, sets, values), "sum")


def _moments(
    x: torch.Tensor, sets: torch.Tensor, all_reduce: AllReduce
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every entry: count and sum of its set, and whether the set's largest and smallest entries are equal."""
    count = _sum_by(sets, torch.ones_like(x), all_reduce)
    total = _sum_by(sets, x, all_reduce)
    lowest = x.new_full((_num_sets(sets),), -torch.inf)
    largest = all_reduce(lowest.scatter_reduce(0, sets, x, "amax"), "max")
    smallest = -all_reduce(lowest.scatter_reduce(0, sets, -x, "amax"), "max")
    return count[sets], total[sets], (largest == smallest)[sets]
