"""AdamW on sharded float32 weights, its schedule, and the gradients' norm. Called by engine/fsdp_engine.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

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
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)  # one call of a kernel takes one mesh
    for p in parameters:
        by_mesh[p.device_mesh if isinstance(p, DTensor) else None].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in by_mesh.values()],
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


def gradient_norms(parameters: Mapping[str, nn.Parameter], device: torch.device) -> dict[str, float]:
    """The 2-norms of the gradients of all ranks together, by group of parameters; of the groups that have a gradient.
    `device`: where the ranks talk. Collective."""
    squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
    for name, p in parameters.items():
        if p.grad is not None:
            squares[GROUPS.index(group_of(name))] += _local(p.grad).norm().double().square() / _num_copies(p)
    dist.all_reduce(squares)
    return {group: math.sqrt(x) for group, x in zip(GROUPS, squares.tolist(), strict=True) if x != 0}


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The 2-norm of all gradients of all ranks together. Collective."""
    parts = [_local(p.grad).norm().double().square() / _num_copies(p) for p in parameters if p.grad is not None]
    total = torch.stack(parts).sum()
    dist.all_reduce(total)
    return math.sqrt(float(total))


GROUPS = ("embedding", "attention", "mlp", "experts", "norms", "head")


def group_of(name: str) -> str:
    """The part of the model that a parameter of this Hugging Face name belongs to; routers are part of the experts."""
    words = name.split(".")
    if any("norm" in word for word in words):
        return "norms"
    if any("embed" in word for word in words):
        return "embedding"
    if any("attn" in word or "attention" in word for word in words):
        return "attention"
    if "experts" in words or "gate" in words or "router" in words:
        return "experts"
    return "mlp" if "mlp" in words else "head"


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: float) -> None:
    """Scale the gradients, whose norm is `norm`, down to `max_norm` if they are above it."""
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        torch._foreach_mul_([_local(p.grad) for p in parameters if p.grad is not None], scale)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_copies(tensor: torch.Tensor) -> int:
    """On how many ranks each number of a tensor is."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, place in enumerate(tensor.placements) if place.is_replicate())
