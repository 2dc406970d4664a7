"""OpenAI's Responses, with the conversations that previous_response_id goes on with. Called by gateway/server.py."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from arealite.gateway.asks import Answer, Message
from arealite.gateway.wires import forms
from arealite.gateway.wires.forms import AnswerPart, Refusal, Reply
from arealite.gateway.wires.openai_chat import openai_error
from arealite.inference.core.requests import Body
from arealite.inference.http.bodies import checked, shown

RAW_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}  # of a custom tool
ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"  # what may be included
SEAL = "arealite:"  # begins what stands for encrypted content: what was thought, for clients that keep only that
PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}  # of ids
ECHOED = frozenset((
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id", "store",
    "temperature", "tool_choice", "tools", "top_p",
))  # fmt: skip
Kind = Literal[
    "message", "reasoning", "function_call", "custom_tool_call", "function_call_output", "custom_tool_call_output"
]


class InputPiece(Body):
    """Of any type."""

    type: Kind = "message"
    role: Literal["", "user", "assistant", "system", "developer"] = ""
    content: forms.Texts = Field(default_factory=list)
    summary: forms.Texts = Field(default_factory=list)
    encrypted_content: str = ""
    call_id: str = ""
    name: str = ""
    arguments: Any = None
    input: str = ""
    output: forms.Texts = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        needed = {"message": "role", "function_call": "name", "custom_tool_call": "name"}.get(self.type)
        return forms.has(self, needed) if needed else self

    def thought(self) -> str:
        """Raises Refusal: it is sealed, by others."""
        if self.content or not self.encrypted_content.startswith(SEAL):
            return "".join(self.content) or "\n".join(self.summary)
        try:
            return base64.b64decode(self.encrypted_content.removeprefix(SEAL), validate=True).decode()
        except ValueError as error:
            raise Refusal(400, "input: encrypted_content is not what was sent by this server") from error


def _as_pieces(given: Any) -> Any:
    """Text is what a user says."""
    if not isinstance(given, list):
        return _as_pieces([given] if given else []) if isinstance(given, str) else given
    return [{"role": "user", "content": one} if isinstance(one, str) else one for one in given]


class ResponsesBody(forms.AskBody):
    input: Annotated[list[InputPiece], BeforeValidator(_as_pieces)] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: forms.Length = None
    reasoning: dict[str, Any] = Field(default_factory=dict)
    text: dict[str, Any] = Field(default_factory=dict)
    include: list[str] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)
    store: bool = True


def folded(pieces: Iterable[InputPiece]) -> list[Message]:
    """Pieces as messages: what was thought, said and called in one turn is one message."""
    messages: list[Message] = []
    turn: Message | None = None  # the assistant's, as long as it may go on
    for piece in pieces:
        if piece.type == "message" and piece.role != "assistant":
            role = "system" if piece.role == "developer" else piece.role
            messages.append({"role": role, "content": "\n".join(piece.content)})
            turn = None
        elif piece.type.endswith("_output"):
            messages.append({"role": "tool", "content": "\n".join(piece.output), "tool_call_id": piece.call_id})
            turn = None
        else:
            has_called = bool(turn and "tool_calls" in turn)
            begins_anew = {"message": turn and turn["content"] and not has_called,
                           "reasoning": turn and (turn["content"] or has_called)}  # fmt: skip
            if turn is None or begins_anew.get(piece.type):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            if piece.type == "message":
                turn["content"] += "".join(piece.content)
            elif piece.type == "reasoning":
                turn["reasoning_content"] = turn.get("reasoning_content", "") + piece.thought()
            else:
                arguments = piece.arguments if piece.type == "function_call" else {"input": piece.input}
                turn.setdefault("tool_calls", []).append(forms.call_message(piece.call_id, piece.name, arguments))
    return messages


class ResponsesReply(Reply):
    """Of responses. `earlier` has the conversations up to the responses of this session, by their ids; what is asked
    and the answer come to it under this one's. Raises RequestError: the body is wrong."""

    def __init__(self, fields: dict[str, Any], model: str, earlier: Mapping[str, list[Message]]) -> None:
        forms.refuse_fields(fields, "conversation", "background", "prompt", "top_logprobs")
        self._body = body = checked(ResponsesBody, fields)
        forms.refuse_format("text.format", body.text.get("format"))
        # Tools that OpenAI's servers run are left out: clients declare them whether they are there or not.
        kinds = {"function": lambda tool: tool.get("parameters"), "custom": lambda tool: RAW_INPUT}
        tools = [
            forms.function_tool(f"tools[{i}]", tool, kinds[tool["type"]](tool))
            for i, tool in enumerate(body.tools)
            if tool.get("type") in kinds
        ]
        self._customs = {tool["name"] for tool in body.tools if tool.get("type") == "custom"}
        choice = body.tool_choice
        if isinstance(choice, dict):
            choice = choice.get("mode", "auto") if choice.get("type") == "allowed_tools" else choice.get("name")
        before: list[Message] = []
        if (last := body.previous_response_id) is not None:
            if last not in earlier:
                told = f"this session has no stored response {shown(last)}; send the whole input"
                raise Refusal(400, f"previous_response_id: {told}", "previous_response_not_found")
            before = earlier[last]
        self.conversation = [*before, *forms.clean_messages(folded(body.input), "input")]
        instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
        effort = body.reasoning.get("effort")
        ask = body.ask(
            "responses",
            model,
            body.max_output_tokens,
            messages=instructions + self.conversation,
            tools=tools,
            tool_choice=choice,
            template_options={} if effort is None else {"reasoning_effort": effort},
            wants_logprobs=LOGPROBS in body.include,
        )
        super().__init__(ask, body.stream, "resp")
        self.is_stored = body.store
        self._created_at, self._num_events = time.time(), 0

    def grown(self, choice: int, answer: Answer) -> bytes:
        """Logprobs are known with the last token: where they are wanted, a text ends with it, and then calls come."""
        waits = self.ask.wants_logprobs and answer.reason is None
        return super().grown(choice, replace(answer, calls=()) if waits else answer)

    def sent(self, events: Iterable[dict[str, Any]]) -> bytes:
        """Numbered."""
        numbered = [{**event, "sequence_number": i} for i, event in enumerate(events, self._num_events)]
        self._num_events += len(numbered)
        return super().sent(numbered)

    def first_events(self, answer: Answer) -> list[dict[str, Any]]:
        begun = self._response("in_progress", None)
        return [{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")]

    def events(self, choice: int, answer: Answer, act: forms.Act, part: AnswerPart, text: str) -> list[dict[str, Any]]:
        place = {"output_index": part.index}
        inner = {**place, "item_id": _id(part)} | ({} if part.call else {"content_index": 0})
        name, done = self._names(part, answer)
        events: list[dict[str, Any]] = []
        if act == "open":
            output = self._output(part, "in_progress", answer)
            events.append({"type": "response.output_item.added", "item": output, **place})
            if part.call is None:
                events.append({"type": "response.content_part.added", "part": _content(part, Answer()), **inner})
        elif act == "more" and not (part.call and part.call.name in self._customs):
            logprobs: dict[str, Any] = {"logprobs": []} if part.kind == "text" else {}
            events.append({"type": f"{name}.delta", "delta": text, **inner, **logprobs})
        elif act == "close":
            events.append({"type": f"{name}.done", **done, **inner})
            if part.call is None:
                events.append({"type": "response.content_part.done", "part": _content(part, answer), **inner})
            output = self._output(part, "completed", answer)
            events.append({"type": "response.output_item.done", "item": output, **place})
        return events

    def last_events(self, answers: list[Answer]) -> list[dict[str, Any]]:
        response = self._ended(answers[0], self.choices[0].parts)
        return [{"type": f"response.{response['status']}", "response": response}]

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        return self._ended(answers[0], forms.parts_of(answers[0]))

    def error(self, refusal: Refusal) -> dict[str, Any]:
        error = openai_error(refusal)["error"]
        if not self.has_begun:
            return {**error, "type": "error", "error": error}
        failed = {**self._response("failed", None), "error": {"code": "server_error", "message": error["message"]}}
        return {"type": "response.failed", "response": failed}

    def _names(self, part: AnswerPart, answer: Answer) -> tuple[str, dict[str, Any]]:
        """Of the events about a part's text, and what the last of them has."""
        if part.kind == "reasoning":
            return "response.reasoning_text", {"text": part.text}
        if part.call is None:
            return "response.output_text", {"text": part.text, "logprobs": forms.token_logprobs(answer.sampled_text())}
        if part.call.name in self._customs:
            return "response.custom_tool_call_input", {"input": _raw_input(part)}
        return "response.function_call_arguments", {"arguments": part.text, "name": part.call.name}

    def _output(
        self, part: AnswerPart, status: Literal["in_progress", "completed", "incomplete"], answer: Answer
    ) -> dict[str, Any]:
        is_done = status != "in_progress"
        output: dict[str, Any] = {"id": _id(part), "status": status}
        if part.call is None:
            kind = {"type": "reasoning", "summary": []}
            output |= kind if part.kind == "reasoning" else {"type": "message", "role": "assistant"}
            output["content"] = [_content(part, answer)] if is_done else []
            if part.kind == "reasoning" and ENCRYPTED in self._body.include:
                output["encrypted_content"] = SEAL + base64.b64encode(part.text.encode()).decode()
            return output
        is_custom = part.call.name in self._customs
        output |= {"type": "custom_tool_call" if is_custom else "function_call", "call_id": part.call.id}
        key, given = ("input", _raw_input(part)) if is_custom else ("arguments", part.text)
        return {**output, "name": part.call.name, key: given if is_done else ""}

    def _ended(self, answer: Answer, parts: list[AnswerPart]) -> dict[str, Any]:
        status: Literal["incomplete", "completed"] = "incomplete" if answer.reason == "length" else "completed"
        return {**self._response(status, answer), "output": [self._output(part, status, answer) for part in parts]}

    def _response(self, status: str, answer: Answer | None) -> dict[str, Any]:
        return {
            **self._body.model_dump(include=set(ECHOED)),
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.ask.model,
            "output": [],
            "reasoning": {"effort": self._body.reasoning.get("effort"), "summary": None},
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "usage": None if answer is None else _usage(answer),
        }


def _id(part: AnswerPart) -> str:
    return f"{PREFIXES[part.kind]}_{part.id}"


def _content(part: AnswerPart, answer: Answer) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    logprobs = forms.token_logprobs(answer.sampled_text())
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": logprobs}


def _raw_input(part: AnswerPart) -> str:
    """The text that a custom tool is called with; of arguments that are others, all of them."""
    try:
        given = json.loads(part.text or "{}").get("input")
    except ValueError:  # it has not all come yet
        return ""
    return given if isinstance(given, str) else part.text


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer.num_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.num_reasoning_tokens},
        "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
    }
