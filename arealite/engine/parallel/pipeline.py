"""Pipeline parallelism: the layers of one model on stages of ranks, several micro-batches on their way through them.

Called by engine/fsdp_engine.py and engine/sharded_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from arealite.api.errors import ArealiteError
from arealite.devices import is_gpu, wait_for
from arealite.engine.memory import explained_shortage
from arealite.engine.micro_batch import MicroBatch
from arealite.engine.packed_model import PackedModel
from arealite.engine.parallel.ranks import RankCollective, RankMesh
from arealite.engine.parallel.spread import check_supported
from arealite.observe.timeline import span

# (micro-batch, what the model returns for it) -> the scalar whose gradient is wanted, or nothing
Compute = Callable[..., torch.Tensor | None]

# torch allocates what all micro-batches of one schedule receive at once, so a schedule gets at most so many per stage:
# with 8 the first and the last stage idle for 1/9 of the time at most.
MICRO_BATCHES_PER_STAGE = 8


class _PassThrough(nn.Module):
    """Stands at the index of another stage's layer, since models look up a layer's settings by its index."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


def split_stages(model: Any, mesh: RankMesh) -> str | None:
    """Keep in `model`, a transformers model with a head, only what is this rank's stage; names stay the same.

    The first stage has the embedding, the last one the final norm and the head; it has the embedding too if the head's
    weight is tied to it. Returns the name of that weight on the two stages that have a copy of it.

    Raises:
        ConfigError: the model cannot be spread so.
    """
    num_stages = mesh.dims.p
    if num_stages == 1:
        return None
    check_supported(model.config, mesh.dims)
    base, embedding = model.base_model, model.get_input_embeddings()
    heads = {name: child for name, child in model.named_children() if child is not base}
    is_tied = any(p is embedding.weight for head in heads.values() for p in head.parameters())
    work = [_work(module, model.config) for module in [*base.layers, *heads.values()]]
    starts = stage_starts(work[: len(base.layers)], sum(work[len(base.layers) :]), num_stages)
    for i in range(len(base.layers)):
        if not starts[mesh.stage_rank] <= i < starts[mesh.stage_rank + 1]:
            base.layers[i] = _PassThrough()
    if not mesh.is_last_stage:
        base.norm = nn.Identity()
        for name in heads:
            setattr(model, name, nn.Identity())
    has_embedding = mesh.is_first_stage or (mesh.is_last_stage and is_tied)
    if not has_embedding:
        model.set_input_embeddings(nn.Identity())
    if not (is_tied and has_embedding):
        return None
    return next(name for name, p in model.named_parameters() if p is embedding.weight)


def _work(module: nn.Module, config: Any) -> float:
    """The weights that one token is multiplied with; of experts [E, ., .] those that it is sent to."""
    sizes = (p.numel() if p.ndim < 3 else p[0].numel() * config.num_experts_per_tok for p in module.parameters())
    return float(sum(sizes))


def stage_starts(layers: list[float], head: float, num_stages: int) -> list[int]:
    """The first layer of each stage, and the number of layers: the stage with most work has as little as can be.

    `layers`: work of each layer; the last stage does that of the `head` too. Looking up embeddings counts as none.
    """
    done = np.cumsum([0.0, *layers])
    best = {(i, 1): (float(done[i]), [0, i]) for i in range(1, len(layers) + 1)}
    for stage in range(2, num_stages + 1):
        for end in range(stage, len(layers) + 1):
            choices = []
            for start in range(stage - 1, end):
                own = float(done[end] - done[start]) + (head if stage == num_stages else 0.0)
                most, starts = best[start, stage - 1]
                choices.append((max(most, own), [*starts, end]))
            best[end, stage] = min(choices)
    return best[len(layers), num_stages][1]


@dataclass(frozen=True)
class Runner:
    """Runs micro-batches through a model, on all of its stages. `dtype`: what hidden states are computed in."""

    model: PackedModel
    mesh: RankMesh
    ranks: RankCollective
    dtype: torch.dtype

    def run(self, micro_batches: list[MicroBatch], temperature: float, compute: Compute, what: str) -> None:
        """`compute(micro_batch, *model(micro_batch, temperature))` for each, in order, on the ranks of the last stage.

        Where gradients are enabled, those of all that `compute` returns are added up in the parameters of all stages;
        a stage has at most as many micro-batches in flight as there are stages from it to the last one. `what`: the
        work's name in stall reports. Collective.
        """
        with explained_shortage(what, self.mesh.device):
            self._run(micro_batches, temperature, compute, what)
            if is_gpu(self.mesh.device):  # it is asked for all of this, and has yet to do much of it
                with self.ranks.computing(what):
                    wait_for(self.mesh.device)

    def _run(self, micro_batches: list[MicroBatch], temperature: float, compute: Compute, what: str) -> None:
        if self.mesh.dims.p > 1:
            todo = iter(micro_batches)
            while chosen := list(islice(todo, MICRO_BATCHES_PER_STAGE * self.mesh.dims.p)):
                with self.ranks.computing(what) as advanced:
                    self._run_schedule(chosen, temperature, compute, advanced)
            return
        for micro in micro_batches:
            with self.ranks.computing(what):
                with span("forward"):
                    wanted = compute(micro, *self.model(micro, temperature))
                if wanted is not None and torch.is_grad_enabled():
                    with span("backward"):
                        wanted.backward()

    def _run_schedule(
        self, micro_batches: list[MicroBatch], temperature: float, compute: Compute, advanced: Callable[[], None]
    ) -> None:
        mesh, number, backward = self.mesh, len(micro_batches), torch.is_grad_enabled()
        lengths = [-(-len(micro.tokens) // mesh.num_token_places) for micro in micro_batches]
        # Shapes are given, so that torch does not find them by a pass of its own.
        width = self.model.model.config.hidden_size
        hidden = torch.empty(1, max(lengths), width, dtype=self.dtype, device="meta", requires_grad=backward)
        index = torch.arange(number)  # the schedule cuts it into one number per micro-batch
        stage = PipelineStage(
            _Stage(self.model, list(zip(micro_batches, lengths, strict=True)), temperature, compute, advanced, mesh),
            mesh.stage_rank,
            mesh.dims.p,
            mesh.device,
            input_args=index[:1] if mesh.is_first_stage else hidden,
            output_args=torch.empty((), device="meta", requires_grad=backward) if mesh.is_last_stage else hidden,
            group=mesh.pipeline,
        )
        args, target = (index,) if mesh.is_first_stage else (), index if mesh.is_last_stage else None
        try:
            if backward:  # 1F1B is defined from one micro-batch per stage on
                kind = Schedule1F1B if number >= mesh.dims.p else ScheduleGPipe
                schedule = kind(stage, number, loss_fn=lambda wanted, _: wanted, scale_grads=False)
                schedule.step(*args, target=target, return_outputs=False)
            else:
                ScheduleGPipe(stage, number).step(*args, return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, ArealiteError):  # torch wraps what a stage raises
                raise error.__cause__ from None
            raise


class _Stage(nn.Module):
    """This rank's stage as torch's schedules call it: once per micro-batch, in order. Hidden states travel with zeros
    behind them, all [1, longest, H]; what is computed are a micro-batch's own nodes.

    The model is no submodule of it: a schedule would drop the gradients that earlier ones left in FSDP's modules, and
    change when they are reduced.
    """

    def __init__(
        self,
        model: PackedModel,
        micro_batches: list[tuple[MicroBatch, int]],
        temperature: float,
        compute: Compute,
        advanced: Callable[[], None],
        mesh: RankMesh,
    ) -> None:
        super().__init__()
        self.call, self.temperature, self.compute = partial(model), temperature, compute
        self.advanced, self.mesh = advanced, mesh
        self.longest, self.micro_batches = max(length for _, length in micro_batches), iter(micro_batches)

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        """`received`: the hidden states of the stage before; nothing of use on the first one."""
        self.advanced()
        micro, length = next(self.micro_batches)
        with span("forward"):
            found = self.call(micro, self.temperature, None if self.mesh.is_first_stage else received[:, :length])
            if not self.mesh.is_last_stage:
                return nn.functional.pad(found, (0, 0, 0, self.longest - length))
            wanted = self.compute(micro, *found)
        return received.new_zeros(()) if wanted is None else wanted


def from_last_stage(values: np.ndarray, mesh: RankMesh, ranks: RankCollective) -> np.ndarray:
    """The last stage's `values`, on all stages of the same data share. Collective."""
    if mesh.dims.p == 1:
        return values
    received = torch.from_numpy(values).to(mesh.device)
    with ranks.computing("results of the last pipeline stage"):
        dist.broadcast(received, group=mesh.pipeline, group_src=mesh.dims.p - 1)
    return received.cpu().numpy()


def with_tied_sum(parameters: Mapping[str, nn.Parameter], tied: str | None, mesh: RankMesh) -> dict[str, nn.Parameter]:
    """Of a stage's trained parameters those whose gradients count. Those of `tied`, which the first and the last stage
    have, become their sum on both, and count on the first."""
    if tied is None or tied not in parameters:
        return dict(parameters)
    weight = parameters[tied]
    assert isinstance(weight.grad, DTensor)
    local = weight.grad.to_local()
    own = local.to(mesh.device).contiguous()
    other = torch.empty_like(own)
    group, peer = mesh.pipeline, mesh.dims.p - 1 - mesh.stage_rank
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, own, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
        ]
    )
    for work in works:
        work.wait()
    local.add_(other.to(local.device))
    return {name: p for name, p in parameters.items() if name != tied or mesh.is_first_stage}


def over_stages(
    own: Iterator[tuple[str, torch.Tensor]], mesh: RankMesh, ranks: RankCollective
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor on the mesh's device) of all stages on every rank, one at a time, in the order of stages.

    `own`: those of this stage. Of a name that several stages have the first one's is taken. Every rank must iterate to
    the end.
    """
    if mesh.dims.p == 1:
        yield from own
        return
    seen: set[str] = set()
    for stage in range(mesh.dims.p):
        todo = own if stage == mesh.stage_rank else iter(())
        while True:
            with ranks.computing(f"weights of pipeline stage {stage}"):
                found = _broadcast(next((pair for pair in todo if pair[0] not in seen), None), stage, mesh)
            if found is None:
                break
            seen.add(found[0])
            yield found


def _broadcast(found: tuple[str, torch.Tensor] | None, stage: int, mesh: RankMesh) -> tuple[str, torch.Tensor] | None:
    """What the ranks of `stage` give, if anything, on the ranks with their places on all stages."""
    group = mesh.pipeline
    box: list[Any] = [None if found is None else (found[0], found[1].shape, found[1].dtype)]
    dist.broadcast_object_list(box, group=group, group_src=stage, device=mesh.device)
    if box[0] is None:
        return None
    name, shape, dtype = box[0]
    tensor = torch.empty(shape, dtype=dtype, device=mesh.device) if found is None else found[1].contiguous()
    dist.broadcast(tensor, group=group, group_src=stage)
    return name, tensor
