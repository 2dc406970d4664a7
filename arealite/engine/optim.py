"""Optimizers on sharded float32 weights, their schedule, and the gradients' norm. Called by engine/fsdp_engine.py."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from arealite.api.cli_args import OptimizerConfig
from arealite.api.errors import ConfigError

logger = logging.getLogger(__name__)

NUM_WATCHED = 1024  # weights of each tensor


def learning_rate(config: OptimizerConfig, update: int, num_steps: int | None, updates_per_step: int = 1) -> float:
    """The rate of optimiser update `update` (from 0) in a run of `num_steps` steps.

    Linear warm-up over the updates of `warmup_steps` steps, then constant, or linear / half a cosine down to
    min_lr_ratio * lr, which an update after the last one would have: every update of the run learns.
    """
    warmup = config.warmup_steps * updates_per_step
    if update < warmup:
        return config.lr * (update + 1) / warmup
    if config.lr_scheduler == "constant":
        return config.lr
    if num_steps is None:
        raise ConfigError(
            f"lr_scheduler {config.lr_scheduler} needs the number of steps: call plan_steps(n) on the engine before the"
            " first update, or use lr_scheduler=constant"
        )
    span = max(num_steps * updates_per_step - warmup, 1)
    done = min((update - warmup) / span, 1.0)
    left = 1 - done if config.lr_scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """`config.kind`, with its state in place, so that a recovery point can be read into it. Vectors (norms, biases) do
    not decay, as in transformers' Trainer.

    - adamw: arXiv:1711.05101, two moments of every weight;
    - adafactor: arXiv:1804.04235 without its own step sizes: `lr` bounds the root mean square of a matrix's update. Of
      a matrix's squared gradients it keeps the means of rows and columns; there is no first moment.

    Raises ConfigError: adafactor's means run over the ranks, which do not talk where offloaded weights are.
    """
    parameters = list(parameters)
    groups: dict[tuple[DeviceMesh | None, bool], list[nn.Parameter]] = defaultdict(list)
    for p in parameters:  # one call of a kernel takes one mesh
        groups[p.device_mesh if isinstance(p, DTensor) else None, p.ndim > 1].append(p)
    grouped = [
        {"params": members, "weight_decay": config.weight_decay if is_matrix else 0.0}
        for (_, is_matrix), members in groups.items()
    ]
    optimizer: torch.optim.Optimizer
    if config.kind == "adafactor":
        if any(isinstance(p, DTensor) and p.device.type != p.device_mesh.device_type for p in parameters):
            raise ConfigError(
                "optimizer.kind=adafactor was found with offload=all; expected weights on the accelerator: use"
                " offload=optimizer or none, or optimizer.kind=adamw"
            )
        from transformers.optimization import Adafactor  # with all of its Trainer, a second's import

        optimizer = Adafactor(grouped, lr=config.lr, scale_parameter=False, relative_step=False)
        for p in parameters:
            optimizer.state[p] = {"step": 0, **_squares(p.detach())}
        return optimizer
    betas = config.beta1, config.beta2
    optimizer = torch.optim.AdamW(grouped, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def _squares(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adafactor's zeros for `weight`: of a matrix [.., R, C] the means over C and R, sharded as R and C are."""
    if weight.ndim < 2:
        return {"exp_avg_sq": torch.zeros_like(weight)}
    means = {"exp_avg_sq_row": torch.zeros_like(weight).mean(-1), "exp_avg_sq_col": torch.zeros_like(weight).mean(-2)}
    for key, mean in means.items():
        if isinstance(mean, DTensor):  # partial sums where the dimension that is gone was sharded
            whole = [Replicate() if place.is_partial() else place for place in mean.placements]
            means[key] = mean.redistribute(placements=whole)
    return means


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What the optimizer remembers of `parameter`'s gradients, live, by the optimizer's own names."""
    return {key: value for key, value in optimizer.state[parameter].items() if key.startswith("exp_avg")}


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Go on as after `num_updates` updates."""
    for state in optimizer.state.values():
        step = state["step"]
        state["step"] = torch.full_like(step, num_updates) if isinstance(step, torch.Tensor) else num_updates


def gradient_norms(parameters: Mapping[str, nn.Parameter], ranks: dist.ProcessGroup) -> dict[str, float]:
    """The 2-norms of the gradients of all `ranks`, a gloo group, together, by group of parameters; of the groups that
    have a gradient. Collective."""
    grads = {name: _local(p.grad) for name, p in parameters.items() if p.grad is not None}
    norms = torch.stack(torch._foreach_norm(list(grads.values()))).double().tolist() if grads else []  # waits once
    own = dict.fromkeys(GROUPS, 0.0)
    for name, norm in zip(grads, norms, strict=True):
        own[group_of(name)] += norm * norm / _num_copies(parameters[name], ranks)
    squares = torch.tensor(list(own.values()), dtype=torch.float64)
    dist.all_reduce(squares, group=ranks)
    return {group: math.sqrt(x) for group, x in zip(GROUPS, squares.tolist(), strict=True) if x != 0}


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


def not_finite(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Which weights and gradients of this rank's shards are not, in words."""
    tensors = [(f"weight {name}", p.detach()) for name, p in parameters.items()]
    tensors += [(f"gradient of {name}", p.grad) for name, p in parameters.items() if p.grad is not None]
    shards = ((what, t.to_local()) for what, t in tensors if isinstance(t, DTensor))
    return [f"{what} is not finite" for what, shard in shards if not bool(shard.isfinite().all())]


class RoundingWatch:
    """Looks at the first few of every tensor's weights on this rank, and says once if an update does not show in
    `dtype`, in which they compute, are served and saved."""

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters, self._dtype, self._is_told = list(parameters), dtype, False

    @contextmanager
    def of_update(self, lr: float, norm: float) -> Iterator[None]:
        """Around the optimizer's step, at learning rate `lr` with gradients of norm `norm`."""
        before = self._rounded()
        yield
        if lr > 0 and norm > 0 and not self._is_told and torch.equal(before, self._rounded()):
            self._is_told = True
            logger.warning(
                "an update at learning rate %g moved none of %d weights looked at by as much as %s shows: small steps"
                " add up in the float32 weights and are seen later; if that is too late, raise optimizer.lr",
                *(lr, len(before), self._dtype),
            )

    def _rounded(self) -> torch.Tensor:
        return torch.cat([_local(p.detach()).flatten()[:NUM_WATCHED].to(self._dtype) for p in self._parameters])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_copies(tensor: torch.Tensor, ranks: dist.ProcessGroup) -> int:
    """On how many of all `ranks` each number of a tensor is."""
    if not isinstance(tensor, DTensor):
        return ranks.size()
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, place in enumerate(tensor.placements) if place.is_replicate())
