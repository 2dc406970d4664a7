"""One training step, on one rank or on several, as numbers that must not depend on how it was computed, and how far two
of them may be apart.

Called by command.py and rollouts.py for all that `arealite prove` tries.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar

from arealite.api.cli_args import PPOActorConfig
from arealite.api.errors import ConfigError
from arealite.api.types import PER_TOKEN, Batch, Dims, Group, Task, Trajectory
from arealite.devices import num_accelerators
from arealite.engine.parallel.ranks import join_ranks, pick_device
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.launcher.child import hold_port
from arealite.observe.waits import waiting

# Largest differences allowed, by compute type: in float32 what another order of sums makes; in bfloat16 what another
# order of roundings to 8 bits makes in some thirty layers; none between weights, which are compared where every bit
# must be the same. Absolute for ABSOLUTE quantities, else relative (of gradients: the norm of the difference).
# MISMATCH: the mean of logprobs of trainer and server, which with compiled kernels round alike.
MISMATCH, MISMATCH_WITHOUT_KERNELS = "mismatch", "mismatch without kernels"
TOLERANCES = {
    "float32": {"logprobs": 2e-4, "loss": 1e-5, "gradient norm": 1e-4, "gradients": 2e-4, "weights": 0.0}
    | {MISMATCH: 1e-4, MISMATCH_WITHOUT_KERNELS: 1e-4},
    "bfloat16": {"logprobs": 0.5, "loss": 1e-2, "gradient norm": 5e-2, "gradients": 0.15, "weights": 0.0}
    | {MISMATCH: 1e-5, MISMATCH_WITHOUT_KERNELS: 0.1},
}
ABSOLUTE = ("logprobs", "weights", MISMATCH, MISMATCH_WITHOUT_KERNELS)
TINY = 1e-30
LAYOUT_LIMIT_S = 900.0
POLL_S = 0.5
LAYOUT = "layout"  # the check's name

Distance = tuple[float, float]  # absolute, relative


@dataclass(frozen=True)
class Finding:
    """One line of the table. `absolute`, `relative`: of the quantity `worst`, which came nearest to its `tolerance`."""

    check: str
    compared: str
    outcome: str  # pass, FAIL or skipped
    worst: str = ""
    absolute: float = 0.0
    relative: float = 0.0
    tolerance: float = 0.0
    reason: str = ""


def judge(check: str, compared: str, apart: Mapping[str, Distance], dtype: str) -> Finding:
    """Pass when every distance is within its tolerance; NaN never is."""

    def share(name: str) -> float:
        judged = apart[name][0 if name in ABSOLUTE else 1]
        return math.inf if math.isnan(judged) else judged / (TOLERANCES[dtype][name] or 1e-300)

    worst = max(apart, key=share)
    outcome = "pass" if share(worst) <= 1 else "FAIL"
    return Finding(check, f"{compared}, {dtype}", outcome, worst, *apart[worst], TOLERANCES[dtype][worst])


@dataclass
class Step:
    """One update on `batch` without a change of weights. `gradients` are clipped, whole, float32 on the CPU, by
    parameter; of a step that was compared while it was made, their distance to the reference instead."""

    batch: Batch
    logp: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # [T]
    loss: float = 0.0
    grad_norm: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    scale: float = 1.0  # of the loss: the mean absolute advantage
    squared_distance: float = 0.0
    largest: float = 0.0  # of the differences


def proof_config(config: PPOActorConfig, dtype: Literal["bfloat16", "float32"]) -> PPOActorConfig:
    """The user's policy in `dtype`, one update per step, at learning rate 0: every step then starts from the same
    weights, and what it would do to them is in the gradients."""
    optimizer = replace(config.optimizer, lr=0.0, lr_scheduler="constant", warmup_steps=0)
    return replace(config, dtype=dtype, ppo_n_minibatches=1, optimizer=optimizer)


def take_step(actor: FSDPPPOActor, batch: Batch, reference: Step | None = None) -> Step:
    """One step on `batch`, this rank's share. `reference`: a step to compare gradients with, instead of keeping
    one's own. Collective; on another stage of a pipeline the gradients are those of that stage."""
    step = Step(batch)

    def look(*_: object) -> None:
        for module in actor.sharded.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the parameters with gradients are the sharded ones
        for name, p in actor.sharded.hf_model.named_parameters():
            if not p.requires_grad or p.grad is None:
                continue
            whole = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).float().cpu()
            if reference is None:
                step.gradients[name] = whole.clone()
                continue
            difference = whole.double() - reference.gradients[name].double()
            step.squared_distance += float(difference.square().sum())
            step.largest = float(np.maximum(step.largest, float(difference.abs().max())))  # NaN stays

    mine = replace(batch)
    step.logp = actor.compute_logp(mine)
    actor.compute_advantages(mine)
    assert actor.sharded.optimizer is not None and mine.advantages is not None
    step.scale = float(np.abs(mine.advantages[batch.loss_mask]).mean()) if batch.loss_mask.any() else 0.0
    hook = actor.sharded.optimizer.register_step_pre_hook(look)
    try:
        stats = actor.grpo_update(mine)
    finally:
        hook.remove()
    step.loss, step.grad_norm = stats["loss"], stats["grad_norm"]
    return step


def distances(step: Step, reference: Step) -> dict[str, Distance]:
    """How far a step that was made with `reference`'s gradients is from it. The loss's may itself be near 0: it is
    taken relative to the mean absolute advantage then."""
    norm = sum(float(g.double().square().sum()) for g in reference.gradients.values()) ** 0.5
    loss, grad_norm = abs(step.loss - reference.loss), abs(step.grad_norm - reference.grad_norm)
    return {
        "logprobs": logprob_distance(step.logp, reference.logp),
        "loss": (loss, loss / max(abs(reference.loss), reference.scale, TINY)),
        "gradient norm": (grad_norm, grad_norm / max(reference.grad_norm, TINY)),
        "gradients": (step.largest, step.squared_distance**0.5 / max(norm, TINY)),
    }


def logprob_distance(one: np.ndarray, other: np.ndarray) -> Distance:
    """Of float32 [T] logprobs, 0 outside of the loss."""
    apart = np.abs(one.astype(np.float64) - other)
    relative = (apart / np.maximum(np.abs(other), TINY))[other != 0]
    return float(apart.max(initial=0.0)), float(relative.max(initial=0.0))


def random_batch(
    prompts: list[list[int]], group_size: int, longest: int, vocabulary: int, rng: np.random.Generator
) -> Batch:
    """Groups of `group_size` random answers of 3 to `longest` tokens to each prompt; in each group two answers begin
    alike, one equals another and is truncated, and one has a turn of the environment in the middle. Logprobs are 0."""
    groups = []
    for number, prompt in enumerate(prompts):
        answers = [rng.integers(0, vocabulary, rng.integers(3, longest + 1)).tolist() for _ in range(group_size)]
        answers[-1] = list(answers[0])
        answers[group_size // 2][:2] = answers[0][:2]
        task, members = Task(f"proof-{number}"), []
        for member, answer in enumerate(answers):
            mask = [False] * len(prompt) + [member != 1 or i != 1 for i in range(len(answer))]
            versions = [0 if seen else -1 for seen in mask]
            row = Trajectory(
                task.id, member, [*prompt, *answer], mask, [0.0] * len(mask), versions, rng.normal(), "stop"
            )
            members.append(row)
        members[-1] = replace(members[-1], finish_reason="length")
        groups.append(Group(task, number, members))
    return Batch.pack(groups)


def with_logprobs(batch: Batch, actor: FSDPPPOActor, rng: np.random.Generator) -> Batch:
    """`batch` with older policies' logprobs near the current ones, where the loss asks for them."""
    logp = actor.compute_logp(batch)

    def near(spread: float) -> np.ndarray:
        noise = rng.normal(size=len(logp)) * spread
        return np.where(batch.loss_mask, np.minimum(logp + noise, 0), 0).astype(np.float32)

    prox = near(0.05) if actor.needs_prox_logp else None
    return replace(batch, logprobs=near(0.1), prox_logp=prox, ref_logp=near(0.2) if actor.config.kl_weight else None)


def permuted(batch: Batch, rng: np.random.Generator) -> tuple[Batch, np.ndarray]:
    """The same sequences and groups in another order, and int64 [T]: where each of the new tokens was."""
    order = rng.permutation(batch.num_sequences)
    tokens = np.concatenate([np.arange(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]) for i in order])
    changed = batch.select(order)
    return replace(changed, group_ids=rng.permutation(batch.num_groups)[changed.group_ids]), tokens


def in_rows(batch: Batch) -> tuple[Batch, np.ndarray]:
    """The same samples with a row for each of their answers, which repeats what stands before it; and int64 [T]: where
    each of the new tokens was."""
    ends = np.flatnonzero(batch.loss_mask & ~np.append(batch.loss_mask[1:], False)) + 1
    owner = batch.owners[ends - 1]
    lengths = ends - batch.cu_seqlens[owner]
    tokens = np.concatenate([np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)])
    changed = batch.select(owner)
    columns = {name: x[tokens] for name in PER_TOKEN if (x := getattr(batch, name)) is not None}
    columns["loss_mask"] = columns["loss_mask"] & (tokens >= np.repeat([0, *ends[:-1]], lengths))
    return replace(changed, **columns, cu_seqlens=np.cumsum([0, *lengths])), tokens


# -- on several ranks --------------------------------------------------------------------------------------------------


def candidates(configured: Dims, has_experts: bool) -> list[Dims]:
    """The user's own layout and each dimension by itself."""
    each = [Dims(d=2), Dims(t=2), Dims(c=2), Dims(p=2)] + ([Dims(d=2, e=2)] if has_experts else [])
    return list(dict.fromkeys([configured, *each] if configured.size > 1 else each))


def check_layout(config: PPOActorConfig, reference: Step, dims: Dims) -> Finding:
    """`reference` again, by processes of their own. Ranks that die are a FAIL with their error; a layout that the
    engine refuses is skipped."""
    size = dims.size
    if 0 < num_accelerators() < size:
        why = f"needs {size} GPUs, one for each rank, and {num_accelerators()} visible"
        return Finding(LAYOUT, str(dims), "skipped", reason=why)
    # Forked from a server that has loaded torch, and no more: a rank starts in a blink, whatever its device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    held = hold_port()
    port = held.getsockname()[1]
    # A file, which ranks map: a process can be sent 256 tensors at most, and a model has more gradients.
    file = Path(tempfile.mkdtemp(prefix="arealite-prove-")) / "reference.pt"
    ranks = [context.Process(target=_rank, args=(rank, sender, port, config, file, dims)) for rank in range(size)]
    try:
        torch.save(reference, file)
        for rank in ranks:
            rank.start()
        with waiting(f"layout {dims} of arealite prove", f"{size} ranks", LAYOUT_LIMIT_S) as limit:
            while not wait([receiver, *(rank.sentinel for rank in ranks)], POLL_S):
                limit.check()
        if receiver.poll():
            finding: Finding = receiver.recv()
            return finding
        died = ", ".join(f"rank {i} with exit code {rank.exitcode}" for i, rank in enumerate(ranks) if rank.exitcode)
        return Finding(LAYOUT, str(dims), "FAIL", reason=f"died without a word: {died}")
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
        held.close()
        shutil.rmtree(file.parent)


def _rank(rank: int, sender: Connection, port: int, config: PPOActorConfig, file: Path, dims: Dims) -> None:
    """One process: rank 0 sends the Finding; any sends its error as one."""
    size = dims.size
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in env.items()}
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # of how whole gradients are gathered
    disable_progress_bar()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    try:
        join_ranks(pick_device(), config.collective_timeout_s)
        reference: Step = torch.load(file, mmap=True, weights_only=False)
        finding = _spread_step(config, reference, dims)
        if rank == 0:
            sender.send(finding)
    except Exception as error:  # boundary of the process: the parent reports it
        line = traceback.extract_tb(error.__traceback__)[-1]
        why = f"rank {rank}: {type(error).__name__}: {error} ({os.path.basename(line.filename)}:{line.lineno})"
        sender.send(Finding(LAYOUT, str(dims), "FAIL", reason=why[:2000]))  # short: ranks share the pipe
    time.sleep(LAYOUT_LIMIT_S)  # the parent ends this process; groups of a failed rank may hang in their destructors


def _spread_step(config: PPOActorConfig, reference: Step, dims: Dims) -> Finding:
    """Collective."""
    try:
        actor = FSDPPPOActor(config, dims=dims)
        actor.initialize()
    except ConfigError as error:
        return Finding(LAYOUT, str(dims), "skipped", reason=str(error))
    batch = reference.batch
    is_mine = batch.group_ids % dims.d == actor.mesh.share
    step = take_step(actor, batch.select(np.flatnonzero(is_mine)), reference)
    # Every rank has its share's logprobs, and its stage's gradients.
    my_tokens, stage = is_mine[batch.owners], actor.mesh.stage_rank
    gathered = actor.collective.gather((my_tokens, step.logp, stage, (step.squared_distance, step.largest)))
    whole = np.zeros_like(reference.logp)
    for where, logp, *_ in gathered:
        whole[where] = logp
    squared, largest = zip(*{stage: values for _, _, stage, values in gathered}.values(), strict=True)
    together = replace(step, logp=whole, squared_distance=sum(squared), largest=float(np.max(largest)))
    return judge(LAYOUT, f"{dims} against one rank", distances(together, reference), config.dtype)
