"""OpenAI's Responses, with the conversations that previous_response_id goes on with. Called by gateway/server.py."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from arealite.gateway.asks import Answer, Ask, Message
from arealite.gateway.wires.forms import (
    AnswerBlock,
    AnswerBlocks,
    BlockKind,
    Refusal,
    Reply,
    SamplingBody,
    checked_choice,
    function_tool,
    new_id,
    sampling_of,
    sse,
    text_of,
)
from arealite.gateway.wires.openai_chat import clean_messages, openai_error
from arealite.inference.http.bodies import checked, json_object, shown

RAW_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}  # of a custom tool
ENCRYPTED = "reasoning.encrypted_content"
SEAL = "arealite:"  # begins what stands for encrypted content: what was thought, for clients that keep only that
_PREFIXES: dict[BlockKind, str] = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponsesBody(SamplingBody):
    model: str = ""
    input: str | list[Any] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning: dict[str, Any] = Field(default_factory=dict)
    include: list[str] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)
    store: bool = True
    stream: bool = False


class Folding:
    """Input items as messages: what was thought, said and called in one turn is one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._turn: Message | None = None  # the assistant's, as long as it may go on

    def add(self, place: str, given: Any) -> None:
        """Raises Refusal: it is not an item that a model can be shown."""
        part = json_object(place, {"role": "user", "content": given} if isinstance(given, str) else given)
        kind = part.get("type", "message")
        if kind == "message" and part.get("role") != "assistant":
            role = {"developer": "system"}.get(part.get("role", ""), part.get("role"))
            self._other({"role": role, "content": text_of(f"{place}.content", part.get("content"))})
        elif kind == "message":
            text = text_of(f"{place}.content", part.get("content"), "")
            turn = self._open(bool(self._turn and self._turn["content"] and "tool_calls" not in self._turn))
            turn["content"] += text
        elif kind == "reasoning":
            thought = _thought(place, part)
            turn = self._open(bool(self._turn and (self._turn["content"] or "tool_calls" in self._turn)))
            turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
        elif kind in ("function_call", "custom_tool_call"):
            arguments = part.get("arguments") if kind == "function_call" else {"input": part.get("input", "")}
            function = {"name": part.get("name"), "arguments": arguments}
            calls = self._open(False).setdefault("tool_calls", [])
            calls.append({"id": str(part.get("call_id", "")), "type": "function", "function": function})
        elif kind in ("function_call_output", "custom_tool_call_output"):
            text = text_of(f"{place}.output", part.get("output"))
            self._other({"role": "tool", "content": text, "tool_call_id": str(part.get("call_id", ""))})
        else:
            raise Refusal(400, f"{place}.type: {shown(kind)} cannot be shown to the model here")

    def _other(self, message: Message) -> None:
        self.messages.append(message)
        self._turn = None

    def _open(self, is_next: bool) -> Message:
        if self._turn is None or is_next:
            self._turn = {"role": "assistant", "content": ""}
            self.messages.append(self._turn)
        return self._turn


def _thought(place: str, part: dict[str, Any]) -> str:
    sealed = part.get("encrypted_content")
    if part.get("content"):
        return text_of(f"{place}.content", part["content"], "")
    if isinstance(sealed, str) and sealed.startswith(SEAL):
        try:
            return base64.b64decode(sealed.removeprefix(SEAL), validate=True).decode()
        except ValueError as error:
            raise Refusal(400, f"{place}.encrypted_content: not what was sent by this server") from error
    return text_of(f"{place}.summary", part.get("summary"))


def _tools(given: list[Any]) -> tuple[list[dict[str, Any]], frozenset[str]]:
    """Functions, and the names of custom tools among them, whose argument is a text. Tools that OpenAI's servers run
    are left out: clients declare them whether they are there or not."""
    tools, customs = [], set()
    for i, tool in enumerate(given):
        fields = json_object(f"tools[{i}]", tool)
        kind, name = fields.get("type"), fields.get("name")
        if kind not in ("function", "custom"):
            continue
        if not isinstance(name, str):
            raise Refusal(400, f"tools[{i}].name: expected a name, found {shown(name)}")
        if kind == "custom":
            customs.add(name)
        parameters = RAW_INPUT if kind == "custom" else fields.get("parameters")
        tools.append(function_tool(name, fields.get("description"), parameters))
    return tools, frozenset(customs)


class ResponsesReply(Reply):
    """Of responses. `earlier` has the conversations up to the responses of this session, by their ids; what is asked
    and the answer come to it under this one's. Raises RequestError: the body is wrong."""

    def __init__(self, fields: dict[str, Any], model: str, earlier: Mapping[str, list[Message]]) -> None:
        for name in ("conversation", "background", "prompt"):
            if fields.get(name):
                raise Refusal(400, f"{name}: not supported here; leave it out")
        self._body = body = checked(ResponsesBody, fields)
        tools, self._customs = _tools(body.tools)
        choice = body.tool_choice
        if isinstance(choice, dict):
            choice = choice.get("mode", "auto") if choice.get("type") == "allowed_tools" else choice.get("name")
        before: list[Message] = []
        if body.previous_response_id is not None:
            if body.previous_response_id not in earlier:
                raise Refusal(
                    400,
                    f"previous_response_id: this session has no stored response {shown(body.previous_response_id)};"
                    " send the whole input",
                    "previous_response_not_found",
                )
            before = earlier[body.previous_response_id]
        folding = Folding()
        for i, part in enumerate([body.input] if isinstance(body.input, str) and body.input else body.input or []):
            folding.add(f"input[{i}]", part)
        self.conversation = [*before, *clean_messages(folding.messages, "input")]
        instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
        effort = body.reasoning.get("effort")
        self.ask = Ask(
            messages=instructions + self.conversation,
            tools=tools,
            tool_choice=checked_choice(choice, tools),
            sampling=sampling_of(body, body.max_output_tokens, None),
            wire="responses",
            model=body.model or model,
            template_options={} if effort is None else {"reasoning_effort": effort},
        )
        self.id, self.is_stream, self.is_stored = new_id("resp"), body.stream, body.store
        self._blocks = AnswerBlocks(_PREFIXES)
        self._created_at = time.time()
        self._num_events = 0

    def grown(self, choice: int, answer: Answer) -> bytes:
        events = b""
        if not self._num_events:
            begun = self._response("in_progress", None)
            events = self._event("response.created", response=begun)
            events += self._event("response.in_progress", response=begun)
        for act, block, text in self._blocks.news(answer):
            place = {"output_index": block.index}
            if act == "open":
                output = self._output(block, "in_progress")
                events += self._event("response.output_item.added", item=output, **place)
            inner = {**place, "item_id": block.id} | ({} if block.call else {"content_index": 0})
            name, done = self._names(block)
            if act == "open" and block.call is None:
                events += self._event("response.content_part.added", part=_part(block), **inner)
            elif act == "more" and block.call is None:
                logprobs: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
                events += self._event(f"{name}.delta", delta=text, **inner, **logprobs)
            elif act == "more" and block.call and block.call.name not in self._customs:
                events += self._event(f"{name}.delta", delta=text, **inner)
            elif act == "close":
                events += self._event(f"{name}.done", **done, **inner)
                if block.call is None:
                    events += self._event("response.content_part.done", part=_part(block), **inner)
                events += self._event("response.output_item.done", item=self._output(block, "completed"), **place)
        return events

    def ended(self, answers: list[Answer]) -> bytes:
        response = self._ended(answers[0])
        return self._event(f"response.{response['status']}", response=response)

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        list(self._blocks.news(answers[0]))
        return self._ended(answers[0])

    def failed(self, refusal: Refusal) -> bytes:
        error = openai_error(refusal)["error"]
        if not self._num_events:
            return self._event("error", **error, error=error)
        failed = {**self._response("failed", None), "error": {"code": "server_error", "message": error["message"]}}
        return self._event("response.failed", response=failed)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._num_events += 1
        return sse({**fields, "type": kind, "sequence_number": self._num_events - 1}, kind)

    def _names(self, block: AnswerBlock) -> tuple[str, dict[str, Any]]:
        """Of the events about a block's text, and what the last of them has."""
        if block.kind == "reasoning":
            return "response.reasoning_text", {"text": block.text}
        if block.call is None:
            return "response.output_text", {"text": block.text, "logprobs": []}
        if block.call.name in self._customs:
            return "response.custom_tool_call_input", {"input": _raw_input(block)}
        return "response.function_call_arguments", {"arguments": block.text, "name": block.call.name}

    def _ended(self, answer: Answer) -> dict[str, Any]:
        response = self._response("incomplete" if answer.reason == "length" else "completed", answer)
        return {**response, "output": [self._output(block, response["status"]) for block in self._blocks.blocks]}

    def _output(self, block: AnswerBlock, status: Literal["in_progress", "completed", "incomplete"]) -> dict[str, Any]:
        is_done = status != "in_progress"
        part: dict[str, Any] = {"id": block.id, "status": status}
        if block.kind == "reasoning":
            part |= {"type": "reasoning", "summary": [], "content": [_part(block)] if is_done else []}
            if ENCRYPTED in self._body.include:
                part["encrypted_content"] = SEAL + base64.b64encode(block.text.encode()).decode()
        elif block.call is None:
            content = [_part(block)] if is_done else []
            part |= {"type": "message", "role": "assistant", "content": content}
        elif block.call.name in self._customs:
            part |= {"type": "custom_tool_call", "call_id": block.call.id, "name": block.call.name}
            part["input"] = _raw_input(block) if is_done else ""
        else:
            part |= {"type": "function_call", "call_id": block.call.id, "name": block.call.name}
            part["arguments"] = block.text if is_done else ""
        return part

    def _response(self, status: str, answer: Answer | None) -> dict[str, Any]:
        body = self._body
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "model": self.ask.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.get("effort"), "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if answer is None else _usage(answer),
        }


def _part(block: AnswerBlock) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _raw_input(block: AnswerBlock) -> str:
    """The text that a custom tool is called with; of arguments that are others, all of them."""
    given = json.loads(block.text or "{}").get("input")
    return given if isinstance(given, str) else block.text


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer.num_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.num_reasoning_tokens},
        "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
    }
