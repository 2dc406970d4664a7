"""The HTTP surface of the built-in server: generation in SGLang's and OpenAI's protocols, pausing, what is served, how
busy the server is, and how errors are answered. The routes that change what is served are in control.py.

`build_app` is called by serve.py and by tests. Routes check, wait and render; the engine thread does the rest.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
from aiohttp import web
from aiohttp.typedefs import Handler

from arealite.api.errors import PromptError, RequestError, WaitTimeout, WeightSyncError
from arealite.api.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, Keys
from arealite.dataset.prompts import encode
from arealite.inference.core.engine import Engine, EngineFailure, PauseMode
from arealite.inference.core.requests import Body, ServedLimits
from arealite.inference.core.served_model import ServedModel
from arealite.inference.http.bodies import read_body, read_json, shown
from arealite.inference.http.control import ControlRoutes
from arealite.inference.http.generation import GenerateCall, entry_of, parse_generate
from arealite.inference.http.streaming import Submissions, error_body, send_events
from arealite.inference.openai.chat import ChatChoice, ChatTemplate, parse_chat
from arealite.inference.openai.completions import (
    Choice,
    CompletionChoice,
    OpenAICall,
    Served,
    chunks,
    model_defaults,
    parse_completion,
    whole_answer,
)

logger = logging.getLogger(__name__)

SERVER_VERSION = "arealite-native-0.1"
MAX_BODY_BYTES = 256 << 20
PAUSE, RESUME = "/pause_generation", "/continue_generation"


@dataclass(frozen=True)
class ServerSettings:
    """What the routes need besides the engine. `flags` are the command line's, for /server_info."""

    served_model_name: str
    flags: dict[str, Any]
    hold_limit_s: float = 600.0  # longest time a new request is held while paused
    request_limit_s: float = 3600.0  # longest time a request may take, and a stream may be silent
    incremental_streaming: bool = False  # /generate streams what is new, not all so far
    tool_call_parser: str = "auto"
    model_defaults: bool = True  # OpenAI calls take sampling defaults from generation_config.json
    keys: Keys = Keys()
    forced_decoding: bool = False  # requests may bring the tokens


class Access:
    """Who may call. `num_refused`: calls without the right key; `control_paths`: routes that change what is served."""

    def __init__(self, keys: Keys, control_paths: Iterable[str] = ()) -> None:
        self.num_refused = 0
        self._keys, self._control_paths = keys, frozenset(control_paths)

    @web.middleware
    async def check(self, request: web.Request, **called: Handler) -> web.StreamResponse:
        """The route's answer. /health needs no key: launchers and clusters probe it. Raises HTTPUnauthorized."""
        resource = request.match_info.route.resource
        path = None if resource is None else resource.canonical
        if path != "/health":
            self.require(request, path in self._control_paths)
        return await called["handler"](request)

    def require(self, request: web.Request, is_control: bool) -> None:
        """Raises HTTPUnauthorized, and counts it, when the request shows no key that allows it."""
        if not self._keys.allow(request.headers.get("Authorization", ""), is_control):
            self.num_refused += 1
            flag, name = ("--admin-api-key", ADMIN_KEY_VARIABLE) if is_control else ("--api-key", API_KEY_VARIABLE)
            raise web.HTTPUnauthorized(
                reason=f"send the header Authorization: Bearer KEY, with the key of the server's {flag} or {name}"
            )


class AbortBody(Body):
    """`rid` is the beginning of those that are meant."""

    rid: str = ""
    abort_all: bool = False


class PauseBody(Body):
    mode: PauseMode = "abort"


@dataclass(frozen=True)
class ServerRoutes:
    """Routes over one engine, whose counters are read from the event loop: what tells of them waits for no step."""

    _engine: Engine
    _settings: ServerSettings
    _served: Served
    _template: ChatTemplate
    _submissions: Submissions
    _access: Access
    _started_at: float = field(default_factory=time.time)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/generate", self.generate),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.completion),
            web.post("/abort_request", self.abort),
            web.post(PAUSE, self.pause),
            web.post(RESUME, self.resume),
            web.get("/health", self.health),
            web.get("/model_info", self.model_info),
            web.get("/server_info", self.server_info),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
            web.get("/metrics", self.metrics),
        ]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Check, be held while paused, sample. A client that goes away aborts its requests."""
        call = parse_generate(await read_json(request), self._served.limits)
        if call.stream:
            return await send_events(request, self._events(call), self._settings.request_limit_s)
        entries = [entry_of(answer, call) for answer in await self._submissions.finished(call.requests)]
        return web.json_response(entries if call.batched else entries[0])

    async def _events(self, call: GenerateCall) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(self._submissions.growing(call.requests)) as growing:
            async for i, answer in growing:
                entry = entry_of(answer, call, call.only_new or self._settings.incremental_streaming)
                yield {**entry, "index": i} if call.batched else entry

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._openai(request, partial(parse_chat, template=self._template), ChatChoice)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._openai(request, parse_completion, CompletionChoice)

    async def _openai(
        self,
        request: web.Request,
        parse: Callable[[dict[str, Any], Served], OpenAICall],
        choice_of: Callable[[OpenAICall, int], Choice],
    ) -> web.StreamResponse:
        call = parse(await read_json(request), self._served)
        choices = [choice_of(call, i) for i in range(len(call.generate.requests))]
        if call.generate.stream:
            events = chunks(call, choices, self._submissions.growing(call.generate.requests))
            return await send_events(request, events, self._settings.request_limit_s)
        return web.json_response(whole_answer(call, choices, await self._submissions.finished(call.generate.requests)))

    async def abort(self, request: web.Request) -> web.Response:
        """Answers at once; the requests end after the current step."""
        body = await read_body(request, AbortBody)
        if body.abort_all:
            self._access.require(request, is_control=True)
        if body.abort_all or body.rid:
            self._engine.call(
                lambda: self._engine.abort(lambda s: body.abort_all or s.request.rid.startswith(body.rid))
            )
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        """No request submitted after this call was made is served before `resume` is called."""
        mode = (await read_body(request, PauseBody)).mode
        self._submissions.resumed.clear()
        await self._engine.ask("pause_generation", lambda: self._engine.pause(mode))
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        await read_json(request)
        self._submissions.resumed.set()  # those who are held run after the call is in the engine's inbox
        await self._engine.ask("continue_generation", self._engine.resume)
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine thread lives, paused or not. SGLang generates a token for it, and fails while paused."""
        if self._engine.stopped.is_set():
            raise EngineFailure(self._engine.failure or "the engine has stopped")
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        model = self._engine.batcher.model
        return web.json_response(
            {
                "model_path": model.path,
                "served_model_name": self._settings.served_model_name,
                "tokenizer_path": model.path if model.tokenizer is None else model.tokenizer.name_or_path,
                "is_generation": True,
                "weight_version": self._engine.batcher.weight_version,
                "model_type": model.config.model_type,
                "architectures": [type(model.module).__name__],
                "dtype": str(model.dtype).removeprefix("torch."),
                "vocab_size": model.vocab_size,
                "context_length": model.context_length,
            }
        )

    async def server_info(self, request: web.Request) -> web.Response:
        batcher = self._engine.batcher
        state = {**vars(batcher.counters), "last_gen_throughput": batcher.counters.tokens_per_s}
        return web.json_response(
            {
                **self._settings.flags,
                "version": SERVER_VERSION,
                **dict.fromkeys(("tp_size", "pp_size", "dp_size", "ep_size"), 1),
                "context_length": self._served.limits.context_length,
                "max_total_num_tokens": self._served.limits.kv_cache_tokens,
                "max_req_input_len": self._served.limits.max_tokens - 1,
                "startup_time": self._started_at,
                "weight_version": batcher.weight_version,
                "paused": self._engine.paused,
                "resident_bytes": resident_bytes(),
                "kv_cache_bytes": batcher.scheduler.pool.tensor.nbytes,
                "internal_states": [{**state, "num_retractions": batcher.scheduler.num_retractions}],
            }
        )

    def _cards(self) -> list[dict[str, Any]]:
        """The model, and its adapters below it."""
        name = self._settings.served_model_name
        card = {
            "id": name,
            "object": "model",
            "created": int(self._started_at),
            "owned_by": "arealite",
            "root": self._engine.batcher.model.path,
            "parent": None,
            "max_model_len": self._served.limits.max_tokens,
        }
        adapters = [
            {**card, "id": adapter, "root": adapter, "parent": name} for adapter in self._served.limits.adapters
        ]
        return [card, *adapters]

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self._cards()})

    async def model(self, request: web.Request) -> web.Response:
        name, cards = request.match_info["name"], {card["id"]: card for card in self._cards()}
        if name not in cards:
            raise web.HTTPNotFound(reason=f"no model {shown(name)} here; served are {', '.join(cards)}")
        return web.json_response(cards[name])

    async def metrics(self, request: web.Request) -> web.Response:
        """Gauges in Prometheus' text format."""
        batcher = self._engine.batcher
        scheduler, counters = batcher.scheduler, batcher.counters
        num_running, num_waiting, num_used = len(scheduler.running), len(scheduler.waiting), scheduler.num_used_tokens
        num_prompt_tokens = counters.num_cached_tokens + counters.num_prefill_tokens
        num_paused = self._submissions.num_held + (num_running + num_waiting if self._engine.paused else 0)
        gauges = {
            "sglang:num_running_reqs": (num_running, "Requests being decoded."),
            "sglang:num_queue_reqs": (num_waiting, "Requests waiting for a place."),
            "sglang:num_used_tokens": (num_used, "Tokens of the KV cache that are held."),
            "sglang:token_usage": (
                num_used / self._served.limits.kv_cache_tokens,
                "Share of the KV cache that is held.",
            ),
            "sglang:gen_throughput": (counters.tokens_per_s if num_running else 0.0, "Generated tokens per second."),
            "sglang:cache_hit_rate": (
                counters.num_cached_tokens / max(1, num_prompt_tokens),
                "Share of prompt tokens found computed.",
            ),
            "sglang:num_paused_reqs": (num_paused, "Requests held or stopped by a pause."),
            "sglang:num_retracted_reqs": (scheduler.num_retractions, "Retractions since the start."),
            "arealite:num_nan_reqs": (counters.num_nan_requests, "Requests ended by logits that were not finite."),
            "arealite:num_unauthorized_reqs": (self._access.num_refused, "Calls refused for want of a key."),
            "arealite:kv_cache_bytes": (scheduler.pool.tensor.nbytes, "Size of the KV cache."),
            "process_resident_memory_bytes": (resident_bytes(), "Resident memory."),
        }
        quoted = self._settings.served_model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        lines = [
            f'# HELP {name} {text}\n# TYPE {name} gauge\n{name}{{model_name="{quoted}"}} {float(value)}\n'
            for name, (value, text) in gauges.items()
        ]
        return web.Response(text="".join(lines), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def resident_bytes() -> int:
    """This process's memory now."""
    return int(psutil.Process().memory_info().rss)


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


@web.middleware
async def answer_errors(request: web.Request, **called: Handler) -> web.StreamResponse:
    """Whatever a route raises becomes a JSON answer; the server keeps serving."""
    asked = f"{request.method} {request.path}"
    headers = None
    try:
        return await called["handler"](request)  # the keyword by which aiohttp hands it over
    except (RequestError, WeightSyncError) as error:
        status, message = 400, str(error)
    except (WaitTimeout, EngineFailure) as error:
        status, message = 503, str(error)
    except web.RequestPayloadError as error:
        status, message = 400, f"the body cannot be read: {' '.join(str(error).split())}"
    except web.HTTPRequestEntityTooLarge:
        status, message = 413, f"the body has more than {MAX_BODY_BYTES >> 20} MiB"
    except web.HTTPMethodNotAllowed as error:
        headers = {"Allow": ", ".join(sorted(error.allowed_methods))}
        status, message = 405, f"{asked}: Method Not Allowed; use {headers['Allow']}"
    except web.HTTPUnauthorized as error:
        headers, status, message = {"WWW-Authenticate": "Bearer"}, 401, f"{asked}: {error.reason}"
    except web.HTTPException as error:
        status, message = error.status, f"{asked}: {error.reason}"
    except ConnectionResetError:  # the client is gone in the middle of its stream
        return web.Response(status=499)
    except Exception:  # HTTP boundary: an error in one request must not end the server
        logger.exception("%s failed", asked)
        status, message = 500, traceback.format_exc()
    return web.json_response(error_body(status, message), status=status, headers=headers)


def build_app(engine: Engine, settings: ServerSettings) -> web.Application:
    """The application; its runner needs handler_cancellation=True so that a client's disconnect aborts."""
    model = engine.batcher.model
    limits = ServedLimits(
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        kv_cache_tokens=engine.batcher.scheduler.pool.num_tokens,
        encode=None if model.tokenizer is None else Encoder(model),
        adapters=model.adapters.names.keys(),
        may_force=settings.forced_decoding,
    )
    submissions = Submissions(engine, settings.hold_limit_s, settings.request_limit_s)
    defaults = model_defaults(model.module.generation_config.to_dict()) if settings.model_defaults else {}
    template = ChatTemplate(model.tokenizer, limits.encode, settings.tool_call_parser)
    served = Served(limits, settings.served_model_name, defaults)
    control = ControlRoutes(engine).routes()
    access = Access(settings.keys, [PAUSE, RESUME, *(route.path for route in control)])
    middlewares = [answer_errors, access.check]
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)  # type: ignore[arg-type]
    app.add_routes(ServerRoutes(engine, settings, served, template, submissions, access).routes())
    app.add_routes(control)
    return app
