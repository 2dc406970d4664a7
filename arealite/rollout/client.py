"""The public client: one object over all inference servers, and the rollout head on trainer rank 0.

Scripts create RemoteNativeEngine, RemoteSGLangEngine or RemotevLLMEngine; workflows get it as their `engine`. The work
is done in the connection's loop by generate.py (requests), fleet.py (control) and executor.py (tasks in flight).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import ArealiteError, ConfigError, WorkflowError
from arealite.api.protocols import Adaptive, Collective, DataSource, OnTokens, RolloutWorkflow, WeightSender
from arealite.api.types import Batch, Completion, GenerationRequest, Group, Task, WeightUpdateMeta
from arealite.observe import stop, waits
from arealite.observe.loop_thread import CALL_LIMIT_S, STOP_LIMIT_S, LoopThread
from arealite.observe.run_folder import RUN_DIR_VARIABLE, RunFolder
from arealite.rollout.backends.protocol import Backend
from arealite.rollout.backends.sglang import NativeBackend, SGLangBackend
from arealite.rollout.backends.vllm import VLLMBackend
from arealite.rollout.counters import Counters
from arealite.rollout.episodes import run_alone
from arealite.rollout.executor import Filter, RolloutExecutor
from arealite.rollout.fleet import Fleet
from arealite.rollout.generate import Generator
from arealite.rollout.ledger import Ledger
from arealite.rollout.membership import Watch
from arealite.rollout.router import Limits, Router, addresses_of
from arealite.rollout.share import Beat, from_head, split_batch
from arealite.rollout.staleness import StalenessBound

ADDRESSES_VARIABLE = "AREAL_LLM_SERVER_ADDRS"
DEFAULT_BATCH_SIZE = 64  # groups; of a client that only evaluates, where it limits how many run at a time


class RemoteInferenceEngine:
    """Implements api.protocols.InferenceEngine over HTTP.

    In a distributed run all ranks make the same calls, and rank 0 does the work: it alone talks to the servers. On the
    other ranks `prepare_batch` and `rollout_batch` receive shares, and control calls return at once.

    Args:
        config: rollout settings.
        seed: of sampling; each request's seed depends on it and on the request's name only.
        ledger_path: file of the ledger; the run folder's when the launcher set one, else none is kept.
        limits: times that no run needs to change.
    """

    backend: ClassVar[type[Backend]]  # the servers' wire format

    def __init__(
        self,
        config: InferenceEngineConfig,
        seed: int = 1,
        ledger_path: Path | None = None,
        limits: Limits | None = None,
    ) -> None:
        run_dir = os.environ.get(RUN_DIR_VARIABLE)
        folder = RunFolder(Path(run_dir)) if run_dir else None
        self.config, self.seed, self.limits = config, seed, limits or Limits()
        self.ledger_path = ledger_path or (folder.ledger if folder else None)
        self.folder = folder
        self.last_groups: list[Group] = []
        self._collective: Collective | None = None
        self._version = 0
        self._connection: Connection | None = None

    def initialize(self, collective: Collective | None = None, addresses: list[str] | None = None) -> None:
        """Find the servers (argument, else AREAL_LLM_SERVER_ADDRS) and wait for their health. Only rank 0 connects.

        Raises:
            ConfigError: no address was given, or one that cannot be used.
            ServerUnreachable: a server is not healthy after `setup_timeout_s`.
        """
        waits.configure_from_env()
        self._collective = collective
        if not self.is_head:
            return
        servers = addresses_of(addresses or os.environ.get(ADDRESSES_VARIABLE, "").split(","))
        if not servers:
            raise ConfigError(
                f"no inference server is known: start the script with `arealite run`, or set {ADDRESSES_VARIABLE} to"
                " host:port,host:port"
            )
        connection = Connection(self)
        try:
            limit_s = self.config.setup_timeout_s + CALL_LIMIT_S
            connection.run(connection.watch.start(servers), "rollout.servers_healthy", limit_s)
        except BaseException:  # also on Ctrl-C: the thread and its sockets must not outlive a failed start
            connection.close()
            raise
        self._connection = connection

    def add_server(self, address: str) -> None:
        """One more server (host:port), used as soon as it is healthy and holds the current weights. Rank 0 only."""
        self._live.call(lambda: self._live.watch.add(addresses_of([address])[0]), "rollout.add_server")

    def destroy(self) -> None:
        """Cancel what runs, note in the ledger what was not trained, resume what is paused, and close all connections.
        May be called again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @property
    def is_head(self) -> bool:
        """Whether this process is the rollout head: trainer rank 0, or a client on its own."""
        return self._collective is None or self._collective.rank == 0

    @property
    def loop(self) -> LoopThread:
        """Where `agenerate` can be awaited. Rank 0 only."""
        return self._live

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt and its answer that each server takes; None: none says. In the client's own loop."""
        return min((s.context_length for s in self._live.router.servers if s.context_length), default=None)

    async def agenerate(self, request: GenerationRequest, on_tokens: OnTokens | None = None) -> Completion:
        """Sample one sequence; awaited by workflows, in the client's own loop. Errors: see generate.py.

        With LoRA training, requests that name no adapter are for the one that is trained."""
        if request.lora is None:
            request = replace(request, lora=self._live.fleet.adapter)
        return await self._live.generator.generate(request, on_tokens)

    def sample(self, requests: list[GenerationRequest]) -> list[Completion]:
        """Sample now, outside of staleness and ledger; in the order of the requests. Rank 0 only."""
        return self._live.run_all(map(self.agenerate, requests), "rollout.sample")

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Logprobs (temperature 1) of each sequence's own tokens; the first is 0."""
        live = self._live
        return live.run(live.generator.score(sequences, live.fleet.adapter), "rollout.score")

    def load_adapter(self, name: str, path: str) -> None:
        """All servers load the LoRA adapter in folder `path` (PEFT's format); requests then choose it by `name`.
        Raises RequestError when a server refused it."""
        if self.is_head:
            self._live.run(self._live.fleet.set_adapter(name, path), "rollout.load_adapter")

    def unload_adapter(self, name: str) -> None:
        """Raises RequestError when a server has no adapter of this name."""
        if self.is_head:
            self._live.run(self._live.fleet.set_adapter(name, None), "rollout.unload_adapter")

    # -- groups --------------------------------------------------------------------------------------------------

    def prepare_batch(
        self, dataloader: DataSource, workflow: RolloutWorkflow, should_accept: Filter | None = None
    ) -> Batch:
        """Collective: the next `consumer_batch_size` groups under the staleness bound; this rank's share of them.

        Tasks are drawn in the calling thread, and only here, so that the data position does not move between calls.
        An error of the head is raised on all ranks; so is RunStopped, when a stop is asked for while they wait.
        """
        return self._share(lambda beat: self._next_groups(dataloader, workflow, should_accept, beat))

    def rollout_batch(self, tasks: list[Task], workflow: RolloutWorkflow) -> Batch:
        """Collective: run exactly rank 0's `tasks` with the current weights; this rank's share of the groups that
        succeeded."""

        def groups(beat: Beat) -> list[Group]:
            return self._live.run(self._executor.run_all(tasks, workflow), "rollout.batch", beat=beat)

        return self._share(groups)

    def run_groups(self, tasks: list[Task], workflow: RolloutWorkflow, beat: Beat = lambda: None) -> list[Group]:
        """One group per task, in order, outside staleness and ledger (evaluation). A task that failed has one
        trajectory of status "failed" with the error. Rank 0 only; `beat` is called again and again meanwhile."""
        live = self._live
        slots = asyncio.Semaphore(live.executor.bound.max_concurrent)

        async def one(ordinal: int, task: Task) -> Group:
            async with slots:
                group = await run_alone(self, ordinal, task, workflow, self.config.workflow_retries)
            live.counters.num_events += 1
            return group

        return live.run_all(itertools.starmap(one, enumerate(tasks)), "rollout.groups", beat)

    def submit(self, task: Task, workflow: RolloutWorkflow) -> None:
        """Put one task in flight, under the staleness bound. Rank 0 only."""
        self._live.call(lambda: self._executor.submit([task], workflow), "rollout.submit")

    def wait(self, num_groups: int, timeout_s: float | None = None) -> list[Group]:
        """The next finished groups of submitted tasks. Rank 0 only. Raises WaitTimeout: fewer were finished after
        `timeout_s`; none is lost by that."""
        return self._live.run(self._executor.next_step(num_groups), "rollout.wait", timeout_s) or []

    def mark_trained(self, step: int, untrained: Mapping[str, str] | None = None) -> None:
        """Note in the ledger that the batch taken last was trained on in `step` (from 0), but for `untrained` tasks,
        {id: reason}: the actor's `untrained` after its update."""
        if self.is_head:
            self._live.call(lambda: self._executor.mark_trained(step, untrained), "rollout.mark_trained")

    # -- weights -------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop generation on all servers and hold new requests; running ones keep their tokens. Twice is once."""
        if self.is_head:
            self._live.run(self._live.fleet.pause(), "rollout.pause")

    def resume(self) -> None:
        """Go on where `pause` stopped."""
        if self.is_head:
            self._live.run(self._live.resume(), "rollout.resume")

    def prepare_update(self) -> None:
        """The trainer is about to write new weights where the last ones are: no server is sent those any more, until
        `update_weights` or `resume`. `pause` does the same."""
        if self.is_head:
            self._live.run(self._live.fleet.prepare_update(), "rollout.prepare_update")

    def update_weights(self, meta: WeightUpdateMeta, send: WeightSender | None = None) -> dict[str, dict[str, int]]:
        """All servers load `meta`; then its version is the current one. Returns {server id: {tensor: CRC-32 of the
        live parameter}} of the servers that can tell (SGLang cannot). Generation is paused no longer than it has to be;
        if it is paused already, it stays so. `send`: the weight link, where servers cannot read `meta` by themselves.

        Raises:
            WeightSyncError: names the server that did not take the weights, and what it said.
        """
        if not self.is_head:
            self.set_version(meta.version)
            return {}
        live = self._live

        async def update() -> dict[str, dict[str, int]]:
            was_open = live.gate.is_open
            live.generator.announced_version = max(live.generator.announced_version, meta.version)
            try:
                receipts = await live.fleet.update_weights(meta, send)
                self._apply_version(live, meta.version)
                return receipts
            finally:
                if was_open and not live.gate.is_open:
                    await live.resume()

        receipts = live.run(update(), "rollout.update_weights")
        self._version = meta.version
        return receipts

    def get_version(self) -> int:
        return self._version

    def set_version(self, version: int) -> None:
        """The servers hold the weights of `version` now; makes room for new groups."""
        self._version = version
        if live := self._connection:
            live.call(lambda: self._apply_version(live, version), "rollout.set_version")

    def stats(self) -> dict[str, float]:
        """Counts and means since the last call, and the servers that take requests now (rank 0; empty elsewhere)."""
        if not self.is_head:
            return {}

        def drain() -> dict[str, float]:
            num_alive = sum(server.state in ("serving", "draining") for server in self._live.router.servers)
            return self._live.counters.drain() | {"num_servers_alive": float(num_alive)}

        return self._live.call(drain, "rollout.stats")

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for a recovery point: what is in flight, and finished groups that were not trained on."""
        return self._live.call(self._executor.state, "rollout.state") if self.is_head else {"version": self._version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, before the first batch. Unfinished tasks run again, under their old ordinals."""
        if self.is_head:
            self._live.call(lambda: self._executor.restore(state), "rollout.restore")
        self.set_version(state["version"])

    def _next_groups(
        self, source: DataSource, workflow: RolloutWorkflow, should_accept: Filter | None, beat: Beat
    ) -> list[Group]:
        def look() -> None:
            beat()
            stop.look()

        live, executor = self._live, self._executor

        async def step(tasks: list[Task], may_draw: bool) -> list[Group] | None:
            executor.submit(tasks, workflow, should_accept, source if isinstance(source, Adaptive) else None)
            return await executor.next_step(executor.bound.batch_size, may_draw)

        may_draw = True
        while True:
            num_wanted = live.call(executor.num_wanted, "rollout.num_wanted") if may_draw else 0
            tasks = list(itertools.islice(source, num_wanted))
            may_draw = may_draw and len(tasks) == num_wanted  # fewer: a finite source has ended
            groups = live.run(step(tasks, may_draw), "rollout.batch", beat=look)
            if groups is not None:
                return groups

    def _share(self, take: Callable[[Beat], list[Group]]) -> Batch:
        def shares(beat: Beat) -> list[Batch]:
            self.last_groups = take(beat)
            divisions = (1,) if self._collective is None else self._collective.divisions
            return [share for number in divisions for share in split_batch(self.last_groups, number)]

        batch: Batch = from_head(shares, self._collective, self.limits.beat_s)
        return batch

    def _apply_version(self, live: Connection, version: int) -> None:
        live.generator.version = version
        live.generator.announced_version = max(live.generator.announced_version, version)
        live.executor.set_version(version)

    @property
    def _executor(self) -> RolloutExecutor:
        if self.config.consumer_batch_size is None:
            raise ConfigError("rollout.consumer_batch_size is not set; it is the number of groups per step")
        return self._live.executor

    @property
    def _live(self) -> Connection:
        if self._connection is None:
            raise WorkflowError("the rollout engine is not connected: call initialize() first; only rank 0 connects")
        return self._connection


class Connection(LoopThread):
    """Everything that rank 0 has while it is connected to the servers, in the loop of one thread."""

    def __init__(self, engine: RemoteInferenceEngine) -> None:
        config, limits = engine.config, engine.limits
        size, eta = config.consumer_batch_size or DEFAULT_BATCH_SIZE, config.max_head_offpolicyness
        bound = StalenessBound(eta, size, config.max_concurrent_rollouts or (eta + 1) * size)
        self.counters = Counters()
        self.router = Router(self.counters, config.setup_timeout_s, limits)
        self.gate = self.router.gate
        self.fleet = Fleet(self.router, config)
        self.watch = Watch(self.fleet, engine.backend(), limits, engine.folder)
        self.generator = Generator(self.router, config, self.counters, limits, engine.seed)
        self.executor = RolloutExecutor(
            engine, bound, Ledger(engine.ledger_path), config, self.counters, lambda: not self.gate.is_open
        )
        # A request, its abort, and then rewards: the longest time without any event while nothing is wrong.
        grace_s = limits.abort_grace_s + config.reward_timeout_s
        silence_s = max(config.request_timeout_s, config.setup_timeout_s) + 2 * grace_s
        super().__init__("rollout", silence_s, self._look_around, lambda: self.counters.num_events)

    async def resume(self) -> None:
        """Let servers and episodes go on, after a pause by whomever."""
        await self.fleet.resume()
        self.executor.pump()

    def close(self) -> None:
        """Cancel what runs, note in the ledger what was not trained, let no server stay paused, and close all
        connections."""

        async def end() -> None:
            await self.executor.close("the run ended")
            others = asyncio.all_tasks() - {asyncio.current_task()} - self.generator.aborts
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if not self.gate.is_open or any(s.state == "updating" for s in self.router.servers):
                with suppress(ArealiteError, TimeoutError):  # who cannot be reached now is started anew, or is gone
                    await asyncio.wait_for(self.fleet.resume(), STOP_LIMIT_S)
            await self.generator.close()
            await self.router.transport.close()

        self.stop(end(), "rollout.close")

    def _look_around(self) -> tuple[str, list[str]]:
        """Who has to act next, and what is waited for: servers, groups, then requests without an answer for longest."""
        owner = self.fleet.owner() or self.generator.owner()
        return owner, [*self.fleet.pending(), *self.executor.pending(), *self.generator.pending()]


class RemoteNativeEngine(RemoteInferenceEngine):
    """Client of built-in servers (`arealite serve`)."""

    backend = NativeBackend


class RemoteSGLangEngine(RemoteInferenceEngine):
    """Client of SGLang servers."""

    backend = SGLangBackend


class RemotevLLMEngine(RemoteInferenceEngine):
    """Client of vLLM servers."""

    backend = VLLMBackend


ENGINES = {engine.backend.name: engine for engine in (RemoteNativeEngine, RemoteSGLangEngine, RemotevLLMEngine)}
