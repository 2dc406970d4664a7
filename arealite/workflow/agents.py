"""Agents that know nothing of this package: each samples through the gateway, and its session is one trajectory.

Made by scripts with one of runners.py; run by the rollout head (and by evaluation/) for many tasks at the same time.
"""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import GatewayConfig, GenerationHyperparameters, InferenceEngineConfig
from arealite.api.errors import RewardError, WaitTimeout
from arealite.api.keys import Keys
from arealite.api.protocols import InferenceEngine
from arealite.api.types import Status, Task, Trajectory
from arealite.gateway.open_session import OpenSession
from arealite.gateway.server import Gateway
from arealite.gateway.session import OUTCOME, SessionState
from arealite.observe.reasons import last_line, reasons
from arealite.reward.pool import RewardFunction, RewardPool, Score
from arealite.rollout.episodes import all_members
from arealite.workflow.runners import AgentEnd, AgentFailed, AgentRunner, Assignment

CLOSE_LIMIT_S = 10.0


class AgentWorkflow:
    """A session per member of the group: an agent runs, its calls are turns, and its reward is what `reward_fn` says;
    without one what the agent left; without that what comes by the gateway's control call, which is waited for until
    the session is finished, or idle for `gateway.idle_timeout_s`.

    An agent that crashed, passed a limit or never called leaves a trajectory of status "failed". That is no zero: it is
    out of the group's baseline, and counted.

    Args:
        runner: how agents are run.
        gconfig: sampling; `n_samples` is the group size. What agents ask for is recorded, not done.
        tokenizer: the policy's, with its chat template.
        gateway: where agents find the model, and their limits. Each workflow has a gateway of its own, so that with a
            fixed port one has to serve for held-out tasks as well.
        reward_fn: as that of RLVRWorkflow, called with the task's text and the session's last answer, and by name also
            with `trace`, all that was recorded of the session, and `workspace`, the path of the agent's folder or None.
        config: number of reward workers and their time limit; the defaults if not given.
        turn_discount: of a reward for each turn between it and an earlier one.
    """

    def __init__(
        self,
        runner: AgentRunner,
        gconfig: GenerationHyperparameters,
        tokenizer: PreTrainedTokenizerBase,
        *,
        gateway: GatewayConfig | None = None,
        reward_fn: RewardFunction | None = None,
        config: InferenceEngineConfig | None = None,
        turn_discount: float = 1.0,
    ) -> None:
        c = config or InferenceEngineConfig()
        self.runner, self.gconfig, self.tokenizer, self.turn_discount = runner, gconfig, tokenizer, turn_discount
        self.config = gateway or GatewayConfig()
        self.pool = None
        if reward_fn is not None:
            self.pool = RewardPool(reward_fn, c.num_reward_workers, c.reward_timeout_s, c.reward_retries)
        self._places = asyncio.Semaphore(self.config.max_sessions)
        self._gateway: asyncio.Task[Gateway] | None = None

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        """One trajectory per member; "failed" where the agent did, "reward_error" where its reward did.

        Raises:
            ConfigError: the reward function does not take what the task has, or the gateway's address cannot be used.
        """
        if self.pool is not None:
            self.pool.named_arguments(task.answer, {**task.extras, "trace": {}, "workspace": None})
        if self._gateway is None:
            self._gateway = asyncio.create_task(self._open(engine))
        gateway = await asyncio.shield(self._gateway)
        return await all_members(self.gconfig.n_samples, lambda i: self._run_member(gateway, task, i))

    def close(self) -> None:
        """End the gateway, what runs agents, and the reward workers."""
        if self._gateway is not None:
            loop, is_open = self._gateway.get_loop(), self._gateway.done() and not self._gateway.cancelled()
            # Without a running loop the rollout head has ended it, and the sockets with it.
            if loop.is_running() and is_open and self._gateway.exception() is None:
                ended = asyncio.run_coroutine_threadsafe(self._gateway.result().close(), loop)
                with suppress(TimeoutError, CancelledError):
                    ended.result(CLOSE_LIMIT_S)
        self.runner.close()
        if self.pool is not None:
            self.pool.close()

    async def _open(self, engine: InferenceEngine) -> Gateway:
        keys, life = Keys.from_env(), f"-{secrets.token_hex(3)}"
        gateway = Gateway(engine, self.tokenizer, self.config, self.gconfig, admin_key=keys.admin, life=life)
        await gateway.start()
        return gateway

    def new_session(self, gateway: Gateway, task: Task, member: int) -> OpenSession:
        """The session of one member. Recordings override it, to give it a script."""
        return gateway.new_session(f"{task.id}.{member}")

    async def _run_member(self, gateway: Gateway, task: Task, member: int) -> Trajectory:
        async with self._places:
            session = self.new_session(gateway, task, member)
            state: SessionState = "aborted"
            status: Status = "failed"
            error, score = "its episode was given up", None  # if it is cancelled
            try:
                status, error, score = await self._outcome(gateway.model, session, task)
                state = "failed" if status == "failed" else "finished"
            finally:
                session.finish(state, error)
        outcome = None if score is None else score.reward
        trajectory = session.trajectory(task, member, outcome, self.turn_discount)
        if score is None:
            return replace(trajectory, status=status, error=error)
        return replace(trajectory, reward_parts={**trajectory.reward_parts, **score.parts})

    async def _outcome(self, model: str, session: OpenSession, task: Task) -> tuple[Status, str, Score | None]:
        """Status and error of the trajectory, and what it is worth."""
        limit_s = self.config.session_timeout_s
        assignment = Assignment(task, session.base_url, session.key, model, session.id, limit_s)
        try:
            async with self.runner.run(assignment) as end:
                return "ok", "", await self._score(session, task, end, assignment.prompt)
        except AgentFailed as error:
            reasons.count("failed agents", last_line(str(error)))
            return "failed", str(error), None
        except RewardError as error:
            return "reward_error", str(error), None

    async def _score(self, session: OpenSession, task: Task, end: AgentEnd, prompt: str) -> Score:
        """Raises AgentFailed, RewardError."""
        if end.score is None and self.pool is None:
            with suppress(WaitTimeout):
                await session.wait_finished(self.config.session_timeout_s, self.config.idle_timeout_s)
            if session.state == "failed":
                raise AgentFailed(session.error)
        sampled = [turn for turn in session.turns.values() if turn.completion is not None]
        if not sampled:
            raise AgentFailed("the agent ended without an answer of the model")
        if self.pool is not None:
            extras = {**task.extras, "trace": session.trace()}
            extras["workspace"] = None if end.workspace is None else str(end.workspace)
            return await self.pool.score(prompt, sampled[-1].answer.text, [], sampled[-1].sampled, task.answer, extras)
        if end.score is not None:
            return end.score
        if OUTCOME not in session.rewards:
            raise RewardError(
                f"no reward came by POST /sessions/{session.id}/reward before the session was finished, or idle for"
                f" {self.config.idle_timeout_s:g} s (gateway.idle_timeout_s)"
            )
        return Score(session.rewards[OUTCOME])
