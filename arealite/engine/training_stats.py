"""What optimiser updates did, and what is told of a step of them. Made by engine/fsdp_engine.py, for the roles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from arealite.algorithm.losses import Denominators


@dataclass(frozen=True)
class Update:
    """What one optimiser update did, the same on all ranks."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    over: Denominators
    statistics: dict[str, float]


def summary(updates: list[Update], took_s: float, peak: float | None, num_ranks: int) -> dict[str, float]:
    """What there is to say of every kind of update: means over those that were applied, and the speed.

    `train_tokens_per_s`: tokens of the trained sequences, prompts included, however often they are shared, in the
    `took_s` seconds of all updates; `mfu`: FLOPs over what `num_ranks` devices of `peak` FLOP/s could have done, left
    out where that is unknown.
    """
    counted = [u for u in updates if not u.skipped] or updates
    stats = {"skipped": float(all(u.skipped for u in updates)), "lr": updates[-1].lr if updates else 0.0}
    stats["num_skipped_updates"] = float(sum(u.skipped for u in updates))
    columns = {"loss": [u.loss for u in counted], "grad_norm": [u.grad_norm for u in counted]}
    for name in sorted({name for u in counted for name in u.statistics if name.startswith("grad_norm_")}):
        columns[name] = [u.statistics.get(name, 0.0) for u in counted]
    stats |= {name: sum(values) / max(len(values), 1) for name, values in columns.items()}
    stats["train_tokens_per_s"] = sum(u.statistics["num_sequence_tokens"] for u in updates) / took_s
    if peak is not None:
        stats["mfu"] = sum(u.statistics["num_flops"] for u in updates) / (took_s * peak * num_ranks)
    return stats | {"update_s": took_s}


def token_means(updates: list[Update], names: Iterable[str]) -> dict[str, float]:
    """Statistics that are sums over tokens as means over all tokens of the updates that were applied; 0 where there
    are none."""
    applied = [update for update in updates if not update.skipped]
    num_tokens = max(sum(update.over.num_tokens for update in applied), 1)
    return {name: sum(u.statistics.get(name, 0.0) for u in applied) / num_tokens for name in names}
