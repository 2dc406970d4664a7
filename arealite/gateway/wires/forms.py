"""The middle form of all wires: what is asked is an Ask, and an answer grows by parts. A format reads the one with
pydantic, and writes the other as events; the rest is here.

Used by the modules beside it, one for each format, and by gateway/server.py.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from arealite.api.errors import PromptError, RequestError
from arealite.dataset.prompts import chat_messages
from arealite.gateway.asks import Answer, Ask, CallOfTool, Message
from arealite.inference.core.requests import Body
from arealite.inference.http.bodies import shown

Act = Literal["open", "more", "close", "end"]  # end: of the whole answer, after its last part is closed
PartKind = Literal["reasoning", "text", "call"]
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")


class Refusal(RequestError):
    """Answered with `status` in the form of the wire it was asked by; `code` is for programs."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def text_of(part: Any) -> str:
    """Of a part of a content. Raises PydanticCustomError: it has none, such as an image."""
    text = part
    if isinstance(part, dict):
        text = part.get("text", part.get("refusal"))
        if isinstance(source := part.get("source"), dict) and source.get("type") == "text":  # Anthropic's documents
            text = source.get("data")
    if not isinstance(text, str):
        raise PydanticCustomError("text", "only text can be read here")
    return text


# A content: one text, or a list of parts.
Texts = Annotated[
    list[Annotated[str, BeforeValidator(text_of)]],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]
Length = Annotated[int, Field(ge=1)] | None


def _typed(given: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(given.get("type"), str | None):
        raise PydanticCustomError("type", "its type is to be text")
    return given


B = TypeVar("B", bound=Body)
Typed = Annotated[dict[str, Any], AfterValidator(_typed)]  # an object of a type that others may know


def has(part: B, name: str) -> B:
    """Raises PydanticCustomError: its field of that name is empty."""
    if not vars(part)[name]:
        raise PydanticCustomError("missing_part", "{name} is missing", {"name": name})
    return part


class AskBody(Body):
    """What the bodies of all formats have. What is asked of sampling is recorded, and done as far as the run's own
    settings are the same."""

    model: str = ""
    stream: bool = False
    tools: list[Typed] = Field(default_factory=list)
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None

    def ask(self, wire: str, model: str, max_new_tokens: int | None, stop: tuple[str, ...] = (), **more: Any) -> Ask:
        """`more` are fields of Ask. Raises Refusal: `tool_choice` is not among the tools."""
        asked = {
            **{name: vars(self)[name] for name in SAMPLING},
            "max_new_tokens": max_new_tokens,
            "stop": stop or None,
        }
        sampling = {name: value for name, value in asked.items() if value is not None}
        ask = Ask(**more, sampling=sampling, wire=wire, model=self.model or model)
        names = [tool["function"]["name"] for tool in ask.tools]
        if not isinstance(ask.tool_choice, str):
            found = shown(ask.tool_choice)
            raise Refusal(400, f"tool_choice: expected none, auto, required or a function, found {found}")
        if ask.tool_choice not in ("none", "auto", *(["required", *names] if names else [])):
            among = ", ".join(names) or "(none)"
            raise Refusal(400, f"tool_choice: {shown(ask.tool_choice)} is not among the tools {among}")
        return ask


def refuse_format(place: str, given: Any) -> None:
    """Raises Refusal: an answer of another form than text is asked for, {"type": "json_schema"} for one."""
    if given and not (isinstance(given, dict) and given.get("type") == "text"):
        raise Refusal(400, f"{place}: answers cannot be held to a format here, found {shown(given)}; leave it out")


def refuse_fields(fields: dict[str, Any], *names: str) -> None:
    """Raises Refusal: one of them is set."""
    for name in names:
        if fields.get(name):
            raise Refusal(400, f"{name}: not supported here; leave it out")


def clean_messages(messages: list[Message], name: str = "messages") -> list[Message]:
    """In the form of an Ask; `name` is the client's. Raises Refusal: there is none, or one is wrong."""
    if not messages:
        raise Refusal(400, f"{name}: it is empty; at least one message is needed")
    try:
        return chat_messages(name, messages)
    except PromptError as error:
        raise Refusal(400, str(error)) from error


def function_tool(place: str, given: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """A tool in the chat form. Raises Refusal: it has no name."""
    if not isinstance(name := given.get("name"), str):
        raise Refusal(400, f"{place}.name: expected a name, found {shown(name)}")
    function = {"name": name, "description": given.get("description"), "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def call_message(id: str, name: Any, arguments: Any) -> dict[str, Any]:
    """A call as an assistant's message has it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass
class AnswerPart:
    """What was thought, text, or one call, whose arguments are the text. `ordinal` counts those of its kind."""

    index: int
    kind: PartKind
    ordinal: int
    call: CallOfTool | None = None
    text: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


News = tuple[Act, AnswerPart, str]


@dataclass
class AnswerParts:
    """An answer as parts, one open at a time. What is thought comes first, then text, then calls; text that is sampled
    after a call is a part of its own."""

    parts: list[AnswerPart] = field(default_factory=list)
    _lengths: dict[str, int] = field(default_factory=dict)  # of what is in parts
    _has_ended: bool = False

    def news(self, answer: Answer) -> Iterator[News]:
        """What there is since the last call; nothing twice. An answer that says nothing has one empty text."""
        if self._has_ended:
            return
        self._has_ended = answer.reason is not None
        sources: list[tuple[str, PartKind, str, CallOfTool | None]] = [
            ("reasoning", "reasoning", answer.reasoning, None),
            ("text", "text", answer.text, None),
            *((call.id, "call", call.arguments, call) for call in answer.calls),
        ]
        for name, kind, text, call in sources:
            is_new_call = call is not None and name not in self._lengths
            is_only = self._has_ended and name == "text" and not (answer.calls or self.parts)
            if len(text) > self._lengths.get(name, 0) or is_new_call or is_only:
                yield from self._write(kind, text[self._lengths.get(name, 0) :], call)
                self._lengths[name] = len(text)
        if self._has_ended:
            yield "close", self.parts[-1], ""
            yield "end", self.parts[-1], ""

    def _write(self, kind: PartKind, text: str, call: CallOfTool | None) -> Iterator[News]:
        last = self.parts[-1] if self.parts else None
        if last is None or last.kind != kind or (call and last.call and last.call.id != call.id):
            if last is not None:
                yield "close", last, ""
            last = AnswerPart(len(self.parts), kind, sum(part.kind == kind for part in self.parts), call)
            self.parts.append(last)
            yield "open", last, ""
        if text:
            last.text += text
            yield "more", last, text


class Reply:
    """The reply to one request, whole or as a stream of server-sent events. Its methods are called in this order:
    `grown` for each choice whenever it has more, `ended` once; or `whole`; or at any time `failed`."""

    ping: ClassVar[bytes] = b": waiting\n\n"  # a comment, which keeps a connection alive

    def __init__(self, ask: Ask, is_stream: bool, prefix: str) -> None:
        self.ask, self.is_stream, self.id = ask, is_stream, f"{prefix}_{uuid.uuid4().hex}"
        self.choices = [AnswerParts() for _ in range(ask.num_samples)]
        self.has_begun = False

    def grown(self, choice: int, answer: Answer) -> bytes:
        """Events with what is new."""
        events = [] if self.has_begun else self.first_events(answer)
        self.has_begun = True
        for act, part, text in self.choices[choice].news(answer):
            events += self.events(choice, answer, act, part, text)
        return self.sent(events)

    def ended(self, answers: list[Answer]) -> bytes:
        """The last events, after all is told that was sampled."""
        return self.sent(self.last_events(answers))

    def failed(self, refusal: Refusal) -> bytes:
        """The event of an error in the midst of a stream."""
        return self.sent([self.error(refusal)])

    def sent(self, events: Iterable[dict[str, Any]]) -> bytes:
        """As server-sent events, named where they have a type."""
        heads = ((f"event: {event['type']}\n" if "type" in event else "", event) for event in events)
        return "".join(f"{head}data: {json.dumps(event)}\n\n" for head, event in heads).encode()

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        raise NotImplementedError

    def first_events(self, answer: Answer) -> list[dict[str, Any]]:
        """Before all others; none where a format has no such."""
        return []

    def events(self, choice: int, answer: Answer, act: Act, part: AnswerPart, text: str) -> list[dict[str, Any]]:
        """Of one piece of news; `part` has what came of it so far, `text` with it."""
        raise NotImplementedError

    def last_events(self, answers: list[Answer]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def error(self, refusal: Refusal) -> dict[str, Any]:
        raise NotImplementedError


def token_logprobs(sampled: Iterable[tuple[str, list[int], float]]) -> list[dict[str, Any]]:
    """As OpenAI's formats have them, of Answer.sampled."""
    return [{"token": t, "bytes": b, "logprob": p, "top_logprobs": []} for t, b, p in sampled]


def parts_of(answer: Answer) -> list[AnswerPart]:
    """Of a whole answer."""
    parts = AnswerParts()
    list(parts.news(answer))
    return parts.parts
