"""SGLang 0.5.23 as its clients meet it: the built-in server behind a wrapper that refuses what SGLang refuses and words
its answers as SGLang does, traps included. Started by forks.py for `--strict-sglang`; used in process by
test_sglang_strict.py.

Facts: sglang 0.5.23, entrypoints/http_server.py, managers/tokenizer_manager.py, scheduler_components/weight_updater.py.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from arealite.inference.core.engine import Engine
from arealite.inference.http import routes
from arealite.inference.http.routes import ServerSettings

VERSION = "0.5.23"
UPDATES = "/update_weights_from_distributed"
CONTROL = (UPDATES, "/update_weights_from_disk", "/begin_weight_update", "/end_weight_update")
ABSENT_FROM_QUEUE_ABORTS = ("prompt_tokens", "cached_tokens", "num_retractions")


def error_body(path: str, status: int, message: str) -> dict[str, Any]:
    """A refused /generate, a refused control call, and everything else have three forms."""
    if path == "/generate" and status == 400:
        return {"error": {"message": message}}
    if path in CONTROL and status == 400:
        return {"success": False, "message": message}
    kind = str(status) if status != 400 else "BadRequest" if path.startswith("/v1/") else "Bad Request"
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def with_traps(entry: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """A logprob without a token where none was to be generated, and little about a request that was aborted in the
    queue."""
    account = entry["meta_info"]
    if body.get("return_logprob") and body["sampling_params"].get("max_new_tokens") == 0:
        account["output_token_logprobs"] = [[0.0, body["input_ids"][-1], None]]
        account["output_token_logprobs_length"] = 1
    if (account["finish_reason"] or {}).get("message") == "Abort in waiting queue":
        for key in ABSENT_FROM_QUEUE_ABORTS:
            del account[key]
    return entry


def build_app(engine: Engine, settings: ServerSettings) -> web.Application:
    """In place of the server's own."""
    app = plain_app(engine, settings)
    in_session = False

    def refused(request: web.Request) -> tuple[int, str] | None:
        if request.path == "/update_weights_from_shm":
            return 404, "Not Found"
        if request.path == "/health" and engine.paused:  # it would generate a token
            return 503, "the health check timed out"
        if request.path == "/begin_weight_update" and in_session:
            return 400, "a weight update session is open already"
        if request.path in (UPDATES, "/end_weight_update") and not in_session:
            return 400, "No weight update session is open; call /begin_weight_update first"
        return None

    @web.middleware
    async def as_sglang(request: web.Request, handler: Any) -> web.StreamResponse:
        nonlocal in_session
        no = refused(request)
        if no is not None:
            return web.json_response(error_body(request.path, *no), status=no[0])
        body: dict[str, Any] = {}
        if request.path == "/generate":
            body = json.loads(await request.read())
            # A missing max_new_tokens counts in full, and is not cut to what fits.
            body["sampling_params"] = {"max_new_tokens": 128, **(body.get("sampling_params") or {})}
            request._read_bytes = json.dumps(body).encode()
        response = await handler(request)
        if request.path in ("/begin_weight_update", "/end_weight_update"):
            in_session = request.path == "/begin_weight_update"
        if not isinstance(response, web.Response) or not isinstance(response.body, bytes):
            return response
        if response.status >= 400:
            answer = json.loads(response.body)
            refusal = error_body(request.path, response.status, answer["message"])
            return web.json_response(refusal, status=response.status)
        if request.path == "/server_info":
            return web.json_response({**json.loads(response.body), "version": VERSION})
        if request.path == "/generate" and "input_ids" in body and isinstance(json.loads(response.body), dict):
            return web.json_response(with_traps(json.loads(response.body), body))
        return response

    app.middlewares.insert(0, as_sglang)
    return app


plain_app = routes.build_app
