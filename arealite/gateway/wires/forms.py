"""What all wire formats come down to: contents as text, an answer as blocks that grow, a reply, and a refusal.

Used by the modules beside it, one for each format, and by gateway/server.py.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from arealite.api.errors import RequestError
from arealite.gateway.asks import Answer, Ask, CallOfTool
from arealite.inference.core.requests import Body
from arealite.inference.http.bodies import shown

BlockKind = Literal["reasoning", "text", "call"]
COMMENT = b": waiting\n\n"  # server-sent events of no meaning keep a connection alive


class Refusal(RequestError):
    """Answered with `status` in the form of the wire it was asked by; `code` is for programs."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class SamplingBody(Body):
    """What may be asked of sampling, by the names of GenerationRequest. It is recorded, and done as far as the run's
    own settings are the same."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None


def sampling_of(body: SamplingBody, max_new_tokens: int | None, stop: str | list[str] | None) -> dict[str, Any]:
    """The values that were given."""
    asked = {name: vars(body)[name] for name in SamplingBody.model_fields}
    asked["max_new_tokens"] = max_new_tokens
    asked["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ()) or None
    return {name: value for name, value in asked.items() if value is not None}


def text_of(place: str, content: Any, between: str = "\n") -> str:
    """Text, or the texts of a list of parts. Raises Refusal: a part is none, such as an image."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Refusal(400, f"{place}: expected text or a list of parts, found {shown(content)}")
    return between.join(text_part(f"{place}[{i}]", part) for i, part in enumerate(content))


def text_part(place: str, part: Any) -> str:
    """As `text_of`."""
    text = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise Refusal(400, f"{place}: only text can be read here, found a part of type {shown(kind)}")
    return text


def function_tool(name: str, description: Any, parameters: Any) -> dict[str, Any]:
    """A tool in the chat form."""
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def checked_choice(choice: Any, tools: list[dict[str, Any]]) -> str:
    """none, auto, required or a function's name. Raises Refusal: it is none of these, or not among the tools."""
    if not isinstance(choice, str):
        raise Refusal(400, f"tool_choice: expected none, auto, required or a function, found {shown(choice)}")
    names = [tool["function"]["name"] for tool in tools]
    if choice not in ("none", "auto", *(names or ["none"]), *(["required"] if names else [])):
        raise Refusal(400, f"tool_choice: {shown(choice)} is not among the tools {', '.join(names) or '(none)'}")
    return choice


@dataclass
class AnswerBlock:
    """A part of an answer: what was thought, text, or one call, whose arguments are the text. `ordinal` counts those
    of its kind."""

    index: int
    kind: BlockKind
    ordinal: int
    call: CallOfTool | None = None
    text: str = ""
    id: str = ""


@dataclass
class AnswerBlocks:
    """An answer as blocks, one open at a time. What is thought comes first, then text, then calls; text that is
    sampled after a call is a block of its own."""

    id_prefixes: dict[BlockKind, str]
    blocks: list[AnswerBlock] = field(default_factory=list)
    _lengths: dict[str, int] = field(default_factory=dict)  # of what is in blocks
    is_closed: bool = False

    def news(self, answer: Answer) -> Iterator[tuple[Literal["open", "more", "close"], AnswerBlock, str]]:
        """What there is since the last call; nothing twice. An answer that says nothing has one empty text."""
        parts: list[tuple[str, BlockKind, str, CallOfTool | None]] = [
            ("reasoning", "reasoning", answer.reasoning, None),
            ("text", "text", answer.text, None),
            *((call.id, "call", call.arguments, call) for call in answer.calls),
        ]
        has_ended = answer.reason is not None and not self.is_closed
        for name, kind, text, call in parts:
            is_new_call = call is not None and name not in self._lengths
            is_only = has_ended and name == "text" and not (answer.calls or self.blocks)
            if len(text) > self._lengths.get(name, 0) or is_new_call or is_only:
                yield from self._write(kind, text[self._lengths.get(name, 0) :], call)
                self._lengths[name] = len(text)
        if has_ended:
            self.is_closed = True
            yield "close", self.blocks[-1], ""

    def _write(self, kind: BlockKind, text: str, call: CallOfTool | None) -> Iterator[Any]:
        last = self.blocks[-1] if self.blocks else None
        if last is None or last.kind != kind or (call and last.call and last.call.id != call.id):
            if last is not None:
                yield "close", last, ""
            ordinal = sum(block.kind == kind for block in self.blocks)
            last = AnswerBlock(len(self.blocks), kind, ordinal, call, "", new_id(self.id_prefixes[kind]))
            self.blocks.append(last)
            yield "open", last, ""
        if text:
            last.text += text
            yield "more", last, text


class Reply:
    """The reply to one request, whole or as a stream of server-sent events. Its parts are called in this order:
    `grown` for each choice whenever it has more, `ended` once; or `whole`; or at any time `failed`."""

    ping: ClassVar[bytes] = COMMENT
    ask: Ask
    id: str
    is_stream: bool

    def grown(self, choice: int, answer: Answer) -> bytes:
        """Events with what is new."""
        raise NotImplementedError

    def ended(self, answers: list[Answer]) -> bytes:
        """The last events, after all is told that was sampled."""
        raise NotImplementedError

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        raise NotImplementedError

    def failed(self, refusal: Refusal) -> bytes:
        """The event of an error in the midst of a stream."""
        raise NotImplementedError


def blocks_of(answer: Answer, id_prefixes: dict[BlockKind, str]) -> list[AnswerBlock]:
    """Of a whole answer."""
    blocks = AnswerBlocks(id_prefixes)
    list(blocks.news(answer))
    return blocks.blocks


def sse(payload: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(payload)}\n\n".encode()


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
