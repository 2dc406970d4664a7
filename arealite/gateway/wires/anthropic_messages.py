"""Anthropic's messages, and the counting of their tokens. Called by gateway/server.py."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from arealite.gateway.asks import Answer, Message
from arealite.gateway.wires import forms
from arealite.gateway.wires.forms import Refusal, Reply
from arealite.inference.core.requests import Body, StopStrings
from arealite.inference.http.bodies import checked

REASONS = {"stop": "end_turn", "stop_string": "stop_sequence", "length": "max_tokens", "tool_calls": "tool_use"}
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    409: "conflict_error", 410: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
SIGNATURE = "arealite"  # clients want one beside what was thought, and send it back
BILLING = "x-anthropic-billing-header:"  # a line of Claude Code's that changes with each call
CHOICES = {"any": "required"}
BLOCKS = ("tool_result", "tool_use", "thinking", "redacted_thinking")  # all others are text
DELTAS = {"reasoning": "thinking", "text": "text", "call": "input_json"}
KEYS = {"reasoning": "thinking", "text": "text", "call": "partial_json"}


class ContentBlock(Body):
    """Of a message, whatever its type."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = Field(default_factory=dict)
    tool_use_id: str = ""
    content: forms.Texts = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        is_other = isinstance(given, dict) and given.get("type") in BLOCKS
        return given if is_other else {"type": "text", "text": forms.text_of(given)}

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        return forms.has(self, "name") if self.type == "tool_use" else self


class ClaudeMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[ContentBlock], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]

    def messages(self) -> list[Message]:
        """Results of tools come before what its author says."""
        blocks = self.content
        results: list[Message] = [
            {"role": "tool", "content": "\n".join(b.content), "tool_call_id": b.tool_use_id}
            for b in blocks
            if b.type == "tool_result"
        ]
        texts = [b.text for b in blocks if b.type == "text"]
        message: Message = {"role": self.role, "content": ("" if self.role == "assistant" else "\n").join(texts)}
        if calls := [forms.call_message(b.id, b.name, b.input) for b in blocks if b.type == "tool_use"]:
            message["tool_calls"] = calls
        if thought := "".join(b.thinking for b in blocks):
            message["reasoning_content"] = thought
        return [*results, *([message] if texts or self.role != "user" else [])]


class MessagesBody(forms.AskBody):
    messages: list[ClaudeMessage]
    system: forms.Texts = Field(default_factory=list)
    max_tokens: forms.Length = None
    stop_sequences: StopStrings = ()
    tool_choice: forms.Typed = Field(default_factory=dict)
    thinking: dict[str, Any] = Field(default_factory=dict)
    output_config: dict[str, Any] = Field(default_factory=dict)


def anthropic_error(refusal: Refusal, request_id: str = "") -> dict[str, Any]:
    """As openai_error."""
    error = {"type": KINDS.get(refusal.status, "api_error"), "message": str(refusal)}
    return {"type": "error", "error": error, "request_id": request_id or None}


class MessagesReply(Reply):
    """Of messages. Raises RequestError: the body is wrong."""

    ping: ClassVar[bytes] = b'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(self, fields: dict[str, Any], model: str) -> None:
        body = checked(MessagesBody, fields)
        forms.refuse_format("output_config.format", body.output_config.get("format"))
        # Tools that Anthropic's servers run have a type and no schema; a model cannot be told of them.
        tools = [
            forms.function_tool(f"tools[{i}]", tool, tool.get("input_schema"))
            for i, tool in enumerate(body.tools)
            if "input_schema" in tool or tool.get("type", "custom") == "custom"
        ]
        kind, thinks = body.tool_choice.get("type", "auto"), body.thinking.get("type")
        system = "\n".join(text for text in body.system if not text.startswith(BILLING))
        said = [message for given in body.messages for message in given.messages()]
        told = [{"role": "system", "content": system}] if system and said else []
        ask = body.ask(
            "messages",
            model,
            body.max_tokens,
            body.stop_sequences,
            messages=forms.clean_messages([*told, *said]),
            tools=tools,
            tool_choice=body.tool_choice.get("name") if kind == "tool" else CHOICES.get(kind, kind),
            template_options={} if thinks is None else {"enable_thinking": thinks != "disabled"},
        )
        super().__init__(ask, body.stream, "msg")

    def first_events(self, answer: Answer) -> list[dict[str, Any]]:
        begun = {**self._message([], answer), "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": begun}]

    def events(
        self, choice: int, answer: Answer, act: forms.Act, part: forms.AnswerPart, text: str
    ) -> list[dict[str, Any]]:
        place = {"index": part.index}
        if act == "open":
            return [{"type": "content_block_start", **place, "content_block": _block(part, "")}]
        if act == "more":
            delta = {"type": f"{DELTAS[part.kind]}_delta", KEYS[part.kind]: text}
            return [{"type": "content_block_delta", **place, "delta": delta}]
        if act == "end":
            return []
        signature = {"type": "signature_delta", "signature": SIGNATURE}
        signed = [{"type": "content_block_delta", **place, "delta": signature}] if part.kind == "reasoning" else []
        return [*signed, {"type": "content_block_stop", **place}]

    def last_events(self, answers: list[Answer]) -> list[dict[str, Any]]:
        message = self._message([], answers[0])
        delta = {key: message[key] for key in ("stop_reason", "stop_sequence")}
        return [{"type": "message_delta", "delta": delta, "usage": message["usage"]}, {"type": "message_stop"}]

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        return self._message([_block(part, SIGNATURE) for part in forms.parts_of(answers[0])], answers[0])

    def error(self, refusal: Refusal) -> dict[str, Any]:
        return anthropic_error(refusal, self.id)

    def _message(self, content: list[dict[str, Any]], answer: Answer) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.ask.model,
            "content": content,
            "stop_reason": REASONS[answer.reason or "stop"],
            "stop_sequence": answer.matched,
            "usage": {
                "input_tokens": answer.num_prompt_tokens - answer.num_cached_tokens,
                "cache_read_input_tokens": answer.num_cached_tokens,
                "cache_creation_input_tokens": 0,
                "output_tokens": answer.num_tokens,
                "output_tokens_details": {"thinking_tokens": answer.num_reasoning_tokens},
            },
        }


def _block(part: forms.AnswerPart, signature: str) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": signature}
    if part.call is not None:
        return {"type": "tool_use", "id": part.call.id, "name": part.call.name, "input": json.loads(part.text or "{}")}
    return {"type": "text", "text": part.text, "citations": None}
