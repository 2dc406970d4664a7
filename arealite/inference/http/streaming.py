"""Requests of HTTP calls on the engine: held while paused, followed token by token, aborted when their client goes
away; and server-sent events. Used by routes.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

from aiohttp import web

from arealite.api.errors import WaitTimeout
from arealite.inference.core.answers import ShownAnswer
from arealite.inference.core.engine import Engine, EngineFailure
from arealite.inference.core.requests import GenerateRequest
from arealite.inference.core.sequence import Sequence
from arealite.observe import waits

logger = logging.getLogger(__name__)

_KINDS = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
LONG_WRITE_BYTES = 1 << 15  # well below what asyncio buffers before it makes writers wait


class Submissions:
    """The way of a call's requests to the engine and back. `resumed` is set unless generation is paused, `num_held`
    counts the requests that wait for it."""

    def __init__(self, engine: Engine, hold_limit_s: float, request_limit_s: float) -> None:
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.num_held = 0
        self._engine = engine
        self._tokenizer = engine.batcher.model.tokenizer
        self._hold_limit_s = hold_limit_s
        self._request_limit_s = request_limit_s

    @asynccontextmanager
    async def _running(self, requests: list[GenerateRequest]) -> AsyncIterator[list[Sequence]]:
        """Submitted once generation is not paused; those that have not ended with the block are aborted."""
        rids = [r.rid for r in requests]
        while not self.resumed.is_set():  # the next pause may come before the event loop is here again
            self.num_held += len(rids)
            try:
                await waits.bounded(self.resumed.wait(), "continue_generation", "client", self._hold_limit_s, rids)
            finally:
                self.num_held -= len(rids)
        sequences = self._engine.submit_all(requests)
        try:
            yield sequences
        finally:
            if not all(s.future.done() for s in sequences):  # the client is gone, or the limit has passed
                with suppress(EngineFailure):  # then they have ended with the engine
                    self._engine.call(lambda: self._engine.abort(set(sequences).__contains__))

    async def finished(self, requests: list[GenerateRequest]) -> list[ShownAnswer]:
        """The whole answers, in order."""
        async with self._running(requests) as sequences:
            ended = asyncio.gather(*(asyncio.wrap_future(s.future) for s in sequences))
            await waits.bounded(ended, "generation", "engine", self._request_limit_s, [r.rid for r in requests])
        answers = [ShownAnswer(self._tokenizer, s) for s in sequences]
        for answer in answers:
            answer.advance()
        return answers

    async def growing(self, requests: list[GenerateRequest]) -> AsyncGenerator[tuple[int, ShownAnswer], None]:
        """(index, answer) whenever there is more of that answer to show, until all have ended.

        A slow reader gets several tokens at once: what waits for it is one mark per answer.
        """
        async with self._running(requests) as sequences:
            grown: asyncio.Queue[int] = asyncio.Queue()
            marked: set[int] = set()
            loop = asyncio.get_running_loop()
            answers = [ShownAnswer(self._tokenizer, s) for s in sequences]

            def mark(i: int, _: object = None) -> None:
                """On any thread: wake the reader, unless it has yet to take the last mark."""
                if i not in marked:
                    marked.add(i)
                    with suppress(RuntimeError):  # the event loop has ended, and with it the reader
                        loop.call_soon_threadsafe(grown.put_nowait, i)

            def listen(i: int, sequence: Sequence) -> None:
                """On the engine thread."""
                if sequence.num_output % sequence.request.params.stream_interval == 0:
                    answers[i].num_known = sequence.num_output
                    mark(i)

            for i, sequence in enumerate(sequences):
                sequence.listener = partial(listen, i)
                sequence.future.add_done_callback(partial(mark, i))
            unfinished = set(range(len(sequences)))
            while unfinished:
                pending = [requests[i].rid for i in sorted(unfinished)]
                i = await waits.bounded(grown.get(), "next token", "engine", self._request_limit_s, pending)
                marked.discard(i)  # before looking, so that what comes meanwhile is marked again
                if i in unfinished and answers[i].advance():
                    if answers[i].finished:
                        unfinished.discard(i)
                    yield i, answers[i]


def error_body(status: int, message: str) -> dict[str, Any]:
    """All forms that clients look for: OpenAI's, a refused request's, and a refused control call's."""
    kind = _KINDS.get(status, "Error")
    facts = {"message": message, "type": kind, "param": None, "code": status}
    return {"object": "error", "success": False, "error_message": message, **facts, "error": facts}


async def send_events(
    request: web.Request, events: AsyncGenerator[dict[str, Any], None], limit_s: float
) -> web.StreamResponse:
    """Answer with server-sent events and `[DONE]`. What fails before the first one is raised, and answered as for any
    other call; what fails later is the last event. A client that has read nothing for `limit_s` is cut off."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})

    async def send(event: str) -> None:
        text = f"data: {event}\n\n".encode()
        waiting = request.transport is not None and request.transport.get_write_buffer_size() > 0
        if waiting or len(text) >= LONG_WRITE_BYTES:
            await _read_by_client(request, response.write(text), limit_s)
        else:  # cannot block; a limit would cost as much as the event
            await response.write(text)

    async with aclosing(events):
        event: dict[str, Any] | None = await anext(events, None)
        await response.prepare(request)
        while event is not None:
            await send(json.dumps(event))
            try:
                event = await anext(events, None)
            except (WaitTimeout, EngineFailure) as error:
                await send(json.dumps(error_body(503, str(error))))
                break
            except Exception:  # HTTP boundary: the status is sent, so that only the stream can tell of it
                logger.exception("%s failed", request.path)
                await send(json.dumps(error_body(500, traceback.format_exc())))
                break
        await send("[DONE]")
        await _read_by_client(request, response.write_eof(), limit_s)
    return response


async def _read_by_client(request: web.Request, writing: Awaitable[None], limit_s: float) -> None:
    try:
        await waits.bounded(writing, "reading of a stream", "client", limit_s)
    except WaitTimeout as error:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError(str(error)) from error
