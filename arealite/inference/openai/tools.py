"""Calls of functions in the text that a model writes, and how a model is brought to write one.

Two ways of writing: Hermes / Qwen (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`) and plain JSON as Llama
3 has it (`{"name": ..., "parameters": {...}}`, several divided by ";"). Used by chat.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from arealite.inference.core.answers import held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"  # Llama 3 writes it before a call
# "auto" reads both ways of writing, and asks for the first.
PARSERS = {"auto": "auto", "hermes": "hermes", "qwen25": "hermes", "llama3": "plain", "json": "plain"}

_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is JSON text, as the OpenAI protocol has it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolUse:
    """The functions that a request offers. `forced` is the beginning of a call that the prompt already ends with, ""
    when the model is free not to call; `forced_name` is the function it begins to call, None when that is open."""

    names: tuple[str, ...]
    way: str
    forced: str = ""
    forced_name: str | None = None


def forced_start(way: str, name: str | None) -> str:
    """What every call begins with. It ends where the models' tokenisers like to be cut: before a blank."""
    key = "parameters" if way == "plain" else "arguments"
    named = "" if name is None else f' {json.dumps(name)}, "{key}":'
    return ("" if way == "plain" else f"{OPEN}\n") + '{"name":' + named


def instructions(tools: list[dict[str, Any]], way: str) -> str:
    """For the system message of a model whose chat template knows nothing of tools."""
    functions = [tool["function"] for tool in tools]
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    parameters = functions[0].get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    arguments = dict.fromkeys(properties if isinstance(properties, dict) else [], "...")
    example = json.dumps({"name": functions[0]["name"], ("parameters" if way == "plain" else "arguments"): arguments})
    if way != "plain":
        example = f"{OPEN}\n{example}\n{CLOSE}"
    return f"These functions can be called:\n{listed}\nA call is written like this:\n{example}"


def as_text(calls: Iterable[dict[str, Any]]) -> str:
    """Earlier calls of an assistant message, for such a model."""
    return "".join(f"\n{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls)


def read_calls(text: str, use: ToolUse, complete: bool) -> tuple[str, list[ToolCall]]:
    """What an answer says, and what it calls. With a longer text of the same answer both only grow; what may still
    become a call is left out until it is one, or until the text is `complete`: then nothing is left out."""
    if use.forced:
        return _forced(text, use, complete)
    if not complete and not held_back(text.lstrip(), [PYTHON_TAG]):
        return "", []
    body = text.lstrip().removeprefix(PYTHON_TAG).lstrip()
    if use.way != "hermes" and (body.startswith(("{", "[")) or (not body and not complete)):
        if not complete:
            return "", []
        calls = _plain_calls(body, use)
        if calls:
            return "", calls
    return (text, []) if use.way == "plain" else _tagged(text, complete)


def _forced(text: str, use: ToolUse, complete: bool) -> tuple[str, list[ToolCall]]:
    """A named function's arguments may come first and alone, whatever follows them."""
    if use.forced_name is not None:
        arguments = _object_at(text.lstrip())[0]
        call = _call({"name": use.forced_name, "arguments": arguments})
    else:
        call = _call(_object_at((use.forced + text).removeprefix(OPEN).lstrip())[0])
    if call is not None:
        return "", [call]
    return (use.forced + text if complete else ""), []


def _tagged(text: str, complete: bool) -> tuple[str, list[ToolCall]]:
    content, rest = "", text
    calls: list[ToolCall] = []
    while OPEN in rest:
        before, _, after = rest.partition(OPEN)
        content += before
        found, num_read = _object_at(after.lstrip())
        call = _call(found)
        tail = after.lstrip()[num_read:].lstrip()
        closed = tail.startswith(CLOSE)
        if call is None or not (closed or complete):
            if not complete:
                return content, calls
            malformed, close, rest = after.partition(CLOSE)
            content += OPEN + malformed + close
            continue
        calls.append(call)
        rest = tail.removeprefix(CLOSE).lstrip()
    return content + (rest if complete else held_back(rest, [OPEN])), calls


def _plain_calls(body: str, use: ToolUse) -> list[ToolCall]:
    """The calls that the whole of a text consists of; none if anything in it is no call of an offered function."""
    calls: list[ToolCall] = []
    while body:
        found, num_read = _object_at(body)
        entries = found if isinstance(found, list) else [found]
        read = [_call(entry) for entry in entries]
        if not read or any(call is None or call.name not in use.names for call in read):
            return []
        calls += [call for call in read if call is not None]
        body = body[num_read:].lstrip().removeprefix(";").lstrip()
    return calls


def _object_at(text: str) -> tuple[Any, int]:
    """The JSON value that the text begins with, and its length; (None, 0) where there is none."""
    try:
        return _decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


def _call(found: Any) -> ToolCall | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _object_at(arguments)[0]
    if not isinstance(arguments, dict):
        return None
    try:
        return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):  # NaN and 1e999, which Python reads and clients cannot; or just too deep
        return None
