"""The trainer ranks: joining them, their grid, talking among them. Called by engine/ and arealite prove."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from arealite import devices
from arealite.api.errors import ArealiteError
from arealite.api.types import Dims
from arealite.observe.timeline import span
from arealite.observe.waits import Wait, mark, waiting

T = TypeVar("T")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NCCL_GRACE_S = 60.0
# So many limits has a wait of one model's ranks for another's: whole passes lie between their calls. Who dies ends such
# a wait at once, and who stands still is found by the watchdog.
PASS_LIMITS = 10


def pick_device() -> torch.device:
    """This rank's accelerator where there are any, else the CPU. Raises ConfigError: there is none for this rank."""
    device = devices.device_of_rank(int(os.environ.get("LOCAL_RANK", "0")))
    devices.use(device)
    return device


def group_limit(device: torch.device, limit_s: float) -> timedelta:
    """The time limit of a process group for tensors on `device`, where our own waits have `limit_s`. At its limit NCCL
    ends the whole process, so it gets more: the wait that has a name is past its own before, and is reported."""
    return timedelta(seconds=limit_s + (NCCL_GRACE_S if devices.is_gpu(device) else 0.0))


def join_ranks(device: torch.device, timeout_s: float) -> bool:
    """Join the process group that torchrun's environment variables describe, or be its only rank where they are unset.

    Returns whether this call made the group (False: it existed). Waits for all ranks, at most `timeout_s`.
    """
    if dist.is_initialized():
        return False
    # The device is not bound to the group (`device_id`): NCCL would make weights/wire.py's groups, whose other members
    # are servers, as parts of this one.
    backend = devices.collective_backend(device)
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
    - `experts`: over the first, then by FSDP over the second.
    Each rank computes the tokens of its place (context, tensor) of its data share: `token_place` of `num_token_places`;
    `tokens` has the ranks with the share's other tokens, `pipeline` those with this rank's place on all stages.
    Ranks of the run that are not in `dims.ranks` (`is_here` False) have no place and no meshes.
    """

    def __init__(self, dims: Dims, device: torch.device, timeout_s: float) -> None:
        """`timeout_s`: the longest wait in any of the meshes' groups. Collective over all ranks of the run, since torch
        names a group by how many each process has made before."""
        self.dims, self.device, self._limit = dims, device, group_limit(device, timeout_s)
        self.is_here = dist.get_rank() in dims.ranks
        rank = dist.get_rank() - dims.first
        self.num_token_places = places = dims.c * dims.t
        self.token_place = rank % places
        self.context_rank = self.token_place // dims.t
        self.share = rank // places % dims.d
        self.stage_rank = rank // (places * dims.d)
        self.is_first_stage, self.is_last_stage = self.stage_rank == 0, self.stage_rank == dims.p - 1
        self.speaks = self.is_here and self.is_last_stage and self.token_place == 0  # for its data share
        p, d, num_ranks = dims.p, dims.d, dims.d * places  # of a stage
        layers = self._grid(p=p, dc=d * dims.c, t=dims.t)
        contexts = self._grid(p=p, d=d, c=dims.c, t=dims.t) if dims.c > 1 else None
        tokens = self._grid(p=p, d=d, ct=places) if places > 1 else None
        stages = self._grid(p=p, all=num_ranks) if dims.t > 1 else None
        # What does not divide is refused by `parallelize`, which knows the model.
        experts = self._grid(p=p, rest=num_ranks // dims.e, e=dims.e) if dims.e > 1 and not num_ranks % dims.e else None
        if p > 1:
            # Not the grid's: gloo takes the limit of messages from one rank to another when a group is made, and then
            # only.
            at_place = torch.tensor(dims.ranks).view(p, -1).T.tolist()
            self.pipeline: dist.ProcessGroup
            self.pipeline, _ = dist.new_subgroups_by_enumeration(at_place, timeout=self._limit)
        if not self.is_here:
            return
        self.tensor, self.shards = layers["t"], layers["dc"]
        self.stage = self.shards if stages is None else stages["all"]
        if contexts is not None:
            self.context = contexts["c"]
        if tokens is not None:
            self.tokens = tokens["ct"]
        if experts is not None:
            self.experts = experts["e"], experts["rest"]

    def _grid(self, **sizes: int) -> DeviceMesh:
        """The model's ranks as a mesh with these dimensions, slowest first. Collective."""
        mesh = DeviceMesh(
            self.device.type, torch.tensor(self.dims.ranks).view(*sizes.values()), mesh_dim_names=tuple(sizes)
        )
        if self.is_here:
            for group in mesh.get_all_groups():  # a DeviceMesh takes no limit: its groups would wait for half an hour
                _set_pg_timeout(self._limit, group)
        return mesh


class RankCollective:
    """api.protocols.Collective over a gloo group of its own, so that objects never share a queue with gradients.

    Consumes: objects of the other ranks. Produces: the same outcome on all ranks. Waits for: every rank to make the
    same call, at most `timeout_s`, under the call's name. Unblocked by: that call, or the death of a rank.

    `layouts`: the grids of its ranks, in their order, one for each set of ranks that share out a batch among them; all
    ranks of the run, each with a data share of its own, if none is given. Made by all ranks of the run, also by those
    that are not in it, which can make no call.
    """

    def __init__(self, timeout_s: float, *layouts: Dims, backend: str = "gloo") -> None:
        layouts = layouts or (Dims(d=dist.get_world_size()),)
        self.timeout_s, self._first = timeout_s, layouts[0]
        self._ranks = [rank for dims in layouts for rank in dims.ranks]
        self.group: Any = dist.new_group(self._ranks, timedelta(seconds=timeout_s), backend)
        self.rank = self._ranks.index(dist.get_rank()) if dist.get_rank() in self._ranks else -1
        self.world_size = len(self._ranks)
        self.divisions = tuple(dims.d for dims in layouts)
        self.num_shares = sum(self.divisions)
        ends = itertools.accumulate(self.divisions)
        self._shares = [  # of each rank
            end - dims.d + i // (dims.c * dims.t) % dims.d
            for dims, end in zip(layouts, ends, strict=True)
            for i in range(dims.size)
        ]

    def _waiting(self, what: str, from_head: bool = False) -> AbstractContextManager[Wait | None]:
        """A wait for all others, or for rank 0 only where it sends."""
        ranks = self._ranks[:1] if from_head and self.rank != 0 else self._ranks
        return _bounded(f"collective: {what}", self.timeout_s, set(ranks) - {dist.get_rank()})

    def scatter(self, shares: list[Any] | None) -> Any:
        if self.world_size == 1:
            assert shares is not None
            return shares[0]
        received = [None]
        each = None if shares is None else [shares[i] for i in self._shares]
        with self._waiting("scatter", from_head=True):
            dist.scatter_object_list(received, each, group=self.group, group_src=0)
        return received[0]

    def broadcast(self, value: Any) -> Any:
        if self.world_size == 1:
            return value
        box = [value]
        with self._waiting("broadcast", from_head=True):
            dist.broadcast_object_list(box, group=self.group, group_src=0)
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
        """The "max" of a CPU tensor over all ranks, or its "sum" over all data shares of the first layout: there one
        rank of each counts, on the last pipeline stage, where the loss is."""
        dims, total = self._first, values.clone()
        is_last_stage = dims.size - dims.size // dims.p <= self.rank < dims.size
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
