"""How bodies are read and errors answered on every route of the server. Used by routes.py and control.py."""

from __future__ import annotations

import json
import logging
import traceback
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from arealite.api.errors import RequestError, WaitTimeout, WeightSyncError
from arealite.inference.engine import SHUTDOWN, EngineFailure

logger = logging.getLogger(__name__)


def error_response(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def failed_control(message: str) -> web.Response:
    """SGLang's answer to a control call that was refused."""
    return web.json_response({"success": False, "message": message}, status=400)


@web.middleware
async def answer_errors(request: web.Request, **called: Handler) -> web.StreamResponse:
    """Turn whatever a route raises into a JSON answer; the server keeps serving."""
    try:
        return await called["handler"](request)  # the keyword by which aiohttp hands it over
    except RequestError as error:
        return error_response(400, str(error))
    except WeightSyncError as error:
        return failed_control(str(error))
    except WaitTimeout as error:
        return error_response(503, str(error))
    except EngineFailure as error:
        return error_response(503 if str(error) == SHUTDOWN else 500, str(error))
    except web.HTTPException as error:
        return error_response(error.status, f"{request.method} {request.path}: {error.reason}")
    except Exception:  # HTTP boundary: an error in one request must not end the server
        logger.exception("%s %s failed", request.method, request.path)
        return error_response(500, traceback.format_exc())


async def read_json(request: web.Request, empty: Any = None) -> Any:
    """The body as JSON; `empty` stands for a body of no bytes.

    Raises:
        RequestError: not JSON, or not UTF-8.
    """
    raw = await request.read()
    if not raw and empty is not None:
        return empty
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON ({type(error).__name__}: {str(error)[:200]})") from error


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; no bytes count as {}."""
    body = await read_json(request, empty={})
    if not isinstance(body, dict):
        raise RequestError(f"the body: expected a JSON object, found a {type(body).__name__}")
    return body


def string_field(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name}: expected a string, found {str(value)[:60]!r}")
    return value


def flag_field(body: dict[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name}: expected true or false, found {str(value)[:60]!r}")
    return value


def names_field(body: dict[str, Any], name: str) -> list[str]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise RequestError(f"{name}: expected a list of strings, found {str(value)[:60]!r}")
    return value
