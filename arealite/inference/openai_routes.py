"""The OpenAI endpoints: chats, completions, models and their tokens. Added by routes.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from arealite.inference.bodies import read_json
from arealite.inference.openai_requests import OpenAICall, Served, parse_chat, parse_completion
from arealite.inference.openai_responses import ChatChoice, Choice, CompletionChoice, chunks, whole_answer
from arealite.inference.streaming import ErrorBody, Submissions, send_events


class OpenAIRoutes:
    """Answers in OpenAI's form from the engine that /generate uses too."""

    def __init__(self, served: Served, submissions: Submissions, error_body: ErrorBody) -> None:
        self._served = served
        self._submissions = submissions
        self._error_body = error_body

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completion),
        ]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, parse_chat, ChatChoice)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, parse_completion, CompletionChoice)

    async def _answer(
        self, request: web.Request, parse: Callable[[Any, Served], OpenAICall], choice_of: type[Choice]
    ) -> web.StreamResponse:
        call = parse(await read_json(request), self._served)
        requests = call.generate.requests
        if call.generate.stream:
            events = chunks(call, choice_of, self._submissions.growing(requests))
            return await send_events(request, events, self._error_body)
        answers = await self._submissions.finished(requests)
        return web.json_response(whole_answer(call, choice_of, answers))
