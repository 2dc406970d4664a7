"""An asyncio loop in a thread of its own, and how others wait for what it does: under a name and a limit.

LoopThread is the base of rollout/client.py's Connection; SideLoop runs coroutines that users wrote: `async def` rewards
(reward/pool.py) and agents (workflow/runners.py).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from arealite.api.errors import ArealiteError, WaitTimeout, WorkflowError
from arealite.observe.waits import bounded, waiting

CALL_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
CHECK_S = 0.2  # how often a waiting caller looks at its limit

T = TypeVar("T")


class LoopThread:
    """Consumes: coroutines of other threads. Produces: their results. Waits for: the next event of the loop. Unblocked
    by: `run`, `call`, sockets and timers; ends with `stop`.

    `look` is called in the loop while somebody waits: who has to act next, and lines about what is waited for.
    `num_events` tells how much has happened so far: a wait without a limit goes on as long as it grows, but for
    `silence_s`.
    """

    def __init__(
        self, name: str, silence_s: float, look: Callable[[], tuple[str, list[str]]], num_events: Callable[[], int]
    ) -> None:
        self._silence_s, self._look, self._num_events = silence_s, look, num_events
        self._owner, self._pending = "", list[str]()  # as of the last look, for other threads
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(
        self,
        work: Coroutine[Any, Any, T],
        name: str,
        limit_s: float | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> T:
        """The coroutine's result, waited for under `name`, at most `limit_s`; without a limit as long as something
        happens. `beat` is called several times a second meanwhile.

        Raises:
            WaitTimeout: the limit passed; the work is cancelled.
            WorkflowError: the work was cancelled by another.
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

    def run_all(
        self, works: Iterable[Coroutine[Any, Any, T]], name: str, beat: Callable[[], None] = lambda: None
    ) -> list[T]:
        """The results of coroutines that run at the same time, in order, or what the first that failed raised."""

        async def together() -> list[T]:
            return await asyncio.gather(*works)

        return self.run(together(), name, beat=beat)

    def call(self, function: Callable[[], T], name: str) -> T:
        """Run a plain function in the loop, so that it sees and changes state as the loop does."""

        async def work() -> T:
            return function()

        return self.run(work(), name, CALL_LIMIT_S)

    def stop(self, last_work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `last_work`, and end the thread in any case."""
        try:
            self.run(last_work, name, CALL_LIMIT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_LIMIT_S)
        self._loop.close()

    def _wait(self, ended: threading.Event, name: str, limit_s: float | None, beat: Callable[[], None]) -> None:
        def look() -> None:
            self._owner, self._pending = self._look()

        while True:
            before = self._num_events()
            silence_s = self._silence_s if limit_s is None else limit_s
            with waiting(name, self._owner, silence_s, lambda: self._pending) as wait:
                while limit_s is not None or self._num_events() == before:
                    self._loop.call_soon_threadsafe(look)
                    if ended.wait(CHECK_S):
                        return
                    if not self._thread.is_alive():
                        raise ArealiteError(f"the loop thread has ended while {name} was waited for")
                    wait.owner = self._owner
                    beat()
                    wait.check()


class LoopBlocked(WaitTimeout):
    """A coroutine neither ended nor could be cancelled: something blocks its loop."""


class SideLoop:
    """An event loop for coroutines that somebody else wrote, called from another loop: what blocks in one of them holds
    up its like, and not the caller. The thread starts when it is first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)

    async def run(self, work: Coroutine[Any, Any, T], name: str, limit_s: float) -> T:
        """The coroutine's result; it is cancelled when the caller is, or when the limit has passed.

        Raises:
            WaitTimeout: the limit passed.
            LoopBlocked: STOP_LIMIT_S later it had not even been cancelled.
        """
        if not self._thread.is_alive():
            self._thread.start()
        running = asyncio.run_coroutine_threadsafe(bounded(work, name, self.name, limit_s), self._loop)
        try:
            async with asyncio.timeout(limit_s + STOP_LIMIT_S) as patience:
                return await asyncio.wrap_future(running)
        except TimeoutError:
            if not patience.expired():
                raise
            raise LoopBlocked(f"{self.name} does not turn: one of its coroutines blocks it") from None

    def close(self) -> None:
        """Cancel what runs, and end the thread. May be called again, from any thread."""
        self.is_closed = True
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._end()))
            self._thread.join(STOP_LIMIT_S)  # a call that blocks the loop may go on: the thread is a daemon
        if not self._loop.is_running():
            self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop.stop()
