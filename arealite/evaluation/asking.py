"""Asks a model the problems of an evaluation, and keeps each graded answer as it comes. Called by eval_command.py.

The model is served by a built-in server of our own, or is behind a URL. Each answer is an episode of its own with a
seed that depends on its problem and its number alone: what a killed evaluation has not got, the next one asks for, and
nothing else.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ArealiteError, ConfigError, ServerUnreachable
from arealite.api.keys import API_KEY_VARIABLE, Keys
from arealite.api.protocols import InferenceEngine, RolloutWorkflow
from arealite.api.types import Dims, Task, Trajectory
from arealite.evaluation.sheet import AnswerSheet, GradedAnswer, Problem
from arealite.launcher.allocation import Component
from arealite.launcher.child import Child, OwnNode
from arealite.launcher.keeper import answers
from arealite.launcher.machine import VISIBLE_GPUS, Machine
from arealite.launcher.placement import share_cores
from arealite.launcher.plan import COMMON_ENV, LOOPBACK, ProcessPlan, server_command
from arealite.observe.progress import format_span, show
from arealite.observe.reasons import last_line
from arealite.observe.records import version_spans
from arealite.observe.run_folder import RunFolder
from arealite.observe.waits import waiting
from arealite.rollout.client import RemoteInferenceEngine, RemoteNativeEngine, RemotevLLMEngine

PROBE_LIMIT_S = 2.0
PROBE_S = 0.1
DESCRIBE_LIMIT_S = 30.0
TELL_S = 10.0  # how often progress is told


@dataclass(frozen=True)
class RemoteModel:
    """What a running server says of itself. `tokenizer` is "" where it does not say."""

    url: str
    model: str
    tokenizer: str
    weights: str
    client: type[RemoteInferenceEngine]


def describe_server(url: str) -> RemoteModel:
    """Raises ConfigError: nothing at the URL that rollouts can use."""
    told: dict[str, Any] = {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the client, which asks no proxy
    for path in ("/version", "/model_info", "/get_model_info", "/v1/models"):
        try:
            request = urllib.request.Request(f"{url}{path}", headers=Keys.from_env().headers(is_control=False))
            with opener.open(request, timeout=DESCRIBE_LIMIT_S) as answer:
                told[path] = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 401:
                raise ConfigError(f"{url} wants a key: set {API_KEY_VARIABLE} to the one that it has") from error
            continue  # there is a server, which does not know this path
        except (OSError, ValueError) as error:
            raise ConfigError(f"{url}{path} does not answer as an inference server does: {error}") from error
    facts = told.get("/model_info") or told.get("/get_model_info") or {}
    if not facts and "/version" not in told:
        raise ConfigError(
            f"{url} is neither the built-in server nor SGLang or vLLM: it answers {', '.join(told) or 'nothing'}"
        )
    served = (told.get("/v1/models", {}).get("data") or [{}])[0]
    model = facts.get("model_path") or served.get("root") or served.get("id") or url
    client = RemoteNativeEngine if facts else RemotevLLMEngine
    return RemoteModel(url, model, facts.get("tokenizer_path") or model, str(facts.get("weight_version", "")), client)


class AskedModel:
    """One model and its sheet. What `ask` starts, `close` ends.

    Args:
        workflow: answers one task with one trajectory.
        remote: the running server; None: one of our own is started on `folder` when there is something to ask.
        slot: which of `num_servers` that run side by side it is, for cores and devices.
    """

    def __init__(
        self,
        sheet: AnswerSheet,
        config: GRPOConfig,
        workflow: RolloutWorkflow,
        folder: str,
        remote: RemoteModel | None,
        slot: int = 0,
        num_servers: int = 1,
    ) -> None:
        self.sheet, self._config, self._workflow, self._folder, self._remote = sheet, config, workflow, folder, remote
        self._slot, self._num_servers = slot, num_servers
        self._server: Child | None = None
        self._rollout: RemoteInferenceEngine | None = None

    @property
    def num_samples(self) -> int:
        """Answers per problem, as configured."""
        return self._config.eval_gconfig.n_samples

    def ask(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Get the answers (problem's id, sample) that the sheet lacks; those that fail are told.

        Raises:
            ArealiteError: no answer at all could be had; ServerUnreachable: the server has ended.
        """
        problems, known = {problem.task.id: problem for problem in self.sheet.problems}, self.sheet.answers
        asked = [(problems[name], sample) for name, sample in wanted if sample not in known[name]]
        if not asked:
            return
        rollout = self._rollout or self._open()
        tasks = {f"{problem.task.id}.{sample}": (problem, sample) for problem, sample in asked}
        before, start, told = self.sheet.num_answers, time.monotonic(), time.monotonic()

        def beat() -> None:
            nonlocal told
            if self._server is not None and self._server.exit_code is not None:
                raise ServerUnreachable(self._server.obituary())
            if time.monotonic() - told >= TELL_S:
                told = time.monotonic()
                num_new = self.sheet.num_answers - before
                left_s = (len(tasks) - num_new) * (told - start) / max(num_new, 1)
                pace = f"  {num_new / (told - start):.1f}/s  {format_span(left_s)} left" if num_new else ""
                show(Text(f"{self.sheet.name}: {num_new} of {len(tasks)} answers{pace}"))

        groups = rollout.run_groups(
            [replace(problem.task, id=name) for name, (problem, _) in tasks.items()],
            Recording(self._workflow, self.sheet, tasks),
            beat,
        )
        unanswered = {name for name, (problem, sample) in tasks.items() if sample not in known[problem.task.id]}
        failed = [group.trajectories[0] for group in groups if group.task.id in unanswered]
        if failed:
            first = last_line(failed[0].error)
            if len(failed) == len(tasks):
                raise ArealiteError(f"none of {len(tasks)} answers of {self.sheet.name} could be had: {first}")
            show(Text(f"{len(failed)} of {len(tasks)} answers failed, and are asked for again when the same command is"
                      f" given again; the first: {first}", style="yellow"))  # fmt: skip

    def close(self) -> None:
        """End the client, the reward workers, and the server if it is ours."""
        if self._rollout is not None:
            self._rollout.destroy()
        if self._server is not None:
            self._server.kill()
        self._rollout = self._server = None
        self._workflow.close()

    def _open(self) -> RemoteInferenceEngine:
        address = self._remote.url if self._remote else self._start_server()
        client = self._remote.client if self._remote else RemoteNativeEngine
        self._rollout = client(self._config.rollout, seed=self._config.seed)
        self._rollout.initialize(addresses=[address])
        return self._rollout

    def _start_server(self) -> str:
        """Raises ServerUnreachable: it ended, with its error; WaitTimeout."""
        config, run_folder = self._config, RunFolder(self.sheet.folder.absolute())
        machine = Machine.local(config.cluster)
        command = server_command(config, Component("native", Dims()), self._folder, machine)
        cores = share_cores(machine.cores, self._num_servers, 0, takes_turns=True)[self._slot]
        devices = machine.gpus[self._slot % len(machine.gpus) :][:1] if machine.gpus else ()
        env = COMMON_ENV | {"OMP_NUM_THREADS": str(len(cores)), VISIBLE_GPUS: ",".join(devices)}
        plan = ProcessPlan("server", self._slot, command, env | config.launcher.env, ready_path="/health")
        node = OwnNode(run_folder, machine)
        node.clean()  # of an evaluation that was killed
        self._server = server = node.start(plan, LOOPBACK, {})
        with waiting("start of the evaluation's server", server.name, config.rollout.setup_timeout_s) as wait:
            while not answers(LOOPBACK, server.port, plan.ready_path, PROBE_LIMIT_S):
                if server.exit_code is not None:
                    raise ServerUnreachable(server.obituary())
                wait.check()
                time.sleep(PROBE_S)
        return f"{LOOPBACK}:{server.port}"


class Recording:
    """A workflow around another, which keeps each graded answer before anybody waits for it. `tasks`: which answer an
    episode's task stands for."""

    def __init__(self, inner: RolloutWorkflow, sheet: AnswerSheet, tasks: dict[str, tuple[Problem, int]]) -> None:
        self._inner, self._sheet, self._tasks = inner, sheet, tasks

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        trajectories = await self._inner.arun_episode(engine, task)
        problem, sample = self._tasks[task.id]
        (t,) = trajectories
        if t.status in ("ok", "reward_error"):
            written = [token for token, is_own in zip(t.tokens, t.loss_mask, strict=True) if is_own]
            grade = (
                t.reward,
                t.reward_parts,
                last_line(t.error) if t.error else "",
                [version for version, _ in version_spans(t)],
            )
            self._sheet.add(GradedAnswer(problem.task.id, sample, t.completion_text, written, t.finish_reason, *grade))
        return trajectories

    def close(self) -> None:
        """The inner one is closed by its owner."""
