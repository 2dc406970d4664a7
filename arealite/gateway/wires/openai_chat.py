"""OpenAI's chat/completions and completions, with the extras of vLLM and SGLang that agents use (reasoning_content,
chat_template_kwargs). Called by gateway/server.py.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from arealite.api.errors import PromptError
from arealite.dataset.prompts import REASONING, chat_messages
from arealite.gateway.asks import Answer, Ask, Message
from arealite.gateway.wires.forms import (
    AnswerBlock,
    AnswerBlocks,
    BlockKind,
    Refusal,
    Reply,
    SamplingBody,
    checked_choice,
    new_id,
    sampling_of,
    sse,
    text_of,
)
from arealite.inference.http.bodies import checked, json_object
from arealite.inference.openai.chat import ToolBody
from arealite.inference.openai.completions import StreamOptions, frame, token_usage

MAX_CHOICES = 128
REASONS = {"stop": "stop", "stop_string": "stop", "length": "length", "tool_calls": "tool_calls"}
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PREFIXES: dict[BlockKind, str] = {"reasoning": "rs", "text": "msg", "call": "fc"}


class CompletionsBody(SamplingBody):
    model: str = ""
    prompt: str | list[int] | list[str] = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class AgentChatBody(CompletionsBody):
    messages: list[Any]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = "auto"
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """The body of an error, also within a stream."""
    kind = KINDS.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(refusal), "type": kind, "param": None, "code": refusal.code}}


def clean_messages(messages: list[Message], name: str = "messages") -> list[Message]:
    """In the form of an Ask; `name` is the client's. Raises Refusal: there is none, or one is wrong."""
    if not messages:
        raise Refusal(400, f"{name}: it is empty; at least one message is needed")
    try:
        return chat_messages(name, messages)
    except PromptError as error:
        raise Refusal(400, str(error)) from error


def _message(place: str, given: Any) -> Message:
    """Without keys that templates could take for something else."""
    fields = json_object(place, given)
    role = {"developer": "system", "function": "tool"}.get(fields.get("role", ""), fields.get("role"))
    message = {"role": role, "content": text_of(f"{place}.content", fields.get("content"))}
    thought = next((fields[key] for key in REASONING if isinstance(fields.get(key), str)), "")
    return {
        **message,
        **({"reasoning_content": thought} if thought and role == "assistant" else {}),
        **{key: fields[key] for key in ("tool_calls", "tool_call_id", "name") if fields.get(key)},
    }


def _choice_of_tool(choice: Any) -> Any:
    if isinstance(choice, dict) and isinstance(allowed := choice.get("allowed_tools"), dict):
        choice = allowed.get("mode", "auto")
    elif isinstance(choice, dict):
        choice = json_object("tool_choice.function", choice.get("function")).get("name")
    return choice


class ChatReply(Reply):
    """Of chat/completions. Raises RequestError: the body is wrong."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    _opening: ClassVar[dict[str, Any]] = {"delta": {"role": "assistant", "content": ""}}
    _closing: ClassVar[dict[str, Any]] = {"delta": {}}

    def __init__(self, fields: dict[str, Any], model: str) -> None:
        body = checked(AgentChatBody, fields)
        tools = []
        for i, tool in enumerate(body.tools):
            checked(ToolBody, json_object(f"tools[{i}]", tool), within=f"tools[{i}].")
            tools.append({"type": "function", "function": tool["function"]})
        options = dict(body.chat_template_kwargs)
        if body.reasoning_effort is not None:
            options.setdefault("reasoning_effort", body.reasoning_effort)
        length = body.max_completion_tokens or body.max_tokens
        self._begin(
            body,
            Ask(
                messages=clean_messages([_message(f"messages[{i}]", m) for i, m in enumerate(body.messages)]),
                tools=tools,
                tool_choice=checked_choice(_choice_of_tool(body.tool_choice), tools),
                sampling=sampling_of(body, length, body.stop),
                num_samples=body.n,
                wire="chat",
                model=body.model or model,
                template_options=options,
            ),
        )

    def _begin(self, body: CompletionsBody, ask: Ask) -> None:
        self.ask, self.is_stream, self._options = ask, body.stream, body.stream_options
        self.id = new_id("chatcmpl")
        self._choices = [AnswerBlocks(_PREFIXES) for _ in range(ask.num_samples)]

    def grown(self, choice: int, answer: Answer) -> bytes:
        blocks = self._choices[choice]
        is_first, was_closed = not blocks.blocks, blocks.is_closed
        deltas = [self._delta(*news) for news in blocks.news(answer)]
        if is_first and blocks.blocks:
            deltas.insert(0, self._opening)
        events = [self._chunk(choice, delta, None) for delta in deltas if delta]
        if blocks.is_closed and not was_closed:
            events.append(self._chunk(choice, self._closing, REASONS[answer.reason or "stop"]))
        return b"".join(events)

    def ended(self, answers: list[Answer]) -> bytes:
        counts = {**frame(self.id, self.chunk_kind, self.ask.model), "choices": [], "usage": _usage(answers)}
        return (sse(counts) if self._options.include_usage else b"") + b"data: [DONE]\n\n"

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        choices = []
        for i, answer in enumerate(answers):
            message = answer.message()
            message["content"] = message["content"] if message["content"].strip() or not answer.calls else None
            reason = REASONS[answer.reason or "stop"]
            message |= {"refusal": None}
            choices.append({"index": i, "message": message, "logprobs": None, "finish_reason": reason})
        return {**frame(self.id, self.kind, self.ask.model), "choices": choices, "usage": _usage(answers)}

    def failed(self, refusal: Refusal) -> bytes:
        return sse(openai_error(refusal))

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None) -> bytes:
        told = {"index": choice, **delta, "logprobs": None, "finish_reason": reason}
        return sse({**frame(self.id, self.chunk_kind, self.ask.model), "choices": [told]})

    def _delta(self, act: str, block: AnswerBlock, text: str) -> dict[str, Any]:
        if act == "open" and block.call is not None:
            call = {"id": block.call.id, "type": "function", "function": {"name": block.call.name, "arguments": ""}}
            return {"delta": {"tool_calls": [{"index": block.ordinal, **call}]}}
        if act != "more":
            return {}
        if block.kind == "call":
            return {"delta": {"tool_calls": [{"index": block.ordinal, "function": {"arguments": text}}]}}
        return {"delta": {"content" if block.kind == "text" else "reasoning_content": text}}


def _usage(answers: list[Answer]) -> dict[str, Any]:
    """All answers are to one prompt."""
    first = answers[0]
    usage = token_usage(first.num_prompt_tokens, sum(a.num_tokens for a in answers), first.num_cached_tokens)
    return {**usage, "completion_tokens_details": {"reasoning_tokens": sum(a.num_reasoning_tokens for a in answers)}}


class CompletionReply(ChatReply):
    """Of completions: one prompt, as text or token ids, is gone on with."""

    kind = chunk_kind = "text_completion"
    _opening: ClassVar[dict[str, Any]] = {}
    _closing: ClassVar[dict[str, Any]] = {"text": ""}

    def __init__(self, fields: dict[str, Any], model: str) -> None:
        for name in ("echo", "suffix", "best_of"):
            if fields.get(name):
                raise Refusal(400, f"{name}: not supported here; leave it out")
        body = checked(CompletionsBody, fields)
        prompt: Any = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            prompt = prompt[0] if len(prompt) == 1 else []
        if not prompt:
            raise Refusal(400, "prompt: expected one text or the token ids of one, and not empty")
        ask = Ask(
            prompt=prompt,
            sampling=sampling_of(body, body.max_tokens, body.stop),
            num_samples=body.n,
            wire="completions",
            model=body.model or model,
        )
        self._begin(body, ask)
        self.id = new_id("cmpl")

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        choices = [
            {"index": i, "text": a.text, "logprobs": None, "finish_reason": REASONS[a.reason or "stop"]}
            for i, a in enumerate(answers)
        ]
        return {**frame(self.id, self.kind, self.ask.model), "choices": choices, "usage": _usage(answers)}

    def _delta(self, act: str, block: AnswerBlock, text: str) -> dict[str, Any]:
        return {"text": text} if act == "more" and block.kind == "text" else {}
