"""The client's asyncio loop in a thread of its own, and how other threads run things in it. Used by client.py."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from arealite.api.errors import ArealiteError
from arealite.observe.waits import waiting

CHECK_S = 0.2  # how often a waiting caller looks at its limit
STOP_LIMIT_S = 10.0

T = TypeVar("T")


class LoopThread:
    """Consumes: coroutines of other threads. Produces: their results. Waits for: the next event of the loop.
    Unblocked by: `run`, `call`, sockets and timers; ends with `stop`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(
        self,
        work: Coroutine[Any, Any, T],
        name: str,
        limit_s: float,
        pending: Callable[[], list[str]],
        owner: Callable[[], str],
        num_events: Callable[[], int] = lambda: 0,
    ) -> T:
        """The coroutine's result, waited for under `name`. `owner()` says who has to act now; `limit_s` counts from the
        last change of `num_events()`.

        Raises:
            WaitTimeout: nothing happened for `limit_s`.
        """
        assert threading.current_thread() is not self._thread, f"{name} would wait for the loop inside the loop"
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                with waiting(name, owner(), limit_s, pending) as wait:
                    before = num_events()
                    while num_events() == before:
                        try:
                            return future.result(timeout=CHECK_S)
                        except concurrent.futures.TimeoutError:
                            if future.done():
                                raise  # the coroutine's own
                        self._check_alive(name)
                        wait.owner = owner()
                        wait.check()
        finally:
            future.cancel()

    def call(self, function: Callable[[], T], name: str, limit_s: float = 60.0) -> T:
        """Run a plain function in the loop, so that it sees and changes state as the loop does."""

        async def work() -> T:
            return function()

        return self.run(work(), name, limit_s, list, lambda: self._thread.name)

    def stop(self) -> None:
        """Cancel everything that runs in the loop and end the thread."""
        if not self._thread.is_alive():
            return

        async def cancel_all() -> None:
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(timeout=STOP_LIMIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=STOP_LIMIT_S)
        self._loop.close()

    def _check_alive(self, name: str) -> None:
        if not self._thread.is_alive():
            raise ArealiteError(f"the loop thread {self._thread.name} has ended while {name} was waited for")
