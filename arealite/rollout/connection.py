"""Everything that rank 0 has while it is connected to the servers: made by client.py's initialize, ended by destroy."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.engine import InferenceEngine
from arealite.api.errors import ConfigError
from arealite.rollout.counters import Counters
from arealite.rollout.executor import RolloutExecutor
from arealite.rollout.fleet import Fleet
from arealite.rollout.generate import ABORT_GRACE_S, Generator
from arealite.rollout.ledger import Ledger
from arealite.rollout.loop import LoopThread
from arealite.rollout.router import Router
from arealite.rollout.sglang import Backend
from arealite.rollout.staleness import StalenessManager
from arealite.rollout.transport import Server, Transport

DEFAULT_CONCURRENT_GROUPS = 64  # when neither max_concurrent_rollouts nor consumer_batch_size is given
CLOSE_LIMIT_S = 60.0

T = TypeVar("T")


class Connection:
    """The loop thread and what lives in it. Only `run`, `call` and `pending` may be used from other threads.

    Raises:
        ServerUnreachable: a server is not healthy after `setup_timeout_s`.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        servers: list[Server],
        backend: Backend,
        config: InferenceEngineConfig,
        seed: int,
        ledger_path: Path | None,
    ) -> None:
        self.config = config
        self.counters = Counters()
        self.loop = LoopThread("rollout")
        self._executor: RolloutExecutor | None = None

        def connect() -> None:
            self.transport = Transport()
            self.fleet = Fleet(servers, backend, self.transport, config)
            self.generator = Generator(backend, self.transport, Router(servers), config, self.counters, seed)
            if config.consumer_batch_size is not None:
                staleness = StalenessManager(
                    config.max_head_offpolicyness, config.consumer_batch_size, self.max_concurrent
                )
                self._executor = RolloutExecutor(engine, staleness, Ledger(ledger_path), config, self.counters)

        self.loop.call(connect, "rollout.connect")
        try:
            limit_s = config.setup_timeout_s + 60.0
            self.loop.run(
                self.fleet.wait_healthy(), "rollout.servers_healthy", limit_s, self.fleet.pending, self.fleet.owner
            )
        except BaseException:  # also on Ctrl-C: the thread and its sockets must not outlive a failed start
            self.close()
            raise

    @property
    def executor(self) -> RolloutExecutor:
        if self._executor is None:
            raise ConfigError("rollout.consumer_batch_size is not set; it is the number of groups per step")
        return self._executor

    @property
    def has_executor(self) -> bool:
        return self._executor is not None

    @property
    def max_concurrent(self) -> int:
        """Groups running at one time."""
        size = self.config.consumer_batch_size
        planned = DEFAULT_CONCURRENT_GROUPS if size is None else (self.config.max_head_offpolicyness + 1) * size
        return self.config.max_concurrent_rollouts or planned

    def run(self, work: Coroutine[Any, Any, T], name: str, limit_s: float | None = None) -> T:
        """Run in the loop. Without a limit: as long as answers or finished groups come in."""
        if limit_s is not None:
            return self.loop.run(work, name, limit_s, self.pending, self.generator.owner)
        config = self.config
        limit_s = max(config.request_timeout_s, config.setup_timeout_s) + 2 * (ABORT_GRACE_S + config.reward_timeout_s)
        return self.loop.run(work, name, limit_s, self.pending, self.generator.owner, self._num_events)

    def call(self, function: Callable[[], T], name: str) -> T:
        """Run a plain function in the loop."""
        return self.loop.call(function, name)

    def pending(self) -> list[str]:
        """What is being waited for, for stall reports: groups, then requests without an answer for longest."""
        groups = [] if self._executor is None else self._executor.pending()
        return [*groups, *self.generator.pending()]

    def close(self) -> None:
        """Cancel what runs, note in the ledger what was not trained, and close all connections."""

        async def end() -> None:
            if self._executor is not None:
                await self._executor.close("the run ended")
                self._executor.ledger.close()
            await self.transport.close()

        self.loop.run(end(), "rollout.close", CLOSE_LIMIT_S, list, self.generator.owner)
        self.loop.stop()

    def _num_events(self) -> int:
        return self.generator.num_events + (0 if self._executor is None else self._executor.num_events)
