"""AdamW on sharded float32 weights, and its schedule. Called by engine/fsdp_engine.py."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from arealite.api.cli_args import OptimizerConfig
from arealite.api.errors import ConfigError


def learning_rate(config: OptimizerConfig, update: int, num_updates: int | None) -> float:
    """The rate of optimiser update `update` (from 0) of `num_updates`.

    Linear warm-up over `warmup_steps` updates, then constant, or linear / half a cosine down to min_lr_ratio * lr at
    the last update.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.lr
    if num_updates is None:
        raise ConfigError(
            f"lr_scheduler {config.lr_scheduler} needs the number of updates: call plan_updates(n) on the engine before"
            " the first update, or use lr_scheduler=constant"
        )
    span = max(num_updates - 1 - config.warmup_steps, 1)
    done = min((update - config.warmup_steps) / span, 1.0)
    left = 1 - done if config.lr_scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with its moments in place, so that a recovery point can be read into them."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer
