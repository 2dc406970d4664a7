"""The training step on several ranks: each layout of the grid makes the step of one rank. Called by prove.py."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from arealite.api.cli_args import PPOActorConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Batch, Dims
from arealite.engine.parallel import join_ranks, pick_device
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.evaluation.proof import TOLERANCES, Finding, Step, distances, judge, skipped, take_step
from arealite.observe.waits import waiting

LIMIT_S = 900.0  # for one layout
POLL_S = 0.5
CHECK = "layout"


@dataclass(frozen=True)
class LayoutTask:
    """What every rank gets."""

    config: PPOActorConfig
    batch: Batch
    reference: Step
    layouts: tuple[Dims, ...]  # of one number of ranks


def size_of(dims: Dims) -> int:
    return dims.d * dims.t * dims.c * dims.p


def candidates(own: Dims, max_ranks: int, has_experts: bool) -> tuple[list[Dims], list[Finding]]:
    """The user's own layout and each dimension by itself, as far as there are ranks; and what is left out."""
    wanted = [own] if size_of(own) > 1 else []
    wanted += [Dims(d=2), Dims(t=2), Dims(c=2), Dims(p=2)] + ([Dims(d=2, e=2)] if has_experts else [])
    unique = list(dict.fromkeys(wanted))
    fitting = [dims for dims in unique if size_of(dims) <= max_ranks]
    why = "{} ranks and there are {}: give --ranks {}"
    left_out = [
        skipped(CHECK, str(dims), why.format(size_of(dims), max_ranks, size_of(dims)))
        for dims in unique
        if dims not in fitting
    ]
    return fitting, left_out


def check_layouts(task: LayoutTask) -> list[Finding]:
    """One Finding per layout. A layout whose ranks die is a FAIL with their error, and the next ones go on."""
    found: list[Finding] = []
    for size in sorted({size_of(dims) for dims in task.layouts}):
        left = [dims for dims in task.layouts if size_of(dims) == size]
        while left:
            outcomes, error = _run(replace(task, layouts=tuple(left)), size)
            found += outcomes
            left = left[len(outcomes) :]
            if error and left:
                found.append(Finding(CHECK, str(left.pop(0)), "FAIL", reason=error))
    return found


def _run(task: LayoutTask, size: int) -> tuple[list[Finding], str]:
    """The findings of `size` processes, in order, up to the first layout that they died in, and how they died."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [context.Process(target=_rank, args=(pipe[1], i, size, port, task)) for i, pipe in enumerate(pipes)]
    found: list[Finding] = []
    try:
        for rank in ranks:
            rank.start()
        for _, sender in pipes:
            sender.close()
        receivers = [receiver for receiver, _ in pipes]
        with waiting("layouts of arealite prove", f"{size} ranks", LIMIT_S * len(task.layouts)) as limit:
            while len(found) < len(task.layouts):
                limit.check()
                for receiver in wait(receivers, POLL_S):
                    try:
                        message: Any = cast(Connection, receiver).recv()
                    except EOFError:
                        return found, f"rank {receivers.index(cast(Connection, receiver))} died"
                    if isinstance(message, str):
                        return found, message
                    found.append(message)
        return found, ""
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()


def _rank(sender: Connection, rank: int, size: int, port: int, task: LayoutTask) -> None:
    """One process: rank 0 sends a Finding per layout; any sends the text of its error."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # of how whole gradients are gathered
    disable_progress_bar()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    try:
        join_ranks(pick_device(), task.config.collective_timeout_s)
        for dims in task.layouts:
            finding = _compare(task, dims)
            if rank == 0:
                sender.send(finding)
        time.sleep(LIMIT_S)  # the parent ends this process
    except Exception as error:  # boundary of the process: the parent reports it
        line = traceback.extract_tb(error.__traceback__)[-1]
        sender.send(f"rank {rank}: {type(error).__name__}: {error} ({os.path.basename(line.filename)}:{line.lineno})")
    os._exit(1)  # groups of a failed rank may hang in their destructors


def _compare(task: LayoutTask, dims: Dims) -> Finding:
    """Collective."""
    try:
        actor = FSDPPPOActor(task.config, dims=dims)
        actor.initialize()
    except ConfigError as error:
        return skipped(CHECK, str(dims), str(error))
    mine = task.batch.select(np.flatnonzero(task.batch.group_ids % dims.d == actor.mesh.share))
    step = take_step(actor, mine, task.reference.gradients)
    # Every rank has its share's logprobs, and its stage's gradients.
    own = np.repeat(task.batch.group_ids % dims.d == actor.mesh.share, task.batch.lengths)
    gathered = actor.collective.gather((own, step.logp, actor.mesh.stage_rank, (step.squared_distance, step.largest)))
    whole = np.zeros_like(task.reference.logp)
    for where, logp, *_ in gathered:
        whole[where] = logp
    of_stages = {stage: values for _, _, stage, values in gathered}.values()
    squared, largest = sum(x for x, _ in of_stages), max(x for _, x in of_stages)
    together = replace(step, logp=whole, squared_distance=squared, largest=largest)
    apart = distances(together, task.reference)
    return judge(CHECK, f"{dims} against one rank, {task.config.dtype}", apart, TOLERANCES[task.config.dtype])
