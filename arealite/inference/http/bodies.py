"""Bodies of HTTP requests: bytes to checked records. Whatever is wrong is a RequestError, which becomes status 400.

Called by routes.py, control.py, generation.py and openai/.
"""

from __future__ import annotations

from reprlib import repr as shown  # what was found, shortened
from typing import Any, TypeVar

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import from_json

from arealite.api.errors import RequestError
from arealite.inference.core.requests import Body

B = TypeVar("B", bound=Body)

MAX_SHOWN = 3  # of what is wrong with one body
_WORDS = {
    "Input should be": "expected",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "a string",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "a valid tuple": "a list",
    "a valid frozenset": "a list",
    "a valid dictionary": "a JSON object",
}


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; no bytes count as {}."""
    raw = await request.read()
    try:
        return json_object("the body", from_json(raw) if raw else {})
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON ({str(error)[:200]})") from error


async def read_body(request: web.Request, kind: type[B]) -> B:
    """The body as a record of this kind."""
    return checked(kind, await read_json(request))


def json_object(name: str, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise RequestError(f"{name}: expected a JSON object, found {shown(value)}")
    return value


def checked(kind: type[B], fields: dict[str, Any], within: str = "", rows: dict[str, str] | None = None) -> B:
    """The record. For the message, `within` stands before all names, and `rows` behind some: "[2]", of a batch."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise refusal(error, within, rows) from error


def refusal(error: ValidationError, within: str = "", rows: dict[str, str] | None = None) -> RequestError:
    """What pydantic found, in our words: the name, what is expected there, and what was found."""
    messages = []
    for fault in error.errors(include_url=False, include_context=False)[:MAX_SHOWN]:
        first, *more = fault["loc"]
        place = within + str(first) + (rows or {}).get(str(first), "")
        place += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in more)
        if fault["type"] == "missing":
            messages.append(f"{place}: it is missing")
            continue
        text = fault["msg"]
        for pydantics, ours in _WORDS.items():
            text = text.replace(pydantics, ours)
        messages.append(f"{place}: {text}, found {shown(fault['input'])}")
    return RequestError("; ".join(messages))
