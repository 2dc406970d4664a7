"""The trainer ranks: joining them, their grid, talking among them. Called by engine/ and arealite prove."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

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
    # The device is not bound to the group (`device_id`): NCCL would make weights/wire.py's groups, whose other members
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


class RankMesh:
    """Ranks in the order pipeline stage, data, context, tensor (slowest first); all of them make one model.

    What is spread over which mesh:
    - a layer's own weights: over `tensor` by heads and columns, then by FSDP over `shards`;
    - what works on single tokens (embedding, head, norms outside of the layers): by FSDP over `stage`, all ranks of a
      pipeline stage, since each of them has other tokens;
    - experts: over `expert`, then by FSDP over `expert_shards`.
    Each rank computes the tokens of its place (context, tensor) of its data share: `token_place` of `num_token_places`.
    """

    def __init__(self, dims: Dims, device: torch.device, timeout_s: float) -> None:
        """`timeout_s`: the longest wait in any of the meshes' groups. Collective."""
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if dims.p * dims.d * dims.c * dims.t != world_size:
            raise ConfigError(
                f"the trainer's layout {dims} has {dims.p * dims.d * dims.c * dims.t} ranks and {world_size} were"
                " started: give allocation_mode and the number of processes the same product d x t x c x p"
            )
        self.dims, self.device, self._limit = dims, device, group_limit(device, timeout_s)
        self.num_token_places = dims.c * dims.t
        self.token_place = rank % self.num_token_places
        self.context_rank = self.token_place // dims.t
        self.share = rank // self.num_token_places % dims.d
        self.stage_rank = rank // (self.num_token_places * dims.d)
        self.is_first_stage, self.is_last_stage = self.stage_rank == 0, self.stage_rank == dims.p - 1
        layers = self._grid(p=dims.p, dc=dims.d * dims.c, t=dims.t)
        self.tensor, self.shards = layers["t"], layers["dc"]

    def _grid(self, **sizes: int) -> DeviceMesh:
        """All ranks as a mesh with these dimensions, slowest first. Collective."""
        ranks = torch.arange(dist.get_world_size()).view(*sizes.values())
        mesh = DeviceMesh(self.device.type, ranks, mesh_dim_names=tuple(sizes))
        for group in mesh.get_all_groups():  # a DeviceMesh takes no limit: its groups would wait for half an hour
            _set_pg_timeout(self._limit, group)
        return mesh

    @cached_property
    def pipeline(self) -> dist.ProcessGroup:
        """The ranks with this rank's place on all stages, by stage."""
        ranks = torch.arange(dist.get_world_size()).view(self.dims.p, -1).T.tolist()
        # Not the grid's: gloo takes the limit of messages from one rank to another when a group is made, and then only.
        group: dist.ProcessGroup
        group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=self._limit)
        return group

    @cached_property
    def context(self) -> DeviceMesh:
        dims = self.dims
        return self._grid(p=dims.p, d=dims.d, c=dims.c, t=dims.t)["c"]

    @cached_property
    def tokens(self) -> DeviceMesh:
        """The ranks that hold the other tokens of this rank's share, by `token_place`."""
        return self._grid(p=self.dims.p, d=self.dims.d, ct=self.num_token_places)["ct"]

    @cached_property
    def stage(self) -> DeviceMesh:
        """All ranks of this rank's pipeline stage."""
        dims = self.dims
        return self.shards if dims.t == 1 else self._grid(p=dims.p, all=dims.d * dims.c * dims.t)["all"]

    @cached_property
    def experts(self) -> tuple[DeviceMesh, DeviceMesh]:
        """`expert` and `expert_shards`."""
        dims = self.dims
        grid = self._grid(p=dims.p, rest=dims.d * dims.c * dims.t // dims.e, e=dims.e)
        return grid["e"], grid["rest"]


class RankCollective:
    """api.protocols.Collective over a gloo group of its own, so that objects never share a queue with gradients.

    Consumes: objects of the other ranks. Produces: the same outcome on all ranks. Waits for: every rank to make the
    same call, at most `timeout_s`, under the call's name. Unblocked by: that call, or the death of a rank.

    `dims`: the grid of the ranks; every rank has a data share of its own if not given.
    """

    def __init__(self, timeout_s: float, dims: Dims | None = None) -> None:
        self.timeout_s = timeout_s
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
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
        """As Collective.gather."""
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
        others = self._waiting(f"weights and gradients of the other ranks in {what}")
        with others as wait, span(f"micro-batch of {what}"):

            def advanced() -> None:
                mark("micro-batch")
                if wait is not None:
                    wait.restart()

            yield advanced
        mark("micro-batch")

    def reduce(self, values: torch.Tensor, op: str) -> torch.Tensor:
        """The "max" of a CPU tensor over all ranks, or its "sum" over all data shares: there one rank of each counts,
        on the last pipeline stage, where the loss is."""
        dims, total = self._dims, values.clone()
        is_last_stage = self.rank >= self.world_size - self.world_size // dims.p
        if op == "sum" and not (is_last_stage and self.rank % (dims.c * dims.t) == 0):
            total.zero_()
        with self._waiting(op):
            dist.all_reduce(total, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        return total

    def reduce_columns(self, columns: dict[str, list[torch.Tensor]]) -> dict[str, float]:
        """One number per statistic from its values in the micro-batches of all ranks, of which some may have none:
        their sum, or the largest where the name ends in _max."""
        known = {name: torch.stack(values).double().cpu() for name, values in columns.items()}
        names = sorted({name for names in self.gather(list(known)) for name in names})
        out: dict[str, float] = {}
        for op, reduce, none in (("max", torch.amax, -math.inf), ("sum", torch.sum, 0.0)):
            chosen = [name for name in names if name.endswith("_max") == (op == "max")]
            here = torch.tensor([float(reduce(known[n])) if n in known else none for n in chosen], dtype=torch.float64)
            out |= dict(zip(chosen, self.reduce(here, op).tolist(), strict=True))
        return out

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
