"""Bodies of HTTP requests: read as JSON, their values checked one by one. Whatever is wrong is a RequestError, which
becomes status 400. Called by requests.py, routes.py and control.py.
"""

from __future__ import annotations

import json
import math
from reprlib import repr as shown  # what was found, shortened
from typing import Any, TypeVar

from aiohttp import web

from arealite.api.errors import RequestError


class WrongType(RequestError):
    """A value of another JSON type than the protocol has there, or a key that it has not."""


T = TypeVar("T")
D = TypeVar("D")

_CALLED = {str: "a string", bool: "true or false", int: "an integer", list: "a list", dict: "a JSON object"}


async def read_json(request: web.Request) -> Any:
    """The body as JSON."""
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON ({type(error).__name__}: {str(error)[:200]})") from error


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object; no bytes count as {}."""
    return of_type("the body", await read_json(request) if await request.read() else {}, dict)


def of_type(name: str, value: Any, kind: type[T]) -> T:
    """The value, if it is a JSON `kind`: str, bool, int, list or dict."""
    if type(value) is not kind:
        raise WrongType(f"{name}: expected {_CALLED[kind]}, found {shown(value)}")
    return value


def field(body: dict[str, Any], name: str, kind: type[T], default: D) -> T | D:
    """body[name] of this type; `default` where it is absent or null."""
    value = body.get(name)
    return default if value is None else of_type(name, value, kind)


def strings(name: str, value: Any) -> list[str]:
    """A list of strings."""
    return [of_type(f"{name}[{i}]", entry, str) for i, entry in enumerate(of_type(name, value, list))]


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer of at least `low` and at most `high`."""
    number = of_type(name, value, int)
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name}: expected {bound}, found {shown(value)}")
    return number


def number(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> float:
    """A finite number of at least (`open_low`: above) `low` and at most `high`."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or not low <= found <= high or (open_low and found == low):
        span = f"{'above' if open_low else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        refusal = RequestError if type(value) in (int, float) else WrongType
        raise refusal(f"{name}: expected a finite number {span}, found {shown(value)}")
    return found
