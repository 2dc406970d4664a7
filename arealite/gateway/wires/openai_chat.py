"""OpenAI's chat/completions and completions, with the extras of vLLM and SGLang that agents use (reasoning_content,
chat_template_kwargs). Called by gateway/server.py.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from arealite.dataset.prompts import REASONING
from arealite.gateway.asks import Answer, Ask, Message
from arealite.gateway.wires import forms
from arealite.gateway.wires.forms import Refusal, Reply
from arealite.inference.core.requests import Body, StopStrings
from arealite.inference.http.bodies import checked, json_object
from arealite.inference.openai.chat import ToolBody
from arealite.inference.openai.completions import StreamOptions, frame, token_usage

MAX_CHOICES = 128
REASONS = {"stop": "stop", "stop_string": "stop", "length": "length", "tool_calls": "tool_calls"}
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class CompletionsBody(forms.AskBody):
    prompt: str | list[int] | list[str] = ""
    max_tokens: forms.Length = None
    stop: StopStrings = ()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool | int = False  # a truth value of a chat, a number of a completion, where 0 asks for some too


class ChatMessage(Body):
    """Without keys that templates could take for something else."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: forms.Texts = Field(default_factory=list)
    reasoning_content: Any = None
    reasoning: Any = None
    thinking: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    name: Any = None

    def message(self) -> Message:
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        kept = {key: vars(self)[key] for key in ("tool_calls", "tool_call_id", "name") if vars(self)[key]}
        thoughts = [vars(self)[key] for key in REASONING if role == "assistant" and isinstance(vars(self)[key], str)]
        thought = {"reasoning_content": thoughts[0]} if thoughts and thoughts[0] else {}
        return {"role": role, "content": "\n".join(self.content), **thought, **kept}


class AgentChatBody(CompletionsBody):
    messages: list[ChatMessage]
    max_completion_tokens: forms.Length = None
    tool_choice: Any = "auto"
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """The body of an error, also within a stream."""
    kind = KINDS.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(refusal), "type": kind, "param": None, "code": refusal.code}}


class ChatReply(Reply):
    """Of chat/completions. Raises RequestError: the body is wrong."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    opening: ClassVar[dict[str, Any]] = {"delta": {"role": "assistant", "content": ""}}
    closing: ClassVar[dict[str, Any]] = {"delta": {}}

    def __init__(self, fields: dict[str, Any], model: str) -> None:
        forms.refuse_format("response_format", fields.get("response_format"))
        forms.refuse_fields(fields, "top_logprobs")
        body = checked(AgentChatBody, fields)
        for i, tool in enumerate(body.tools):
            checked(ToolBody, tool, within=f"tools[{i}].")
        effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
        choice = body.tool_choice
        if isinstance(choice, dict) and isinstance(allowed := choice.get("allowed_tools"), dict):
            choice = allowed.get("mode", "auto")
        elif isinstance(choice, dict):
            choice = json_object("tool_choice.function", choice.get("function")).get("name")
        ask = body.ask(
            "chat",
            model,
            body.max_completion_tokens or body.max_tokens,
            body.stop,
            messages=forms.clean_messages([message.message() for message in body.messages]),
            tools=[{"type": "function", "function": tool["function"]} for tool in body.tools],
            tool_choice=choice,
            num_samples=body.n,
            template_options=effort | body.chat_template_kwargs,
            wants_logprobs=body.logprobs is not False,
        )
        self._begin(body, ask, "chatcmpl")

    def _begin(self, body: CompletionsBody, ask: Ask, prefix: str) -> None:
        super().__init__(ask, body.stream, prefix)
        self._tells_usage = body.stream_options.include_usage

    def events(
        self, choice: int, answer: Answer, act: forms.Act, part: forms.AnswerPart, text: str
    ) -> list[dict[str, Any]]:
        if act == "end":
            told = {
                **self.closing,
                "logprobs": self.logprobs(answer),
                "finish_reason": REASONS[answer.reason or "stop"],
            }
            return [self._chunk(choice, told)]
        opening = [self.opening] if act == "open" and part.index == 0 and self.opening else []
        return [self._chunk(choice, told) for told in (*opening, self.delta(act, part, text)) if told]

    def last_events(self, answers: list[Answer]) -> list[dict[str, Any]]:
        usage = {**frame(self.id, self.chunk_kind, self.ask.model), "choices": [], "usage": _usage(answers)}
        return [usage] if self._tells_usage else []

    def ended(self, answers: list[Answer]) -> bytes:
        return super().ended(answers) + b"data: [DONE]\n\n"

    def error(self, refusal: Refusal) -> dict[str, Any]:
        return openai_error(refusal)

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                **self.said(answer),
                "logprobs": self.logprobs(answer),
                "finish_reason": REASONS[answer.reason or "stop"],
            }
            for i, answer in enumerate(answers)
        ]
        return {**frame(self.id, self.kind, self.ask.model), "choices": choices, "usage": _usage(answers)}

    def said(self, answer: Answer) -> dict[str, Any]:
        """Of a whole choice."""
        message = answer.message()
        content = message["content"] if message["content"].strip() or not answer.calls else None
        return {"message": {**message, "content": content, "refusal": None}}

    def delta(self, act: forms.Act, part: forms.AnswerPart, text: str) -> dict[str, Any]:
        """Of a chunk; empty: none."""
        if act == "open" and part.call is not None:
            call = forms.call_message(part.call.id, part.call.name, "")
            return {"delta": {"tool_calls": [{"index": part.ordinal, **call}]}}
        if act != "more":
            return {}
        if part.kind == "call":
            return {"delta": {"tool_calls": [{"index": part.ordinal, "function": {"arguments": text}}]}}
        return {"delta": {"content" if part.kind == "text" else "reasoning_content": text}}

    def logprobs(self, answer: Answer) -> dict[str, Any] | None:
        """Of all sampled tokens, those of thoughts and calls among them; a stream has them at its end."""
        if not self.ask.wants_logprobs:
            return None
        return {"content": forms.token_logprobs(answer.sampled), "refusal": None}

    def _chunk(self, choice: int, told: dict[str, Any]) -> dict[str, Any]:
        choices = [{"index": choice, "logprobs": None, "finish_reason": None, **told}]
        return {**frame(self.id, self.chunk_kind, self.ask.model), "choices": choices}


class CompletionReply(ChatReply):
    """Of completions: one prompt, as text or token ids, is gone on with."""

    kind = chunk_kind = "text_completion"
    opening: ClassVar[dict[str, Any]] = {}
    closing: ClassVar[dict[str, Any]] = {"text": ""}

    def __init__(self, fields: dict[str, Any], model: str) -> None:
        forms.refuse_format("response_format", fields.get("response_format"))
        forms.refuse_fields(fields, "echo", "suffix", "best_of")
        body = checked(CompletionsBody, fields)
        if body.logprobs not in (False, 0, 1):
            raise Refusal(400, f"logprobs: of the sampled tokens alone are known here: 0 or 1, found {body.logprobs}")
        prompt: Any = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            prompt = prompt[0] if len(prompt) == 1 else []
        if not prompt:
            raise Refusal(400, "prompt: expected one text or the token ids of one, and not empty")
        wants = body.logprobs is not False
        ask = body.ask(
            "completions", model, body.max_tokens, body.stop, prompt=prompt, num_samples=body.n, wants_logprobs=wants
        )
        self._begin(body, ask, "cmpl")

    def said(self, answer: Answer) -> dict[str, Any]:
        return {"text": answer.text}

    def delta(self, act: forms.Act, part: forms.AnswerPart, text: str) -> dict[str, Any]:
        return {"text": text} if act == "more" and part.kind == "text" else {}

    def logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if not self.ask.wants_logprobs:
            return None
        tokens = [text for text, _, _ in answer.sampled]
        offsets = [0, *accumulate(map(len, tokens))][: len(tokens)]
        logprobs = [logprob for _, _, logprob in answer.sampled]
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def _usage(answers: list[Answer]) -> dict[str, Any]:
    """All answers are to one prompt."""
    first = answers[0]
    usage = token_usage(first.num_prompt_tokens, sum(a.num_tokens for a in answers), first.num_cached_tokens)
    return {**usage, "completion_tokens_details": {"reasoning_tokens": sum(a.num_reasoning_tokens for a in answers)}}
