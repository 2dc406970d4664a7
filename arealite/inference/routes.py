"""The HTTP surface of the built-in server: generation in SGLang's and OpenAI's wire protocols, pausing and health, and
how errors are answered. The other routes are in control.py, introspection.py and adapters.py.

`build_app` is called by serve.py and by tests. Routes validate, wait and render; the engine thread does the rest.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from arealite.api.errors import PromptError, RequestError, WaitTimeout, WeightSyncError
from arealite.dataset.prompts import encode
from arealite.inference import strict
from arealite.inference.adapter_routes import AdapterRoutes
from arealite.inference.bodies import field, read_json, read_object, shown
from arealite.inference.chat_template import ChatTemplate
from arealite.inference.control import ControlRoutes
from arealite.inference.core.engine import PAUSE_MODES, Engine, EngineFailure
from arealite.inference.core.served_model import ServedModel
from arealite.inference.introspection import Introspection
from arealite.inference.openai_requests import OpenAICall, Served, model_defaults, parse_chat, parse_completion
from arealite.inference.openai_responses import ChatChoice, Choice, CompletionChoice, chunks, whole_answer
from arealite.inference.requests import GenerateCall, ServedLimits, parse_generate
from arealite.inference.responses import Answer, render
from arealite.inference.settings import ServerSettings
from arealite.inference.streaming import Submissions, send_events
from arealite.observe import waits

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 << 20
_KINDS = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}


def error_body(status: int, message: str) -> dict[str, Any]:
    """All forms that clients look for: OpenAI's, a refused request's, and a refused control call's."""
    facts = {"message": message, "type": _KINDS.get(status, "Error"), "param": None, "code": status}
    return {"object": "error", "success": False, **facts, "error": facts}


class ErrorAnswers:
    """Turns whatever a route raises into a JSON answer; the server keeps serving."""

    def __init__(self, strict_sglang: bool) -> None:
        self._strict = strict_sglang

    def response(self, request: web.Request, status: int, message: str, error: Exception | None = None) -> web.Response:
        if not self._strict:
            return web.json_response(error_body(status, message), status=status)
        if isinstance(error, WeightSyncError):
            return web.json_response({"success": False, "message": message}, status=status)
        return web.json_response(strict.error_body(request.path, status, message, error), status=status)

    async def answer(self, request: web.Request, call: Handler) -> web.StreamResponse:
        try:
            if self._strict and request.path in strict.NOT_SGLANGS:
                raise web.HTTPNotFound
            return await call(request)
        except (RequestError, WeightSyncError) as error:
            return self.response(request, 400, str(error), error)
        except (WaitTimeout, EngineFailure) as error:
            return self.response(request, 503, str(error))
        except web.RequestPayloadError as error:
            return self.response(request, 400, f"the body cannot be read: {' '.join(str(error).split())}", error)
        except web.HTTPRequestEntityTooLarge as error:
            return self.response(request, 413, f"the body has more than {MAX_BODY_BYTES >> 20} MiB", error)
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            answer = self.response(request, 405, f"{request.method} {request.path}: Method Not Allowed; use {allowed}")
            answer.headers["Allow"] = allowed
            return answer
        except web.HTTPException as error:
            return self.response(request, error.status, f"{request.method} {request.path}: {error.reason}")
        except ConnectionResetError:  # the client is gone in the middle of its stream
            return web.Response(status=499)
        except Exception:  # HTTP boundary: an error in one request must not end the server
            logger.exception("%s %s failed", request.method, request.path)
            return self.response(request, 500, traceback.format_exc())


class ServerRoutes:
    """Routes over one engine."""

    def __init__(self, engine: Engine, settings: ServerSettings, served: Served, submissions: Submissions) -> None:
        self._engine = engine
        self._settings = settings
        self._served = served
        self._submissions = submissions

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/generate", self.generate),
            web.put("/generate", self.generate),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completion),
            web.post("/abort_request", self.abort),
            web.post("/pause_generation", self.pause),
            web.post("/continue_generation", self.resume),
            web.get("/health", self.health),
            web.get("/health_generate", self.health_generate),
            web.get("/ready", self.ready),
            web.get("/ping", self.ping),
        ]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Validate, be held while paused, sample. A client that goes away aborts its requests."""
        body = await read_json(request)
        call = parse_generate(
            strict.with_default_length(body) if self._settings.strict_sglang else body, self._served.limits
        )
        with_prompt = field(body, "return_prompt_token_ids", bool, False)
        if call.stream:
            shape = strict.stream_error_body if self._settings.strict_sglang else error_body
            return await send_events(request, self._events(call, with_prompt), shape, self._settings.request_limit_s)
        answers = [
            self._entry(answer, False, with_prompt) for answer in await self._submissions.finished(call.requests)
        ]
        return web.json_response(answers if call.batched else answers[0])

    async def _events(self, call: GenerateCall, with_prompt: bool) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(self._submissions.growing(call.requests)) as growing:
            async for i, answer in growing:
                entry = self._entry(answer, self._settings.incremental_streaming, with_prompt)
                yield {**entry, "index": i} if call.batched else entry

    def _entry(self, answer: Answer, only_new: bool, with_prompt: bool) -> dict[str, Any]:
        entry = render(answer, only_new, with_prompt)
        return strict.as_sglang(entry, answer) if self._settings.strict_sglang else entry

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._openai(request, parse_chat, ChatChoice)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._openai(request, parse_completion, CompletionChoice)

    async def _openai(
        self, request: web.Request, parse: Callable[[Any, Served], OpenAICall], choice_of: type[Choice]
    ) -> web.StreamResponse:
        call = parse(await read_json(request), self._served)
        requests = call.generate.requests
        if call.generate.stream:
            events = chunks(call, choice_of, self._submissions.growing(requests))
            return await send_events(request, events, error_body, self._settings.request_limit_s)
        return web.json_response(whole_answer(call, choice_of, await self._submissions.finished(requests)))

    async def abort(self, request: web.Request) -> web.Response:
        """Answers at once; the requests end after the current step."""
        body = await read_object(request)
        rid = field(body, "rid", str, "")
        if field(body, "abort_all", bool, False):
            self._engine.call(lambda: self._engine.abort(lambda _: True))
        elif rid:
            self._engine.call(lambda: self._engine.abort(lambda s: s.request.rid.startswith(rid)))
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        """No request submitted after this call was made is served before `resume` is called."""
        body = await read_object(request)
        wanted = field(body, "mode", str, "abort")
        mode = next((mode for mode in PAUSE_MODES if mode == wanted), None)
        if mode is None:
            raise RequestError(f"mode: expected one of {', '.join(PAUSE_MODES)}, found {shown(wanted)}")
        self._submissions.resumed.clear()
        await self._engine.ask("pause_generation", lambda: self._engine.pause(mode))
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        await read_object(request)
        self._submissions.resumed.set()  # those who are held run after the call is in the engine's inbox
        await self._engine.ask("continue_generation", self._engine.resume)
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine thread lives, paused or not. SGLang generates a token for it, and fails while paused."""
        if self._engine.stopped.is_set():
            raise EngineFailure(self._engine.failure or "the engine has stopped")
        if self._settings.strict_sglang:
            resumed, limit_s = self._submissions.resumed.wait(), self._settings.health_limit_s
            await waits.bounded(resumed, "continue_generation", "client", limit_s, ["a health check"])
        return web.Response()

    async def health_generate(self, request: web.Request) -> web.Response:
        """200 when the engine thread answers between two steps; works while paused."""
        await self._engine.ask("health_generate", lambda: None, self._settings.health_limit_s)
        return await self.health(request)

    async def ready(self, request: web.Request) -> web.Response:
        if not self._submissions.resumed.is_set():
            raise web.HTTPServiceUnavailable(reason=f"generation is paused ({self._engine.paused})")
        if self._engine.stopped.is_set():
            raise EngineFailure(self._engine.failure or "the engine has stopped")
        return web.Response()

    async def ping(self, request: web.Request) -> web.Response:
        return web.Response()


def served_limits(engine: Engine) -> ServedLimits:
    """What requests are checked against."""
    model = engine.batcher.model
    return ServedLimits(
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        kv_cache_tokens=engine.batcher.scheduler.pool.num_tokens,
        encode=None if model.tokenizer is None else Encoder(model),
        adapters=model.adapters.names.keys(),
    )


class Encoder:
    """Text to token ids. Text that cannot fit the context is refused before it is encoded, which may take long."""

    def __init__(self, model: ServedModel) -> None:
        self._tokenizer = model.tokenizer
        longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        self._max_characters = 2 * longest * model.context_length

    def __call__(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > self._max_characters:
            raise RequestError(f"a text of {len(text)} characters passes the context length")
        try:
            return encode(self._tokenizer, text, is_raw=add_special_tokens)
        except PromptError as error:
            raise RequestError(str(error)) from error


def build_app(engine: Engine, settings: ServerSettings) -> web.Application:
    """The application; its runner needs handler_cancellation=True so that a client's disconnect aborts."""
    model, limits = engine.batcher.model, served_limits(engine)
    submissions = Submissions(engine, settings.hold_limit_s, settings.request_limit_s)
    asked = model.module.generation_config.to_dict() if settings.model_defaults else {}
    served = Served(
        limits,
        ChatTemplate(model.tokenizer, limits.encode, settings.tool_call_parser),
        settings.served_model_name,
        model_defaults(asked),
    )
    errors = ErrorAnswers(settings.strict_sglang)

    @web.middleware
    async def answer_errors(request: web.Request, **called: Handler) -> web.StreamResponse:
        return await errors.answer(request, called["handler"])  # the keyword by which aiohttp hands it over

    app = web.Application(middlewares=[answer_errors], client_max_size=MAX_BODY_BYTES)  # type: ignore[list-item]
    for part in (
        ServerRoutes(engine, settings, served, submissions),
        Introspection(engine, settings, limits, submissions),
        ControlRoutes(engine, settings.strict_sglang),
        AdapterRoutes(engine),
    ):
        app.add_routes(part.routes())
    return app
