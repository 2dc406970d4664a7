"""The training step on several ranks: each layout of the grid makes the step of one rank. Called by command.py."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from arealite.api.cli_args import PPOActorConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Dims
from arealite.engine.parallel.ranks import join_ranks, pick_device
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.launcher.supervisor import free_ports
from arealite.observe.waits import waiting
from arealite.prove.step import Finding, Step, distances, judge, take_step

LIMIT_S = 900.0  # for one layout
POLL_S = 0.5
CHECK = "layout"


def size_of(dims: Dims) -> int:
    return dims.d * dims.t * dims.c * dims.p


def candidates(configured: Dims, has_experts: bool) -> list[Dims]:
    """The user's own layout and each dimension by itself."""
    each = [Dims(d=2), Dims(t=2), Dims(c=2), Dims(p=2)] + ([Dims(d=2, e=2)] if has_experts else [])
    return list(dict.fromkeys([configured, *each] if size_of(configured) > 1 else each))


def check_layout(config: PPOActorConfig, reference: Step, dims: Dims) -> Finding:
    """`reference` again, by processes of their own. Ranks that die are a FAIL with their error; a layout that the
    engine refuses is skipped."""
    size, (port,) = size_of(dims), free_ports(1)
    if torch.cuda.is_available() and torch.cuda.device_count() < size:
        why = f"needs {size} GPUs, one for each rank, and {torch.cuda.device_count()} visible"
        return Finding(CHECK, str(dims), "skipped", reason=why)
    # Forked from a server that has loaded torch, and no more: a rank starts in a blink, whatever its device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    # A file, which ranks map: a process can be sent 256 tensors at most, and a model has more gradients.
    file = Path(tempfile.mkdtemp(prefix="arealite-prove-")) / "reference.pt"
    ranks = [context.Process(target=_rank, args=(rank, sender, port, config, file, dims)) for rank in range(size)]
    try:
        torch.save(reference, file)
        for rank in ranks:
            rank.start()
        with waiting(f"layout {dims} of arealite prove", f"{size} ranks", LIMIT_S) as limit:
            while not wait([receiver, *(rank.sentinel for rank in ranks)], POLL_S):
                limit.check()
        if receiver.poll():
            finding: Finding = receiver.recv()
            return finding
        died = ", ".join(f"rank {i} with exit code {rank.exitcode}" for i, rank in enumerate(ranks) if rank.exitcode)
        return Finding(CHECK, str(dims), "FAIL", reason=f"died without a word: {died}")
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
        shutil.rmtree(file.parent)


def _rank(rank: int, sender: Connection, port: int, config: PPOActorConfig, file: Path, dims: Dims) -> None:
    """One process: rank 0 sends the Finding; any sends its error as one."""
    size = size_of(dims)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in env.items()}
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # of how whole gradients are gathered
    disable_progress_bar()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    try:
        join_ranks(pick_device(), config.collective_timeout_s)
        reference: Step = torch.load(file, mmap=True, weights_only=False)
        finding = _compare(config, reference, dims)
        if rank == 0:
            sender.send(finding)
    except Exception as error:  # boundary of the process: the parent reports it
        line = traceback.extract_tb(error.__traceback__)[-1]
        why = f"rank {rank}: {type(error).__name__}: {error} ({os.path.basename(line.filename)}:{line.lineno})"
        sender.send(Finding(CHECK, str(dims), "FAIL", reason=why[:2000]))  # short: ranks share the pipe
    time.sleep(LIMIT_S)  # the parent ends this process; groups of a failed rank may hang in their destructors


def _compare(config: PPOActorConfig, reference: Step, dims: Dims) -> Finding:
    """Collective."""
    try:
        actor = FSDPPPOActor(config, dims=dims)
        actor.initialize()
    except ConfigError as error:
        return Finding(CHECK, str(dims), "skipped", reason=str(error))
    batch = reference.batch
    is_mine = batch.group_ids % dims.d == actor.mesh.share
    step = take_step(actor, batch.select(np.flatnonzero(is_mine)), reference)
    # Every rank has its share's logprobs, and its stage's gradients.
    my_tokens, stage = np.repeat(is_mine, batch.lengths), actor.mesh.stage_rank
    gathered = actor.collective.gather((my_tokens, step.logp, stage, (step.squared_distance, step.largest)))
    whole = np.zeros_like(reference.logp)
    for where, logp, *_ in gathered:
        whole[where] = logp
    squared, largest = zip(*{stage: values for _, _, stage, values in gathered}.values(), strict=True)
    together = replace(step, logp=whole, squared_distance=sum(squared), largest=float(np.max(largest)))
    return judge(CHECK, f"{dims} against one rank", distances(together, reference), config.dtype)
