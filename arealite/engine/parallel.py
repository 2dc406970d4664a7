"""The trainer ranks: joining them, talking among them. Called by engine/fsdp_engine.py."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from arealite.api.errors import ArealiteError, ConfigError
from arealite.api.types import Dims
from arealite.kernels.functions import use_gpu
from arealite.observe.timeline import span
from arealite.observe.waits import Wait, mark, waiting

T = TypeVar("T")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NCCL_GRACE_S = 60.0


def pick_device() -> torch.device:
    """This rank's accelerator where there are any, else the CPU. Raises ConfigError: there is none for this rank."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, num_visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= num_visible:
        raise ConfigError(
            f"rank {index} of this machine has no GPU of its own: {num_visible} visible"
            f" (CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Give the trainer at most"
            f" {num_visible} ranks here, or make more GPUs visible"
        )
    device = torch.device("cuda", index)
    use_gpu(device)
    return device


def group_limit(device: torch.device, limit_s: float) -> timedelta:
    """The time limit of a process group for tensors on `device`, where our own waits have `limit_s`. At its limit NCCL
    ends the whole process, so it gets more: the wait that has a name is past its own before, and is reported."""
    return timedelta(seconds=limit_s + (NCCL_GRACE_S if device.type == "cuda" else 0.0))


def join_ranks(device: torch.device, timeout_s: float) -> bool:
    """Join the process group that torchrun's environment variables describe, or be its only rank where they are unset.

    Returns whether this call made the group (False: it existed). Waits for all ranks, at most `timeout_s`.
    """
    if dist.is_initialized():
        return False
    # The device is not bound to the group (`device_id`): NCCL would make weights/group.py's groups, whose other members
    # are servers, as parts of this one.
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = group_limit(device, timeout_s)
    if all(name in os.environ for name in RANK_VARIABLES):
        others = set(range(int(os.environ["WORLD_SIZE"]))) - {int(os.environ["RANK"])}
        with _bounded("trainer ranks joining", timeout_s, others):
            dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    return True


@contextmanager
def _bounded(what: str, limit_s: float, ranks: set[int]) -> Iterator[Wait | None]:
    """A named wait for `ranks`, if there are any, around calls that torch ends after `limit_s`."""
    if not ranks:
        yield None
        return
    with waiting(what, "trainers", limit_s, [f"rank {r}" for r in sorted(ranks)]) as wait:
        try:
            yield wait
        except RuntimeError as error:  # torch has no error class for the time limits of its stores and of gloo
            if wait.left_s > 0:
                raise
            raise wait.expired() from error


class RankCollective:
    """api.protocols.Collective over a gloo group of its own, so that objects never share a queue with gradients.

    Consumes: objects of the other ranks. Produces: the same outcome on all ranks. Waits for: every rank to make the
    same call, at most `timeout_s`, under the call's name. Unblocked by: that call, or the death of a rank.

    `dims`: the grid of the ranks (engine/mesh.py); every rank has a data share of its own if not given.
    """

    def __init__(self, timeout_s: float, dims: Dims | None = None) -> None:
        self.timeout_s = timeout_s
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._dims = dims or Dims(d=self.world_size)
        self.num_shares = self._dims.d

    def _waiting(self, what: str, from_head: bool = False) -> AbstractContextManager[Wait | None]:
        """A wait for all others, or for rank 0 only where it sends."""
        ranks = {0} if from_head and self.rank != 0 else range(self.world_size)
        return _bounded(f"collective: {what}", self.timeout_s, set(ranks) - {self.rank})

    def scatter(self, shares: list[Any] | None) -> Any:
        if self.world_size == 1:
            assert shares is not None
            return shares[0]
        received = [None]
        width = self._dims.c * self._dims.t
        each = None if shares is None else [shares[r // width % self.num_shares] for r in range(self.world_size)]
        with self._waiting("scatter", from_head=True):
            dist.scatter_object_list(received, each, src=0, group=self.group)
        return received[0]

    def broadcast(self, value: Any) -> Any:
        if self.world_size == 1:
            return value
        box = [value]
        with self._waiting("broadcast", from_head=True):
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's object, on every rank, in rank order."""
        values: list[Any] = [None] * self.world_size
        with self._waiting("gather"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self, what: str) -> None:
        with self._waiting(what):
            dist.monitored_barrier(self.group, timedelta(seconds=self.timeout_s), wait_all_ranks=True)

    @contextmanager
    def computing(self, what: str) -> Iterator[Callable[[], None]]:
        """Around one micro-batch: sharded layers wait for the other ranks in the midst of their work. Around several:
        call what this yields at each, so that the limit counts from there."""
        found = self._waiting(f"weights and gradients of the other ranks in {what}")
        with found as wait, span(f"micro-batch of {what}"):

            def advanced() -> None:
                mark("micro-batch")
                if wait is not None:
                    wait.restart()

            yield advanced
        mark("micro-batch")

    @property
    def _speaks_for_share(self) -> bool:
        """Whether this rank's values count in sums: one rank of each data share does, on the last pipeline stage, where
        the loss is."""
        dims = self._dims
        return self.rank % (dims.c * dims.t) == 0 and self.rank >= self.world_size - self.world_size // dims.p

    def reduce(self, values: torch.Tensor, op: str) -> torch.Tensor:
        """The "sum" of a CPU tensor over all data shares, or its "max" over all ranks."""
        total = values.clone() if op == "max" or self._speaks_for_share else torch.zeros_like(values)
        with self._waiting(op):
            dist.all_reduce(total, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        return total

    def on_head(self, act: Callable[[], T]) -> T:
        """Run `act` on rank 0 and return its result on every rank; an ArealiteError that it raises is raised on all."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = act()
            except ArealiteError as error:
                # The others wait in broadcast and must hear of it; the text only, no live object travels.
                self.broadcast(type(error)(str(error)))
                raise
        outcome = self.broadcast(outcome)
        if isinstance(outcome, ArealiteError):
            raise outcome
        return outcome


def over_ranks(columns: dict[str, list[torch.Tensor]], collective: RankCollective) -> dict[str, float]:
    """One number per statistic from its values in the micro-batches of all ranks, of which some may have none: their
    sum, or the largest where the name ends in _max. Collective."""
    found = {name: torch.stack(values).double().cpu() for name, values in columns.items()}
    names = sorted({name for names in collective.gather(list(found)) for name in names})
    out: dict[str, float] = {}
    for op, reduce, none in (("max", torch.amax, -math.inf), ("sum", torch.sum, 0.0)):
        chosen = [name for name in names if name.endswith("_max") == (op == "max")]
        own = torch.tensor([float(reduce(found[n])) if n in found else none for n in chosen], dtype=torch.float64)
        out |= dict(zip(chosen, collective.reduce(own, op).tolist(), strict=True))
    return out
