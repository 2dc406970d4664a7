"""Synchronous and asynchronous rollouts without staleness are the same groups, and make the same step; trainer and
server agree on the logprobs of what was sampled, in one turn and in sessions of several.

Called by command.py. Starts a built-in server of its own on the model.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GenerationHyperparameters, GRPOConfig
from arealite.api.errors import ServerUnreachable
from arealite.api.protocols import InferenceEngine, RolloutWorkflow
from arealite.api.types import Batch, GenerationRequest, Task, Trajectory
from arealite.dataset.loader import StatefulDataLoader
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.kernels import cpu
from arealite.observe.waits import waiting
from arealite.prove.sessions import WitnessedSessions
from arealite.prove.step import (
    MISMATCH,
    MISMATCH_WITHOUT_KERNELS,
    Finding,
    distances,
    judge,
    logprob_distance,
    take_step,
)
from arealite.rollout.client import RemoteNativeEngine

START_LIMIT_S = 300.0
NUM_GROUPS, GROUP_SIZE = 2, 4
MAX_NEW_TOKENS = 12

Prompt = Callable[[Task], list[int]]  # a task's tokens


class SampledAnswers:
    """A workflow whose reward depends on the answer's tokens alone, and differs between answers."""

    def __init__(self, prompt: Prompt, config: GenerationHyperparameters) -> None:
        self.prompt = prompt
        self.sampling: dict[str, Any] = {k: vars(config)[k] for k in ("temperature", "top_p", "top_k", "min_p")}

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        return await asyncio.gather(*(self._member(engine, task, i) for i in range(GROUP_SIZE)))

    def close(self) -> None:
        """Nothing to end."""

    async def _member(self, engine: InferenceEngine, task: Task, member: int) -> Trajectory:
        prompt, name = self.prompt(task), f"{task.id}.{member}"
        request = GenerationRequest(name, prompt, MAX_NEW_TOKENS, group_id=task.id, **self.sampling)
        answer = await engine.agenerate(request)
        before, after = len(prompt), len(answer.token_ids)
        return Trajectory(
            task_id=task.id,
            member=member,
            tokens=[*prompt, *answer.token_ids],
            loss_mask=[False] * before + [True] * after,
            logprobs=[0.0] * before + answer.logprobs,
            versions=[-1] * before + answer.versions,
            reward=sum(answer.token_ids) % 7 / 7,
            finish_reason=answer.finish_reason,
        )


@contextmanager
def server(model: str, dtype: str) -> Iterator[str]:
    """A built-in server; yields its address. Raises ServerUnreachable with its last words."""
    words = ["--port", "0", "--dtype", dtype, "--max-running-requests", "8", "--context-length", "2048"]
    words += ["--deterministic"] if dtype == "float32" else []
    command = [sys.executable, "-m", "arealite.inference.serve", "--model", model, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = [""]
    try:
        with waiting("start of the built-in server", "server", START_LIMIT_S) as limit:
            while "listening on" not in lines[-1]:
                limit.check()
                lines.append(process.stdout.readline())
                if not lines[-1]:
                    raise ServerUnreachable(f"the built-in server ended at its start: {''.join(lines[-6:])}")
        yield lines[-1].strip().rpartition("//")[2]
    finally:
        process.kill()  # it is one process, and keeps nothing
        process.wait()
        process.stdout.close()


def check_rollouts(
    config: GRPOConfig, tasks: list[Task], prompt: Prompt, actor: FSDPPPOActor, tokenizer: PreTrainedTokenizerBase
) -> list[Finding]:
    """`actor` computes in float32 at learning rate 0. Findings: the steps, and the logprobs of both sides; then the
    rows and logprobs of sessions."""
    with server(actor.sharded.folder, "float32") as address:
        answers = SampledAnswers(prompt, config.gconfig)
        first, second = (_rollout(config, tasks, answers, address, asynchronous) for asynchronous in (False, True))
        sessions = _check_sessions(config, tasks, actor, tokenizer, address)
    return [*_check_steps(first, second, actor), *sessions]


def _check_sessions(
    config: GRPOConfig, tasks: list[Task], actor: FSDPPPOActor, tokenizer: PreTrainedTokenizerBase, address: str
) -> list[Finding]:
    if not tokenizer.chat_template:
        return [Finding("sessions", "rows of turns", "skipped", reason="the tokenizer has no chat template")]
    out = []
    for history in ("keep", "template"):
        workflow = WitnessedSessions(tokenizer, config.gconfig, history)
        batch = _rollout(config, tasks, workflow, address, asynchronous=False)
        out += [workflow.finding(), _mismatch(batch, actor.compute_logp(batch), actor, f"sessions, history {history}")]
    return out


def _check_steps(first: Batch, second: Batch, actor: FSDPPPOActor) -> list[Finding]:
    for batch in (first, second):
        if actor.needs_prox_logp or actor.config.kl_weight:
            batch.prox_logp = batch.ref_logp = actor.compute_logp(batch)
    check, compared = "asynchronous rollouts, eta = 0", "against synchronous ones: groups, and the step on them"
    if not np.array_equal(first.tokens, second.tokens) or first.task_ids != second.task_ids:
        return [Finding(check, compared, "FAIL", reason="the same prompts and seeds gave other answers")]
    reference = take_step(actor, first)
    if reference.grad_norm == 0:  # all answers of a group have the same reward
        return [Finding(check, compared, "FAIL", reason="the groups have no gradient to compare")]
    step = take_step(actor, second, reference)
    return [judge(check, compared, distances(step, reference), "float32"), _mismatch(first, reference.logp, actor)]


def check_mismatch(config: GRPOConfig, tasks: list[Task], prompt: Prompt, actor: FSDPPPOActor) -> Finding:
    """Logprobs of both sides alone, in the actor's type."""
    with server(actor.sharded.folder, actor.config.dtype) as address:
        batch = _rollout(config, tasks, SampledAnswers(prompt, config.gconfig), address, asynchronous=False)
    return _mismatch(batch, actor.compute_logp(batch), actor)


def _rollout(
    config: GRPOConfig, tasks: list[Task], workflow: RolloutWorkflow, address: str, asynchronous: bool
) -> Batch:
    """One step's groups, in the order of their tasks instead of that of their ends."""
    run = replace(config, train_dataset=replace(config.train_dataset, batch_size=NUM_GROUPS))
    rollout = replace(config.rollout, max_head_offpolicyness=0, consumer_batch_size=NUM_GROUPS)
    engine = RemoteNativeEngine(rollout, seed=config.seed)
    loader = StatefulDataLoader(tasks, run)
    try:
        engine.initialize(addresses=[address])
        if asynchronous:
            batch = engine.prepare_batch(loader, workflow)
        else:
            batch = engine.rollout_batch(list(islice(loader, NUM_GROUPS)), workflow)
    finally:
        engine.destroy()
    batch = batch.select(sorted(range(batch.num_sequences), key=lambda i: (batch.task_ids[i], i)))
    return replace(batch, group_ids=np.unique(batch.task_ids, return_inverse=True)[1])


def _mismatch(batch: Batch, logp: np.ndarray, actor: FSDPPPOActor, check: str = "trainer and server") -> Finding:
    mask = batch.loss_mask
    by_kernels = actor.mesh.device.type == "cpu" and cpu.load() is not None
    mean = float(np.abs(logp - batch.logprobs)[mask].mean())
    apart = {
        "logprobs": logprob_distance(np.where(mask, logp, 0), np.where(mask, batch.logprobs, 0)),
        MISMATCH if by_kernels else MISMATCH_WITHOUT_KERNELS: (mean, 0.0),
    }
    return judge(check, "logprobs of the sampled tokens, of trainer and server", apart, actor.config.dtype)
