"""Anthropic's messages, and the counting of their tokens. Called by gateway/server.py."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar

from pydantic import Field

from arealite.gateway.asks import Answer, Ask, CallOfTool, Message
from arealite.gateway.wires.forms import (
    AnswerBlock,
    AnswerBlocks,
    BlockKind,
    Refusal,
    Reply,
    SamplingBody,
    blocks_of,
    checked_choice,
    function_tool,
    new_id,
    sampling_of,
    sse,
    text_of,
    text_part,
)
from arealite.gateway.wires.openai_chat import clean_messages
from arealite.inference.http.bodies import checked, json_object, shown

REASONS = {"stop": "end_turn", "stop_string": "stop_sequence", "length": "max_tokens", "tool_calls": "tool_use"}
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    409: "conflict_error", 410: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
SIGNATURE = "arealite"  # clients want one beside what was thought, and send it back
BILLING = "x-anthropic-billing-header:"  # a line of Claude Code's that changes with each call
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_PREFIXES: dict[BlockKind, str] = {"reasoning": "thinking", "text": "text", "call": "toolu"}


class MessagesBody(SamplingBody):
    model: str = ""
    messages: list[Any]
    system: Any = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop_sequences: list[str] = Field(default_factory=list)
    tools: list[Any] = Field(default_factory=list)
    tool_choice: dict[str, Any] = Field(default_factory=dict)
    thinking: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False


def anthropic_error(refusal: Refusal, request_id: str = "") -> dict[str, Any]:
    """As openai_error."""
    error = {"type": KINDS.get(refusal.status, "api_error"), "message": str(refusal)}
    return {"type": "error", "error": error, "request_id": request_id or None}


def _system(given: Any) -> list[Message]:
    blocks = [{"text": given}] if isinstance(given, str) else given
    if isinstance(blocks, list):
        blocks = [b for b in blocks if not (isinstance(b, dict) and str(b.get("text", "")).startswith(BILLING))]
    text = text_of("system", blocks)
    return [{"role": "system", "content": text}] if text else []


def _messages(place: str, given: Any) -> list[Message]:
    """Of one message: results of tools come before what its author says."""
    fields = json_object(place, given)
    role, content = fields.get("role"), fields.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        raise Refusal(400, f"{place}.content: expected text or a list of blocks, found {shown(content)}")
    results: list[Message] = []
    calls, texts, thought = [], [], ""
    for i, given_block in enumerate(blocks):
        block = json_object(f"{place}.content[{i}]", given_block)
        kind, at = block.get("type"), f"{place}.content[{i}]"
        if kind == "tool_result":
            text = text_of(f"{at}.content", block.get("content"))
            results.append({"role": "tool", "content": text, "tool_call_id": str(block.get("tool_use_id", ""))})
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": str(block.get("id", "")), "type": "function", "function": function})
        elif kind == "thinking":
            thought += text_of(f"{at}.thinking", block.get("thinking"))
        elif kind == "document":
            source = json_object(f"{at}.source", block.get("source"))
            texts.append(text_part(at, source.get("data") if source.get("type") == "text" else block))
        elif kind != "redacted_thinking":
            texts.append(text_part(at, block))
    message: Message = {"role": role, "content": ("" if role == "assistant" else "\n").join(texts)}
    message |= {"tool_calls": calls} if calls else {}
    message |= {"reasoning_content": thought} if thought else {}
    return [*results, *([message] if texts or role != "user" else [])]


def _tools(given: list[Any]) -> list[dict[str, Any]]:
    """Those that a model can be told of; tools that Anthropic's servers run have a type and no schema."""
    tools = []
    for i, tool in enumerate(given):
        fields = json_object(f"tools[{i}]", tool)
        if "input_schema" not in fields and fields.get("type", "custom") != "custom":
            continue
        if not isinstance(fields.get("name"), str):
            raise Refusal(400, f"tools[{i}].name: expected a name, found {shown(fields.get('name'))}")
        tools.append(function_tool(fields["name"], fields.get("description"), fields.get("input_schema")))
    return tools


def ask_of(fields: dict[str, Any], model: str) -> tuple[Ask, bool]:
    """What is asked, and whether as a stream. Raises RequestError: the body is wrong."""
    body = checked(MessagesBody, fields)
    tools = _tools(body.tools)
    kind = body.tool_choice.get("type", "auto")
    choice = body.tool_choice.get("name") if kind == "tool" else CHOICES.get(kind, kind)
    given = [m for i, message in enumerate(body.messages) for m in _messages(f"messages[{i}]", message)]
    thinks = body.thinking.get("type")
    ask = Ask(
        messages=clean_messages([*_system(body.system), *given] if body.messages else []),
        tools=tools,
        tool_choice=checked_choice(choice, tools),
        sampling=sampling_of(body, body.max_tokens, body.stop_sequences),
        wire="messages",
        model=body.model or model,
        template_options={} if thinks is None else {"enable_thinking": thinks != "disabled"},
    )
    return ask, body.stream


class MessagesReply(Reply):
    """Of messages. Raises RequestError: the body is wrong."""

    ping: ClassVar[bytes] = sse({"type": "ping"}, "ping")

    def __init__(self, fields: dict[str, Any], model: str) -> None:
        self.ask, self.is_stream = ask_of(fields, model)
        self.id = new_id("msg")
        self._blocks = AnswerBlocks(_PREFIXES)
        self._has_begun = False

    def grown(self, choice: int, answer: Answer) -> bytes:
        events: list[tuple[str, dict[str, Any]]] = []
        if not self._has_begun:
            begun = {**self._message([], answer), "stop_reason": None, "stop_sequence": None}
            events.append(("message_start", {"message": begun}))
            self._has_begun = True
        for act, block, text in self._blocks.news(answer):
            if act == "open":
                events.append(("content_block_start", {"index": block.index, "content_block": _opening(block)}))
            elif act == "more":
                events.append(("content_block_delta", {"index": block.index, "delta": _delta(block, text)}))
            else:
                if block.kind == "reasoning":
                    signed = {"type": "signature_delta", "signature": SIGNATURE}
                    events.append(("content_block_delta", {"index": block.index, "delta": signed}))
                events.append(("content_block_stop", {"index": block.index}))
        return b"".join(sse({"type": name, **payload}, name) for name, payload in events)

    def ended(self, answers: list[Answer]) -> bytes:
        (answer,) = answers
        delta = {"stop_reason": REASONS[answer.reason or "stop"], "stop_sequence": answer.matched}
        told: dict[str, Any] = {"delta": delta, "usage": _usage(answer)}
        events: list[tuple[str, dict[str, Any]]] = [("message_delta", told), ("message_stop", {})]
        return b"".join(sse({"type": name, **payload}, name) for name, payload in events)

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        return self._message([_content(block) for block in blocks_of(answer, _PREFIXES)], answer)

    def failed(self, refusal: Refusal) -> bytes:
        return sse(anthropic_error(refusal, self.id), "error")

    def _message(self, content: list[dict[str, Any]], answer: Answer) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.ask.model,
            "content": content,
            "stop_reason": REASONS[answer.reason or "stop"],
            "stop_sequence": answer.matched,
            "usage": _usage(answer),
        }


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.num_prompt_tokens - answer.num_cached_tokens,
        "cache_read_input_tokens": answer.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": answer.num_tokens,
        "output_tokens_details": {"thinking_tokens": answer.num_reasoning_tokens},
    }


def _content(block: AnswerBlock) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE}
    if block.call is not None:
        return _tool_use(block.call, json.loads(block.text or "{}"))
    return {"type": "text", "text": block.text, "citations": None}


def _opening(block: AnswerBlock) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""} if block.call is None else _tool_use(block.call, {})


def _tool_use(call: CallOfTool, given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


def _delta(block: AnswerBlock, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    if block.kind == "call":
        return {"type": "input_json_delta", "partial_json": text}
    return {"type": "text_delta", "text": text}
