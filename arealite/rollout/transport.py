"""HTTP to the inference servers: one session, JSON in and out, every failure as one of three errors.

Called by router.py (through Server.ask), generate.py and bench.py. Knows nothing about what the bodies mean.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from arealite.api.errors import ArealiteError, ConfigError, RequestError, ServerUnreachable
from arealite.rollout.backends.protocol import Call

KEEPALIVE_S = 2.0  # below every server's own limit, so that a connection is not reused while the server closes it
RETRYABLE_STATUS = (408, 425, 429)
MAX_SHOWN = 600  # characters of a server's message that go into an error


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
    """The HTTP session; made when it is first used, because it belongs to the asyncio loop of that moment."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, server: Address, call: Call, limit_s: float | None = None) -> Any:
        """The answer, read (None when empty). `limit_s` None: the caller bounds the wait.

        Raises:
            RequestError: HTTP 4xx, or an answer that is not JSON.
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
        request = self._session.request(call.method, server.url + call.path, json=call.body)
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
    return RequestError(f"{where} refused the request with HTTP {status}: {text[:MAX_SHOWN]}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise RequestError(f"{where} answered something that is not JSON: {text[:MAX_SHOWN]}") from error
