"""Everything that rank 0 has while it is connected to the servers: made by client.py's initialize, ended by destroy.

All of it lives in one asyncio loop in a thread of its own; other threads use `run` and `call`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import ArealiteError, WaitTimeout, WorkflowError
from arealite.api.protocols import InferenceEngine
from arealite.observe.waits import waiting
from arealite.rollout.backends.protocol import Backend
from arealite.rollout.counters import Counters
from arealite.rollout.executor import RolloutExecutor
from arealite.rollout.fleet import Fleet
from arealite.rollout.generate import Generator
from arealite.rollout.ledger import Ledger
from arealite.rollout.membership import Watch
from arealite.rollout.router import Limits, Router
from arealite.rollout.staleness import StalenessBound
from arealite.rollout.transport import Address, Transport

DEFAULT_BATCH_SIZE = 64  # groups; of a client that only evaluates, where it limits how many run at a time
CALL_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
CHECK_S = 0.2  # how often a waiting caller looks at its limit

T = TypeVar("T")


class Connection:
    """The loop thread and what lives in it.

    Consumes: coroutines of other threads. Produces: their results. Waits for: the next event of the loop.
    Unblocked by: `run`, `call`, sockets and timers; ends with `close`.

    Raises:
        ServerUnreachable: a server is not healthy after `setup_timeout_s`.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        addresses: list[Address],
        backend: Backend,
        config: InferenceEngineConfig,
        seed: int,
        ledger_path: Path | None,
        servers_file: Path | None,
        limits: Limits,
    ) -> None:
        size, eta = config.consumer_batch_size or DEFAULT_BATCH_SIZE, config.max_head_offpolicyness
        bound = StalenessBound(eta, size, config.max_concurrent_rollouts or (eta + 1) * size)
        self.counters, self.transport = Counters(), Transport()
        self.router = Router(self.counters, config.setup_timeout_s, limits)
        self.gate = self.router.gate
        self.fleet = Fleet(self.router, self.transport, config)
        self.watch = Watch(self.fleet, backend, limits, servers_file)
        self.generator = Generator(self.transport, self.router, config, self.counters, limits, seed)
        self.executor = RolloutExecutor(
            engine, bound, Ledger(ledger_path), config, self.counters, lambda: not self.gate.is_open
        )
        # A request, its abort, and then rewards: the longest time without any event while nothing is wrong.
        grace_s = limits.abort_grace_s + config.reward_timeout_s
        self._silence_s = max(config.request_timeout_s, config.setup_timeout_s) + 2 * grace_s
        self._owner, self._pending = "servers", [""]  # as of the last look, for other threads
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()
        try:
            setup_limit_s = config.setup_timeout_s + CALL_LIMIT_S
            self.run(self.watch.start(addresses), "rollout.servers_healthy", setup_limit_s)
        except BaseException:  # also on Ctrl-C: the thread and its sockets must not outlive a failed start
            self.close()
            raise

    def run(
        self,
        work: Coroutine[Any, Any, T],
        name: str,
        limit_s: float | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> T:
        """The coroutine's result, waited for under `name`, at most `limit_s`; without a limit as long as answers or
        groups come in. `beat` is called several times a second meanwhile.

        Raises:
            WaitTimeout: the limit passed; the work is cancelled.
            WorkflowError: `close` has ended the work.
        """
        assert threading.current_thread() is not self._thread, f"{name} would wait for the loop inside the loop"
        started: list[asyncio.Task[T]] = []
        ended = threading.Event()

        def start() -> None:
            started.append(self._loop.create_task(work))
            started[0].add_done_callback(lambda _: ended.set())

        self._loop.call_soon_threadsafe(start)
        try:
            self._wait(ended, name, limit_s, beat)
        except BaseException as error:  # also on Ctrl-C: the work must not go on without its caller
            self._loop.call_soon_threadsafe(lambda: started[0].cancel())
            # What ends at the last moment has had its effects (groups are taken): its result must not get lost.
            timed_out = isinstance(error, WaitTimeout) and ended.wait(STOP_LIMIT_S)
            if not timed_out or started[0].cancelled():
                raise
        if started[0].cancelled():
            raise WorkflowError(f"{name} was given up: the run ended")
        return started[0].result()

    def call(self, function: Callable[[], T], name: str) -> T:
        """Run a plain function in the loop, so that it sees and changes state as the loop does."""

        async def work() -> T:
            return function()

        return self.run(work(), name, CALL_LIMIT_S)

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
            if not self.gate.is_open:
                with suppress(ArealiteError, TimeoutError):  # who cannot be reached now is started anew, or is gone
                    await asyncio.wait_for(self.fleet.resume(), STOP_LIMIT_S)
            await self.generator.close()
            await self.transport.close()

        try:
            self.run(end(), "rollout.close", CALL_LIMIT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_LIMIT_S)
        self._loop.close()

    def _look(self) -> None:
        """In the loop: who has to act next, and what is waited for: servers, groups, then requests without an answer
        for longest."""
        self._owner = self.fleet.owner() or self.generator.owner()
        self._pending = [*self.fleet.pending(), *self.executor.pending(), *self.generator.pending()]

    def _wait(self, ended: threading.Event, name: str, limit_s: float | None, beat: Callable[[], None]) -> None:
        while True:
            before = self.counters.num_events
            silence_s = self._silence_s if limit_s is None else limit_s
            with waiting(name, self._owner, silence_s, lambda: self._pending) as wait:
                while limit_s is not None or self.counters.num_events == before:
                    self._loop.call_soon_threadsafe(self._look)
                    if ended.wait(CHECK_S):
                        return
                    if not self._thread.is_alive():
                        raise ArealiteError(f"the loop thread has ended while {name} was waited for")
                    wait.owner = self._owner
                    beat()
                    wait.check()
