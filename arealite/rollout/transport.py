"""HTTP to the inference servers: one session, JSON in and out, every failure as one of two errors.

Called by generate.py (requests) and fleet.py (control). Knows nothing about what the bodies mean.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import aiohttp

from arealite.api.errors import RequestError, ServerUnreachable
from arealite.rollout.backend import Call

KEEPALIVE_S = 2.0  # below every server's own limit, so that a connection is not reused while the server closes it
RETRYABLE_STATUS = (408, 425, 429)
MAX_SHOWN = 600  # characters of a server's message that go into an error


@dataclass(frozen=True)
class Server:
    """One inference server: `id` is what errors, stats and receipts call it, `url` has no trailing slash."""

    id: str
    url: str


def servers_at(addresses: list[str]) -> list[Server]:
    """Servers of `host:port` or `http://host:port` addresses, named server-0, server-1, ... in that order."""
    urls = [a.strip().rstrip("/") for a in addresses if a.strip()]
    return [Server(f"server-{i}", u if "://" in u else f"http://{u}") for i, u in enumerate(urls)]


class Transport:
    """The HTTP session; made when it is first used, because it belongs to the asyncio loop of that moment."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, server: Server, call: Call, limit_s: float | None = None) -> Any:
        """The JSON answer (None when empty). `limit_s` None: the caller bounds the wait.

        Raises:
            RequestError: HTTP 4xx, or an answer that is not JSON.
            ServerUnreachable: no connection, HTTP 5xx, 408, 425 or 429, or no answer within the limit.
        """
        where = f"{server.id} ({server.url}{call.path})"
        request = self._opened().request(call.method, server.url + call.path, json=call.body)
        try:
            async with asyncio.timeout(limit_s), request as answer:
                status, text = answer.status, await answer.text()
        except TimeoutError as error:
            raise ServerUnreachable(f"{where} gave no answer within {limit_s} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerUnreachable(f"{where} cannot be reached: {_described(error)}") from error
        if status >= 500 or status in RETRYABLE_STATUS:
            raise ServerUnreachable(f"{where} failed with HTTP {status}: {text[:MAX_SHOWN]}")
        if status >= 400:
            raise RequestError(f"{where} refused the request with HTTP {status}: {text[:MAX_SHOWN]}")
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise RequestError(f"{where} answered something that is not JSON: {text[:MAX_SHOWN]}") from error

    async def wrong_with(self, server: Server, path: str, limit_s: float) -> str:
        """What is wrong with GET `path`; empty when it answers 200."""
        try:
            async with asyncio.timeout(limit_s), self._opened().get(server.url + path) as answer:
                return "" if answer.status == 200 else f"HTTP {answer.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return _described(error)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            # limit=0: the default pool of 100 connections would silently queue requests in the client.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self._session


def _described(error: BaseException) -> str:
    """The error's text, or its class where it has none."""
    return str(error) or type(error).__name__
