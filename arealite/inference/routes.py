"""The HTTP surface of the built-in server: generation, pausing, health and introspection (SGLang's wire protocol).

`build_app` is called by serve.py and by tests. Handlers validate, wait and render; the engine thread does the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from arealite.api.errors import RequestError, WaitTimeout, WeightSyncError
from arealite.inference.bodies import field, read_json, read_object, shown
from arealite.inference.control import ControlRoutes
from arealite.inference.engine import PAUSE_MODES, Engine, EngineFailure
from arealite.inference.requests import ServedLimits, parse_generate
from arealite.inference.responses import render
from arealite.observe import waits

logger = logging.getLogger(__name__)

SERVER_VERSION = "arealite-native-0.1"
MAX_BODY_BYTES = 256 << 20
HEALTH_LIMIT_S = 20.0


def error_response(status: int, message: str) -> web.Response:
    """Both forms that clients of the protocol look for: of a refused request, and of a refused control call."""
    return web.json_response({"error": {"message": message}, "success": False, "message": message}, status=status)


@web.middleware
async def answer_errors(request: web.Request, **called: Handler) -> web.StreamResponse:
    """Turn whatever a route raises into a JSON answer; the server keeps serving."""
    try:
        return await called["handler"](request)  # the keyword by which aiohttp hands it over
    except (RequestError, WeightSyncError) as error:
        return error_response(400, str(error))
    except (WaitTimeout, EngineFailure) as error:
        return error_response(503, str(error))
    except web.HTTPException as error:
        return error_response(error.status, f"{request.method} {request.path}: {error.reason}")
    except Exception:  # HTTP boundary: an error in one request must not end the server
        logger.exception("%s %s failed", request.method, request.path)
        return error_response(500, traceback.format_exc())


@dataclass(frozen=True)
class ServerSettings:
    """What the routes need besides the engine. `flags` are the command line's, for /server_info."""

    served_model_name: str
    flags: dict[str, Any]
    hold_limit_s: float = 600.0  # longest time a new request is held while paused
    request_limit_s: float = 3600.0  # longest time a request may take


class ServerRoutes:
    """Handlers over one engine."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        model = engine.batcher.model
        self._engine = engine
        self._settings = settings
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._started_at = time.time()
        self.limits = ServedLimits(
            vocab_size=model.vocab_size,
            context_length=model.context_length,
            kv_cache_tokens=engine.batcher.scheduler.pool.num_tokens,
            encode=None if model.tokenizer is None else (lambda text: list(model.tokenizer(text).input_ids)),
        )

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/generate", self.generate),
            web.post("/abort_request", self.abort),
            web.post("/pause_generation", self.pause),
            web.post("/continue_generation", self.resume),
            web.get("/health", self.health),
            web.get("/health_generate", self.health_generate),
            web.get("/ready", self.ready),
            web.get("/ping", self.ping),
            web.get("/model_info", self.model_info),
            web.get("/get_model_info", self.model_info),
            web.get("/server_info", self.server_info),
            web.get("/get_server_info", self.server_info),
            web.get("/v1/models", self.models),
            web.get("/v1/loads", self.loads),
        ]

    async def generate(self, request: web.Request) -> web.Response:
        """Validate, be held while paused, sample. A client that goes away aborts its requests."""
        call = parse_generate(await read_json(request), self.limits)
        requests, batched = call.requests, call.batched
        rids = [r.rid for r in requests]
        while not self._resumed.is_set():  # the next pause may come before the event loop is here again
            limit_s = self._settings.hold_limit_s
            await waits.bounded(self._resumed.wait(), "continue_generation", "client", limit_s, rids)
        sequences = [self._engine.submit(r) for r in requests]
        ended = asyncio.gather(*(asyncio.wrap_future(s.future) for s in sequences))
        try:
            await waits.bounded(ended, "generation", "engine", self._settings.request_limit_s, rids)
        finally:
            if not all(s.future.done() for s in sequences):  # the client is gone, or the limit has passed
                self._engine.call(lambda: self._engine.abort(sequences.__contains__))
        tokenizer = self._engine.batcher.model.tokenizer
        answers = [render(tokenizer, s) for s in sequences]
        return web.json_response(answers if batched else answers[0])

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
        self._resumed.clear()
        await self._engine.ask("pause_generation", lambda: self._engine.pause(mode))
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        await read_object(request)
        self._resumed.set()  # those who are held run after the call is in the engine's inbox
        await self._engine.ask("continue_generation", self._engine.resume)
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine thread lives, paused or not."""
        if self._engine.stopped.is_set():
            return error_response(503, self._engine.failure or "the engine has stopped")
        return web.Response()

    async def health_generate(self, request: web.Request) -> web.Response:
        """200 when the engine thread answers between two steps; works while paused."""
        await self._engine.ask("health_generate", lambda: None, HEALTH_LIMIT_S)
        return web.Response()

    async def ready(self, request: web.Request) -> web.Response:
        if not self._resumed.is_set():
            return error_response(503, f"generation is paused ({self._engine.paused})")
        return await self.health(request)

    async def ping(self, request: web.Request) -> web.Response:
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        model = self._engine.batcher.model
        return web.json_response(
            {
                "model_path": model.path,
                "served_model_name": self._settings.served_model_name,
                "tokenizer_path": model.path,
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
        counters, scheduler = self._engine.batcher.counters, self._engine.batcher.scheduler
        state = {**vars(counters), "last_gen_throughput": counters.tokens_per_s}
        return web.json_response(
            {
                **self._settings.flags,
                "version": SERVER_VERSION,
                "tp_size": 1,
                "pp_size": 1,
                "dp_size": 1,
                "ep_size": 1,
                "context_length": self.limits.context_length,
                "max_total_num_tokens": self.limits.kv_cache_tokens,
                "max_req_input_len": self.limits.max_tokens - 1,
                "startup_time": self._started_at,
                "weight_version": self._engine.batcher.weight_version,
                "paused": self._engine.paused,
                "internal_states": [{**state, "num_retractions": scheduler.num_retractions}],
            }
        )

    async def models(self, request: web.Request) -> web.Response:
        card = {
            "id": self._settings.served_model_name,
            "object": "model",
            "created": int(self._started_at),
            "owned_by": "arealite",
            "root": self._engine.batcher.model.path,
            "parent": None,
            "max_model_len": self.limits.context_length,
        }
        return web.json_response({"object": "list", "data": [card]})

    async def loads(self, request: web.Request) -> web.Response:
        scheduler = self._engine.batcher.scheduler
        counters = self._engine.batcher.counters
        used, total = scheduler.num_used_tokens, self.limits.kv_cache_tokens
        seen = counters.num_cached_tokens + counters.num_prefill_tokens
        load = {
            "dp_rank": 0,
            "num_running_reqs": len(scheduler.running),
            "num_waiting_reqs": len(scheduler.waiting),
            "num_used_tokens": used,
            "num_total_tokens": used,
            "max_total_num_tokens": total,
            "max_running_requests": scheduler.max_running,
            "token_usage": used / total,
            "gen_throughput": counters.tokens_per_s if scheduler.running else 0.0,
            "cache_hit_rate": counters.num_cached_tokens / seen if seen else 0.0,
            "utilization": len(scheduler.running) / scheduler.max_running,
            "num_nan_reqs": counters.num_nan_requests,
        }
        return web.json_response({"timestamp": time.time(), "version": SERVER_VERSION, "loads": [load]})


def build_app(engine: Engine, settings: ServerSettings) -> web.Application:
    """The application; its runner needs handler_cancellation=True so that a client's disconnect aborts."""
    app = web.Application(middlewares=[answer_errors], client_max_size=MAX_BODY_BYTES)  # type: ignore[list-item]
    app.add_routes([*ServerRoutes(engine, settings).routes(), *ControlRoutes(engine).routes()])
    return app
