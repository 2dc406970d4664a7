"""One call of an agent while it goes on: what is sampled for it reaches its client as it comes, or as a whole.

Called by server.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from aiohttp import web

from arealite.api.errors import RequestError, ServerUnreachable, WaitTimeout
from arealite.gateway.asks import Answer
from arealite.gateway.forest import Turn
from arealite.gateway.open_session import OpenSession
from arealite.gateway.session import LimitReached, SessionEnded
from arealite.gateway.wires.forms import Refusal, Reply
from arealite.observe.waits import bounded

logger = logging.getLogger(__name__)

BEAT_S = 3.0  # between signs of life on a slow stream
HEADERS_S = 30.0  # how long a stream's status is held back, so that what is refused has its own
READ_LIMIT_S = 600.0  # for a client to read what it is sent
ENDED = "this session has ended"


class Feed:
    """Answers to one call, one for each sample. A slow reader gets several tokens at once: what waits for it is the
    latest of each answer."""

    def __init__(self, session: OpenSession, reply: Reply, attempt: str | None) -> None:
        self._latest: dict[int, Answer] = {}
        self._changed = asyncio.Event()
        ask = replace(reply.ask, num_samples=1)
        self.asks: list[asyncio.Task[Turn]] = []
        for i in range(reply.ask.num_samples):
            key = None if attempt is None else f"{attempt}.{i}"
            asked = asyncio.create_task(session.ask(ask, partial(self._put, i), key))
            asked.add_done_callback(lambda _: self._changed.set())
            self.asks.append(asked)

    def _put(self, i: int, answer: Answer) -> None:
        self._latest[i] = answer
        self._changed.set()

    async def news(self, limit_s: float) -> dict[int, Answer]:
        """The answers that have grown; none after `limit_s` without any. Raises what an ask raised."""
        try:
            async with asyncio.timeout(limit_s):
                await self._changed.wait()
        except TimeoutError:
            return {}
        self._changed.clear()
        latest, self._latest = self._latest, {}
        return latest | {i: self._turn(asked).answer for i, asked in enumerate(self.asks) if asked.done()}

    async def turns(self) -> list[Turn]:
        """All of them, or what the first that failed raised."""
        await asyncio.wait(self.asks, return_when=asyncio.FIRST_EXCEPTION)
        return [self._turn(asked) for asked in self.asks if asked.done()]

    def _turn(self, asked: asyncio.Task[Turn]) -> Turn:
        if asked.cancelled():  # with its session
            raise Refusal(410, ENDED, "session_ended")
        return asked.result()


async def exchange(
    request: web.Request, feed: Feed, reply: Reply, note: Callable[[list[Turn]], None]
) -> web.StreamResponse:
    """The response, sent if it is a stream. `note` is given the turns, one for each sample, before the client can know
    that they have ended."""
    try:
        if reply.is_stream:
            return await _stream(request, feed, reply, note)
        turns = await feed.turns()
        note(turns)
        return web.json_response(reply.whole([turn.answer for turn in turns]))
    finally:
        for asked in feed.asks:
            asked.cancel()


async def _stream(
    request: web.Request, feed: Feed, reply: Reply, note: Callable[[list[Turn]], None]
) -> web.StreamResponse:
    """Consumes: answers as they grow. Produces: server-sent events. Waits for: tokens, to the session's limits, and the
    client, READ_LIMIT_S. Unblocked by: either, or a broken connection. What fails before the first event is raised;
    what fails later is the last event."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    held_until, is_last = time.monotonic() + HEADERS_S, False
    while not is_last:
        try:
            news = await feed.news(BEAT_S)
            events = b"".join(reply.grown(i, answer) for i, answer in news.items())
            if not news and time.monotonic() >= held_until:
                events = reply.ping
            if is_last := bool(news) and all(asked.done() for asked in feed.asks):
                turns = await feed.turns()
                note(turns)
                events += reply.ended([turn.answer for turn in turns])
        except Exception as error:  # HTTP boundary: once the status is sent, only the stream can tell
            if not response.prepared:
                raise
            events, is_last = reply.failed(refusal_of(error)), True
        if events and not response.prepared:
            await response.prepare(request)
            held_until = 0.0
        if events:
            await bounded(response.write(events), "reading of a stream", "agent", READ_LIMIT_S)
    await response.write_eof()
    return response


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error: of its own mistakes all, of ours the kind."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, SessionEnded):
        return Refusal(410, str(error), "session_ended")
    if isinstance(error, LimitReached):  # no 429: asking again would not help
        return Refusal(400, str(error), "context_length_exceeded" if error.reason == "context" else "session_limit")
    if isinstance(error, RequestError):
        return Refusal(400, str(error))
    if isinstance(error, ServerUnreachable | WaitTimeout):
        return Refusal(503, str(error))
    logger.error("a call of an agent failed", exc_info=error)
    return Refusal(500, f"{type(error).__name__} in the gateway; its log tells more")
