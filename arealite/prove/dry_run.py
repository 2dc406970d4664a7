"""Ranks of any allocation without numbers: `arealite check --dry-run`, called by cli.py in a process of its own.

A model is built, cut, computed forward and backward and updated by the trainer's own code, on tensors that have shapes,
types and a device and nothing else (torch's FakeTensorMode), in a process group that does not communicate. Their device
is a kind of accelerator made for it, so that the code goes the way of a GPU, and a tensor on the wrong device is found.
What is counted is a rank's memory.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401  (what collectives make of such tensors)
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.attention import varlen  # noqa: F401  (registers its operation)
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

from arealite import devices
from arealite.api.cli_args import GRPOConfig, RunConfig, TrainEngineConfig
from arealite.api.load_config import load_run_config
from arealite.api.types import Dims
from arealite.engine.loading import Checkpoint
from arealite.engine.memory import shape_of
from arealite.engine.micro_batch import MicroBatch, assemble
from arealite.engine.optim import clip_gradients
from arealite.engine.packed_model import LANGUAGE, REWARD, VALUE, load_model
from arealite.engine.parallel import layers
from arealite.engine.parallel.ranks import RankCollective, RankMesh
from arealite.engine.sharded_model import ShardedModel, spread_model
from arealite.kernels.functions import use_kernels
from arealite.launcher.allocation import trainer_dims
from arealite.launcher.check import UNLIMITED, amount, indented, table
from arealite.launcher.memory_estimate import CARD_BYTES, pass_tokens, step_tokens, trainer_parts
from arealite.models.naming import hub_parts
from arealite.models.public import folder_of
from arealite.models.rank_memory import ModelShape, settled

KIND = "shapes"  # the accelerator without numbers
LIMIT_S = 600.0
# What an accelerator does in place, and PyTorch's stand-in for tensors without numbers does not.
IN_PLACE = {torch.ops.aten._fused_adamw_.default, torch.ops.aten._fused_adamw_.tensor_lr}
PEAK_STEP = 1.002  # by which memory grows before its parts are looked at again


ATTENTION_GRAD = torch.ops.torch_attn._varlen_attn_backward.default


class _Accelerator(backend_registration._DummyBackendModule):
    """torch.shapes: what PyTorch asks of an accelerator's module. Nothing is ever under way there."""

    Stream, Event = torch.cpu.Stream, torch.cpu.Event
    current_stream, stream = staticmethod(torch.cpu.current_stream), staticmethod(torch.cpu.stream)

    def set_device(self, _: Any) -> None:
        pass

    def synchronize(self, _: Any) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None:
        pass


class ShapeKernels:
    """What results of kernels.gpu.GpuKernels take; computed where tensors have numbers, as those have that modules are
    tried with."""

    device = devices.CPU

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
        if devices.is_gpu(x):
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)
        normed = functional.rms_norm(x.float(), weight.shape, None, eps)
        return (normed * (1 + weight.float())).to(x.dtype) if plus_one else weight * normed.to(x.dtype)

    def rms_norm_grad(
        self, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float, plus_one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)

    def silu_times(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(gate) if devices.is_gpu(gate) else functional.silu(gate) * up

    def silu_times_grad(self, gate: torch.Tensor, up: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(gate), torch.empty_like(up)

    def rotate(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, back: bool = False
    ) -> None:
        if not devices.is_gpu(x):
            first, second = x.chunk(2, -1)
            out.copy_(x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None])

    def score(self, *_: Any) -> None:
        """In place."""

    def score_grad(self, *_: Any) -> None:
        """In place."""


@cache
def accelerator() -> tuple[torch.device, ShapeKernels]:
    """The device, and what computes there; this process has it from now on, and no other."""
    backend_registration._setup_privateuseone_for_python_backend(KIND, backend_module=_Accelerator())
    dist.Backend.register_backend(KIND, _create_fake_pg, extended_api=True, devices=[KIND, "cpu"])
    devices.WITH_FLASH.add(KIND)
    kernels: Any = ShapeKernels()
    use_kernels(KIND, kernels)
    return torch.device(KIND, 0), kernels


class Shapes(FakeTensorMode):
    """Within, tensors have no numbers, but for whole numbers on the CPU, by which code decides; a number that is asked
    of any other is 1, and two are equal. Counts the memory on the accelerator: `at_peak` by `phase` of birth."""

    avoid_device_init = True

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.phase = "weights"
        self.num_bytes = self.peak = 0
        self.at_peak: dict[int, tuple[str, int]] = {}
        self._live: dict[int, tuple[str, int, Any]] = {}  # by storage: phase of birth, bytes, what tells of its end
        self._gathered: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if func is torch.ops.aten._pin_memory.default:
            return args[0].clone()
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_for_cpu = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if given and is_for_cpu and all(map(_is_whole, given)):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is torch.ops.aten.equal.default:
            return True
        if func in IN_PLACE:
            return None
        own = _attention_grads(*args[1:3]) if func is ATTENTION_GRAD else ()
        for x in own:
            self._note(x.untyped_storage())
        out = super().__torch_dispatch__(func, types, args, kwargs)
        del own
        if not given and isinstance(out, torch.Tensor) and is_for_cpu and not out.is_floating_point():
            return func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == KIND:
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = self.phase, 0, weakref.ref(storage, lambda _: self._resized(key, 0, is_over=True))
        self._resized(key, storage.nbytes())

    def _resized(self, key: int, num_bytes: int, is_over: bool = False) -> None:
        phase, before, end = self._live[key]
        self.num_bytes += num_bytes - before
        self._live[key] = phase, num_bytes, end
        if is_over:
            del self._live[key]
            self._gathered.discard(key)
        if self.num_bytes > self.peak * PEAK_STEP:
            self.peak = self.num_bytes
            self.at_peak = {
                k: ("gathered weights" if k in self._gathered else p, n) for k, (p, n, _) in self._live.items()
            }

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within the mode, and knowing of memory that is given and taken where a tensor is, as FSDP does it."""
        plain: Any = torch.UntypedStorage.resize_
        device, kernels = accelerator()
        kernels.device = device  # modules have been tried

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            if storage._cdata in self._live:
                self._gathered.add(storage._cdata)
                self._resized(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        by_numbers, layers.shared_out = layers.shared_out, _evenly
        try:
            with self:
                yield
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
            layers.shared_out = by_numbers


def _is_whole(x: torch.Tensor) -> bool:
    """Whether it has numbers, on the CPU, and they are whole."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not x.is_floating_point()


def _evenly(chosen: torch.Tensor, num_own: int, group: Any) -> tuple[list[int], list[int], torch.Tensor]:
    """As layers.shared_out, where nobody knows what was chosen: every rank gets equally many."""
    num_ranks = dist.get_world_size(group)
    each = [len(part) for part in np.array_split(np.zeros(len(chosen)), num_ranks)]
    return each, each, chosen.new_empty(sum(each))


def _attention_grads(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
    """What the kernel writes, and its stand-in does not: gradients of keys and values for each of their query heads."""
    num_kinds = 0 if query.shape[1] == key.shape[1] else 2
    return [query.new_empty(len(key), *query.shape[1:]) for _ in range(num_kinds)]


class _NoFiles(Checkpoint):
    """A checkpoint whose numbers nobody wants."""

    def __init__(self, path: str, model: Any) -> None:
        self.folder, self.hub_parts, self._parts = Path(path), hub_parts(model), {}


@dataclass(frozen=True)
class RankRun:
    """What one rank did: the layers that it has, its peak in bytes by part, and how long that took here."""

    rank: int
    num_layers: int
    parts: dict[str, int]
    took_s: float

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def run_rank(
    folder: str, config: RunConfig, role: str, engine: TrainEngineConfig, dims: Dims, rank: int
) -> tuple[RankRun, ModelShape]:
    """A step of rank `rank` of those of `dims` with the model of `role`; the shape is that of the whole model. Of the
    step's micro-batches one more than there are pipeline stages: memory is as high then as it gets. Raises ConfigError:
    the model cannot be spread so."""
    started = time.perf_counter()
    device, kernels = accelerator()
    head = {"critic": VALUE, "rw": REWARD}.get(role, LANGUAGE)
    dist.init_process_group(KIND, store=FakeStore(), rank=rank, world_size=dims.size)
    try:
        kernels.device = devices.CPU
        model = load_model(folder, head)
        shape = shape_of(model)
        engine, _ = settled(engine, shape, dims, CARD_BYTES, on_gpu=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout is now only supported")
            mesh, ranks = RankMesh(dims, device, LIMIT_S), RankCollective(LIMIT_S, dims, backend=KIND)
        shapes = Shapes()
        is_trained = role != "ref"
        sharded = spread_model(engine, model, _NoFiles(folder, model), mesh, ranks, head, is_trained, shapes.counting())
        with shapes.counting():
            parts = _step(sharded, shapes, _micro_batches(config, engine, shape, mesh), is_trained)
        kinds = ({base.__name__ for base in type(m).__mro__} for m in model.modules())
        num_layers = sum(not names.isdisjoint(model._no_split_modules) for names in kinds)
        return RankRun(rank, num_layers, parts, time.perf_counter() - started), shape
    finally:
        dist.destroy_process_group()


def _micro_batches(config: RunConfig, engine: TrainEngineConfig, shape: ModelShape, mesh: RankMesh) -> list[MicroBatch]:
    """Those of a step, or the first of them: as many nodes as the estimate has, of answers of full length."""
    passes = pass_tokens(config, engine, shape, mesh.dims)
    _, longest = step_tokens(config, shape, share_prompts=False)
    answer, in_group = longest, 1
    if isinstance(config, GRPOConfig):
        answer = min(longest, config.gconfig.max_new_tokens)
        in_group = config.gconfig.n_samples if engine.share_prompts else 1
    prompt = longest + 1 - answer  # its last token predicts the answer's first
    groups, rest = divmod(passes.tokens, prompt + in_group * (answer - 1))
    num = max(1, groups * in_group + max(0, rest - prompt) // max(1, answer - 1))
    begins, rows = np.arange(num) * (longest + 1), np.arange(num)
    is_prompt = np.arange(longest + 1) < prompt
    tokens = np.where(is_prompt, (rows // in_group)[:, None], num + rows[:, None]).reshape(-1).astype(np.int64)
    wanted = np.arange(prompt, longest + 1)
    micro = assemble(tokens, begins, [wanted] * num, rows, mesh.device, share=engine.share_prompts)
    return [micro] * min(mesh.dims.p + 1, passes.num_batches)


def _step(sharded: ShardedModel, shapes: Shapes, micro_batches: list[MicroBatch], is_trained: bool) -> dict[str, int]:
    """The passes, and the update. Bytes of the peak by part."""
    optimizer, parameters = sharded.optimizer, list(sharded.parameters.values())
    states = [] if optimizer is None else [x for state in optimizer.state.values() for x in state.values()]
    named = {_storage(x): "optimizer" for x in states if isinstance(x, torch.Tensor)}
    sharded.model.register_forward_pre_hook(lambda *_: setattr(shapes, "phase", "activations"))
    sharded.model.register_forward_hook(lambda *_: setattr(shapes, "phase", "backward's own"))

    def compute(_: MicroBatch, *scores: torch.Tensor) -> torch.Tensor | None:
        return torch.stack([score.sum() for score in scores]).sum() if is_trained else None

    shapes.peak, shapes.phase = 0, "gathered weights"  # of the root, before its own forward pass
    # The exception that ends a recomputation early would meet guards of the accelerator, which can raise no other.
    with torch.set_grad_enabled(is_trained), set_checkpoint_early_stop(False):
        sharded.runner.run(micro_batches, 1.0, compute, "dry run")
    if optimizer is not None:
        named |= {_storage(p.grad): "gradients" for p in parameters if p.grad is not None}
        shapes.phase = "update"
        clip_gradients(parameters, 1.0, 2.0)
        sharded.placement.step()
    parts: Counter[str] = Counter()
    for key, (phase, num_bytes) in shapes.at_peak.items():
        parts[named.get(key, phase)] += num_bytes
    return dict(parts.most_common())


def _storage(x: torch.Tensor) -> int:
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.untyped_storage()._cdata


def dry_run(config_path: str, overrides: Sequence[str]) -> str:
    """What `arealite check --dry-run` prints. Raises ConfigError."""
    logging.disable(logging.WARNING)  # of kernels and caches, which say nothing here
    config = load_run_config(config_path, list(overrides))
    roles = {config.trained[0]: config.trained[1]}
    if isinstance(config, GRPOConfig):
        roles |= {
            role: engine for role, engine in (("critic", config.critic), ("ref", config.ref)) if engine is not None
        }
    lines = []
    with tempfile.TemporaryDirectory() as written:
        for role, engine in roles.items():
            dims = replace(trainer_dims(config, role), first=0)
            folder = folder_of(engine.path, Path(tempfile.mkdtemp(dir=written)))
            stages = sorted({0, dims.p - 1})  # those between have the same layers, and fewer micro-batches on their way
            runs = [run_rank(folder, config, role, engine, dims, stage * (dims.size // dims.p)) for stage in stages]
            lines += _told(config, role, engine, dims, runs)
    return "\n".join(["DRY RUN (every rank's own code on tensors without numbers)", *indented(lines)])


def _told(
    config: RunConfig, role: str, engine: TrainEngineConfig, dims: Dims, runs: list[tuple[RankRun, ModelShape]]
) -> list[str]:
    """A role's ranks, one line each, and their memory beside the estimate of `arealite check`."""
    shape = runs[0][1]
    alone = replace(config, critic=None) if isinstance(config, GRPOConfig) else config
    estimated = trainer_parts(alone, shape, dims, None, on_gpu=True, engine=engine)
    total = sum(part.num_bytes for part in estimated if part.name not in ("program", "allocator"))
    lines = [f"{role}: {shape.num_parameters / 1e9:.2f} B parameters over {dims.size} ranks, {dims}"]
    rows = [("rank", "layers", "peak", "parts")]
    for run, _ in runs:
        parts = ", ".join(f"{name} {n / 2**30:.2f}" for name, n in run.parts.items() if n >= 5 << 20)
        rows.append((str(run.rank), str(run.num_layers), amount(run.peak), f"{parts} ({run.took_s:.0f} s)"))
    lines += indented(table(rows, UNLIMITED))
    if role != "ref":
        lines.append(f"  estimated, of the fullest rank without driver and gaps: {amount(total)}")
    return lines
