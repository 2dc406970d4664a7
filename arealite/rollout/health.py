"""What is known of each server: whether it may get requests (its circuit breaker), its load, and what it was asked.

Kept by watch.py, used by router.py, generate.py and fleet.py; everything runs in the client's asyncio loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from arealite.api.types import WeightUpdateMeta
from arealite.rollout.backend import Backend
from arealite.rollout.transport import ConnectionLost, Server

FIRST_BACKOFF_S = 0.1  # doubled after each failure in a row
MAX_BACKOFF_S = 5.0

T = TypeVar("T")


def backoff_s(num_failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (num_failures - 1))


class Breaker:
    """Whether requests may go to a server. "closed": yes. "open": it failed; nothing but a probe goes there, and not
    before a back-off. "half_open": it answers probes again; one request at a time tries it, and decides."""

    def __init__(self) -> None:
        self.state: Literal["closed", "open", "half_open"] = "closed"
        self.num_failures = 0  # in a row
        self.last_failure = ""
        self._retry_at = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until the server may be probed; 0 unless it is open."""
        return max(0.0, self._retry_at - time.monotonic()) if self.state == "open" else 0.0

    def failed(self, why: str) -> bool:
        """Opens it; whether it was not open already. What fails during a back-off began before it: it counts once."""
        was_open = self.state == "open"
        if not (was_open and self.wait_s):
            self.num_failures += 1
            self.last_failure = why
            self._retry_at = time.monotonic() + backoff_s(self.num_failures)
        self.state = "open"
        return not was_open

    def answers(self) -> None:
        if self.state == "open":
            self.state = "half_open"

    def succeeded(self) -> bool:
        """An answer to a request came; whether that closed it. While it is open, only a probe counts."""
        if self.state == "open":
            return False
        was, self.state, self.num_failures = self.state, "closed", 0
        return was == "half_open"


@dataclass(eq=False)
class Member:
    """One server and what the client knows of it. `holds_weights`: it is known to hold the current weights."""

    server: Server
    backend: Backend
    holds_weights: bool = True
    update: WeightUpdateMeta | None = None  # the last that it took
    is_detected: bool = False
    is_listed: bool = True  # False: it is being drained
    num_running: int = 0
    num_queued_tokens: int = 0
    heard_at: float = field(default_factory=time.monotonic)
    breaker: Breaker = field(default_factory=Breaker)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    _calls: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.server.id

    @property
    def is_alive(self) -> bool:
        return self.holds_weights and self.breaker.state != "open"

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A call to the server; `end_calls` ends it."""
        call = asyncio.ensure_future(work)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def result(self, call: asyncio.Task[T]) -> T:
        """Of a call that is done. Raises ConnectionLost when it was ended because the server was taken out."""
        if call.cancelled():
            raise ConnectionLost(f"{self.id} ({self.server.url}) was taken out: {self.breaker.last_failure}")
        answer = call.result()
        self.heard_at = time.monotonic()
        return answer

    async def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """Start, wait, result. Waits for: the answer, as `work` bounds it. Unblocked by: the answer, `end_calls`."""
        call = self.start(work)
        try:
            await asyncio.wait({call})
            return self.result(call)
        finally:
            call.cancel()

    def end_calls(self) -> None:
        """Nothing that was asked will be answered: whoever waits hears of it now, and late answers are not read."""
        for call in list(self._calls):
            call.cancel()

    def line(self) -> str:
        """Why it gets no requests, for errors and stall reports; empty when it does."""
        if self.is_alive:
            return "" if self.is_listed else f"{self.id} ({self.server.url}): is no longer in the list of servers"
        lacks = "" if self.breaker.state == "open" else "answers, but does not hold the current weights yet; last: "
        why = lacks + (self.breaker.last_failure or "not asked yet")
        return f"{self.id} ({self.server.url}): {why}"
