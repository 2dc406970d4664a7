"""The run's servers: HTTP to each, the state of each, and which of them gets a request.

Made by client.py, used by fleet.py, membership.py and generate.py in the client's asyncio loop only; bench.py uses the
HTTP alone. A group's members go to one server, so that they share the prompt's cache; groups go where the fewest tokens
are queued.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp

from arealite.api.errors import ArealiteError, ConfigError, RequestError, ServerUnreachable
from arealite.api.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, Keys
from arealite.api.types import WeightUpdateMeta
from arealite.rollout.backends.protocol import Backend, Call
from arealite.rollout.counters import Counters

MAX_REMEMBERED_GROUPS = 8192
KEEPALIVE_S = 2.0  # below every server's own limit, so that a connection is not reused while the server closes it
RETRYABLE_STATUS = (408, 425, 429)
MAX_SHOWN = 600  # characters of a server's message that go into an error

# joining: not reached yet. updating: it answers, and is being given the weights, pause and adapters that the others
# have, or waits for the next update. serving: it takes requests. draining: it serves those that it has, and no new
# ones. out: it failed; nothing but a probe goes there, and not before a back-off.
State = Literal["joining", "updating", "serving", "draining", "out"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ConnectionLost(ServerUnreachable):
    """There is nobody at the address, or the connection broke: the process is likely gone."""


@dataclass(eq=False)
class Address:
    """One inference server: `id` is what errors, stats and receipts call it, `url` has no trailing slash."""

    id: str
    url: str


def addresses_of(texts: list[str]) -> list[Address]:
    """Of `host:port` or `http://host:port`, named server-0, server-1, ... in that order. Raises ConfigError."""
    return [Address(f"server-{i}", _url(text.strip())) for i, text in enumerate(filter(str.strip, texts))]


def _url(address: str) -> str:
    url = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    try:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
        is_usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or "://" in address)
        if is_usable and not re.search(r"\s", url) and (place.startswith("[") or place.count(":") < 2):
            return url
    except ValueError:  # brackets that do not match, a port that is none
        pass
    raise ConfigError(
        f"the server address {address!r} is not one: give host:port or http://host:port, an IPv6 host in brackets"
        " ([::1]:30000)"
    )


class Transport:
    """The HTTP session; made when it is first used, because it belongs to the asyncio loop of that moment. Servers are
    shown the keys of the environment."""

    def __init__(self) -> None:
        self._keys = Keys.from_env()
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, server: Address, call: Call, limit_s: float | None = None) -> Any:
        """The answer, read (None when empty). `limit_s` None: the caller bounds the wait.

        Raises:
            RequestError: HTTP 4xx, or an answer that is not JSON. ConfigError: HTTP 401 or 403, for want of a key.
            ServerUnreachable: HTTP 5xx, 408, 425 or 429, or no answer within the limit; ConnectionLost: no connection.
        """
        async with self._answer(server, call, limit_s) as answer:
            text = await answer.text()
            return _parsed(text, _where(server, call)) if call.expects_json else text

    async def stream(self, server: Address, call: Call, keep: Callable[[bytes], None]) -> Any:
        """The last event, read, of an answer in server-sent events that each hold all that went before; a plain
        answer as `send`. `keep` gets the JSON of each event as it comes. Raises as `send`; the caller bounds it."""
        where = _where(server, call)
        async with self._answer(server, call, None) as answer:
            if answer.content_type != "text/event-stream":
                return _parsed(await answer.text(), where)
            last, rest = b"", b""
            async for chunk in answer.content.iter_any():
                *events, rest = (rest + chunk).split(b"\n\n")
                for event in events:
                    text = event.removeprefix(b"data:").strip()
                    if text == b"[DONE]":
                        return _parsed(last.decode(), where)
                    if text.startswith(b'{"error"'):  # after the start of a stream, with the status that came too late
                        error = _parsed(text.decode(), where)["error"]
                        code = error.get("code") if isinstance(error, dict) else None
                        raise _refusal(code if isinstance(code, int) else 500, text.decode(), where)
                    keep(text)
                    last = text
        raise ConnectionLost(f"{where} ended its answer early")

    @asynccontextmanager
    async def _answer(
        self, server: Address, call: Call, limit_s: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            # limit=0: the default pool of 100 connections would silently queue requests in the client.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        where = _where(server, call)
        headers = self._keys.headers(call.is_control)
        request = self._session.request(call.method, server.url + call.path, json=call.body, headers=headers)
        try:
            async with asyncio.timeout(limit_s), request as answer:
                if answer.status >= 400:
                    raise _refusal(answer.status, await answer.text(), where)
                yield answer
        except TimeoutError as error:
            raise ServerUnreachable(f"{where} gave no answer within {limit_s} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(f"{where} cannot be reached: {str(error) or type(error).__name__}") from error


def _where(server: Address, call: Call) -> str:
    return f"{server.id} ({server.url}{call.path})"


def _refusal(status: int, text: str, where: str) -> ArealiteError:
    if status >= 500 or status in RETRYABLE_STATUS:
        return ServerUnreachable(f"{where} failed with HTTP {status}: {text[:MAX_SHOWN]}")
    told = f"{where} refused the request with HTTP {status}: {text[:MAX_SHOWN]}"
    if status in (401, 403):
        return ConfigError(f"{told}; set {API_KEY_VARIABLE} and {ADMIN_KEY_VARIABLE} to the keys that this server has")
    return RequestError(told)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise RequestError(f"{where} answered something that is not JSON: {text[:MAX_SHOWN]}") from error


@dataclass(frozen=True)
class Limits:
    """Times of the client that no run needs to change, in seconds."""

    abort_grace_s: float = 10.0  # how long an aborted request may take to hand over the tokens it has
    first_backoff_s: float = 0.1  # of a server or request that failed; doubled after each failure in a row
    max_backoff_s: float = 5.0
    probe_s: float = 1.0  # a server that has said nothing for so long is asked whether it is there
    file_s: float = 1.0  # how often the lists of servers are looked at
    drain_s: float = 60.0  # how long requests may go on at a server that is to leave, when nobody says
    beat_s: float = 5.0  # how often rank 0 tells the ranks that wait for it that it goes on

    def backoff_s(self, num_failures: int) -> float:
        """Seconds to wait after so many failures in a row, from 1."""
        return float(min(self.max_backoff_s, self.first_backoff_s * 2.0 ** min(num_failures - 1, 60)))


class Gate:
    """Open or closed, and a clock that stands still while it is closed."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._closed_s = 0.0
        self._closed_at = 0.0

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def close(self) -> None:
        if self.is_open:
            self._open.clear()
            self._closed_at = time.monotonic()

    def open(self) -> None:
        if not self.is_open:
            self._closed_s += time.monotonic() - self._closed_at
            self._open.set()

    async def passed(self) -> None:
        """Waits until the gate is open. Unblocked by `open` (resume), or cancelled by destroy."""
        await self._open.wait()

    def clock_s(self) -> float:
        """Seconds on a clock that only runs while the gate is open."""
        return (time.monotonic() if self.is_open else self._closed_at) - self._closed_s


@dataclass(eq=False)
class Server(Address):
    """One server and what the client knows of it. `num_failures` in a row: a serving one that has any is on trial."""

    backend: Backend
    state: State = "joining"
    why: str = "not asked yet"  # it is in that state
    is_detected: bool = False
    context_length: int | None = None  # tokens of a prompt and its answer, if it says
    refusal: ConfigError | None = None  # it cannot be used as it was started
    update: WeightUpdateMeta | None = None  # the last that it took
    is_verified: bool = False  # by checksums of what is live
    is_guest: bool = False  # of which the run knows no more than its address: it serves no weights but those sent to it
    has_served: bool = False
    leave_by: float | None = None  # monotonic; when it is drained, and served until then
    num_failures: int = 0
    retry_at: float = 0.0
    num_running: int = 0
    num_queued_tokens: int = 0
    heard_at: float = field(default_factory=time.monotonic)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    calls: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def wait_s(self) -> float:
        """Seconds until the server may be probed; 0 unless it is out or cannot be reached yet."""
        return max(0.0, self.retry_at - time.monotonic()) if self.state in ("out", "joining") else 0.0

    @property
    def is_reachable(self) -> bool:
        """Whether what all servers are told is for it too."""
        return self.state in ("updating", "serving") or (self.state == "draining" and not self.num_failures)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A call to the server, which ends when the server is taken out for dead."""
        call = asyncio.ensure_future(work)
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        return call

    def result(self, call: asyncio.Task[T]) -> T:
        """Of a call that is done. Raises ConnectionLost when it was ended because the server was taken out."""
        if call.cancelled():
            raise ConnectionLost(f"{self.id} ({self.url}) was taken out: {self.why}")
        answer = call.result()
        self.heard_at = time.monotonic()
        return answer

    async def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """Start, wait, result. Waits for: the answer, as `work` bounds it. Unblocked by: the answer, or its end."""
        call = self.start(work)
        try:
            await asyncio.wait({call})
            return self.result(call)
        finally:
            call.cancel()

    def line(self) -> str:
        """Why it gets no requests, for errors and stall reports; empty when it does."""
        if self.state == "serving":
            return ""
        lacks = "answers, but does not hold the current weights yet; last: " if self.state == "updating" else ""
        return f"{self.id} ({self.url}): {lacks}{self.why}"


class Router:
    """`gate`: closed while generation is paused everywhere. `limit_s`: how long requests wait when there is no server
    to take them."""

    def __init__(self, counters: Counters, limit_s: float, limits: Limits) -> None:
        self.servers: list[Server] = []
        self.gate = Gate()
        self.counters = counters
        self._limit_s = limit_s
        self._limits = limits
        self._home: OrderedDict[str, Server] = OrderedDict()
        self._changed = asyncio.Event()
        self._none_since: float | None = None
        self.transport = Transport()

    async def ask(self, server: Server, call: Call, limit_s: float) -> Any:
        """The answer to a call that ends when the server is taken out for dead. Raises as `Transport.send`."""
        return await server.ask(self.transport.send(server, call, limit_s))

    def move(self, server: Server, state: State, why: str) -> None:
        """The one place where a server's state changes: it is logged, counted, and whoever waits looks again."""
        before, server.state, server.why = server.state, state, why
        if state == "out" != before:
            self.counters.add("num_server_failures", before == "serving")
            logger.warning("%s (%s) is taken out: %s", server.id, server.url, why)
        elif state == "serving" != before:
            level = logging.WARNING if server.num_failures else logging.INFO
            logger.log(level, "%s (%s) takes requests: %s", server.id, server.url, why)
            self.counters.add("num_servers_joined", not server.has_served)
            server.has_served = True
            self._home.clear()  # groups choose again, the idle servers first, when they next send a request
            self._none_since = None
        server.woken.set()
        self.notify()

    def fail(self, server: Server, why: str, is_dead: bool = False) -> None:
        """Take the server out until it answers probes again; `is_dead`: what it was asked will not be answered. What
        fails during a back-off began before it: it counts once."""
        if not server.wait_s:
            is_new = server.state == "joining"  # never reached, so that it is none of its failures
            server.num_failures += not is_new
            server.retry_at = time.monotonic() + self._limits.backoff_s(max(1, server.num_failures))
            self.move(server, server.state if is_new or server.state == "draining" else "out", why)
        if is_dead:
            for call in list(server.calls):
                call.cancel()

    def lose(self, server: Server, error: ArealiteError) -> None:
        """Take out a server that failed at what all servers are told, or at a probe."""
        self.fail(server, str(error), is_dead=isinstance(error, ConnectionLost))

    def heard(self, server: Server) -> None:
        """It answered a request, or sent a token."""
        server.heard_at = time.monotonic()
        if server.num_failures and server.state in ("serving", "draining"):
            server.num_failures = 0
            self.notify()

    @asynccontextmanager
    async def server_for(self, group: str, num_tokens: int) -> AsyncIterator[Server]:
        """The server for a request of about `num_tokens`, which is there while the block runs. `group` "": any.

        Waits for: a server that takes requests, until there has been none for the limit. Unblocked by: a server that
        comes back or is added, or the limit.

        Raises:
            ServerUnreachable: names every server and its last failure.
        """
        while (server := self.choose(group)) is None:
            self._none_since = self._none_since or time.monotonic()
            if not await self.wait_change(self._none_since + self._limit_s - time.monotonic()):
                raise ServerUnreachable(
                    f"no server has taken requests for {self._limit_s:g} s (rollout.setup_timeout_s): {self.lines()}"
                )
        self._none_since = None
        server.num_running += 1
        server.num_queued_tokens += num_tokens
        try:
            yield server
        finally:
            server.num_running -= 1
            server.num_queued_tokens -= num_tokens
            if server.state == "draining":
                server.woken.set()

    async def wait_change(self, limit_s: float) -> bool:
        """Whether a server came, went or answered within the limit."""
        try:
            async with asyncio.timeout(limit_s):
                return await self._changed.wait()
        except TimeoutError:
            return False

    def notify(self) -> None:
        """Those who wait for a server look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def lines(self) -> str:
        """The servers that take no requests, and why."""
        return "; ".join(filter(None, (s.line() for s in self.servers))) or "there are no servers"

    def choose(self, group: str) -> Server | None:
        ready = [s for s in self.servers if s.state == "serving"]
        if not ready:
            return None
        home = self._home.get(group)
        if home is None or home not in ready:
            # A server that failed is tried by one group; by all when there is no other.
            ready = [s for s in ready if not s.num_failures or not s.num_running] or ready
            home = min(ready, key=lambda s: s.num_queued_tokens)
        if group:
            self._home[group] = home
            self._home.move_to_end(group)
            if len(self._home) > MAX_REMEMBERED_GROUPS:
                self._home.popitem(last=False)
        return home
