"""POST /v1/chat/completions: messages and tools become the prompt's tokens, by the model's own chat template, and what
the model writes becomes text and calls of functions. Called by http/routes.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from arealite.api.errors import PromptError, RequestError
from arealite.dataset.prompts import chat_messages, check_variables, render
from arealite.inference.core.answers import ShownAnswer, token_bytes
from arealite.inference.core.requests import Body
from arealite.inference.http.bodies import checked, json_object, shown
from arealite.inference.http.generation import TokenIds, json_number
from arealite.inference.openai.completions import (
    MAX_TOP_LOGPROBS,
    Choice,
    OpenAIBody,
    OpenAICall,
    Served,
    call_of,
    likeliest,
    sampling_of,
)
from arealite.inference.openai.tools import (
    CLOSE,
    PARSERS,
    ToolUse,
    as_text,
    forced_start,
    instructions,
    read_calls,
)

Encode = Callable[[str, bool], list[int]]  # text, and whether the tokenizer adds its special tokens
TOOL_CHOICES = ("none", "auto", "required")


class FunctionBody(Body):
    name: Annotated[str, Field(min_length=1)]


class ToolBody(Body):
    type: Literal["function"] = "function"
    function: FunctionBody


class ChatBody(OpenAIBody):
    """`input_ids` are the prompt's tokens instead of messages."""

    messages: Any = None
    input_ids: TokenIds | None = None
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    max_completion_tokens: Any = None


def parse_chat(fields: dict[str, Any], served: Served, template: ChatTemplate) -> OpenAICall:
    """As `parse_completion`."""
    body = checked(ChatBody, fields)
    if body.input_ids is None:
        prompt_ids, use = template.encode(body)
    else:  # made by the client, who then also decides how the answer begins
        prompt_ids, use = body.input_ids, template.tools(body)[1]
        use = use and ToolUse(use.names, use.way)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs: needs logprobs: true")
    length = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    sampling = {**sampling_of(body, served), "max_new_tokens": length}
    if use is not None:
        sampling.setdefault("skip_special_tokens", False)  # they may mark a call
        if use.forced and use.way != "plain":  # the call is all that is wanted
            stop = sampling.get("stop", [])
            sampling["stop"] = [*(stop if isinstance(stop, list) else [stop]), CLOSE]
    return OpenAICall(body, *call_of(body, served, {"input_ids": prompt_ids}, sampling, body.top_logprobs), use)


class ChatTemplate:
    """The template of one tokenizer, and the way of writing calls that is asked of its model."""

    def __init__(self, tokenizer: Any, encode: Encode | None, tool_call_parser: str) -> None:
        """`tokenizer` may be None, for a folder without one; `tool_call_parser` is one of PARSERS."""
        self._tokenizer = tokenizer
        self._encode = encode
        template = None if tokenizer is None else tokenizer.chat_template
        self._template = "".join(template.values()) if isinstance(template, dict) else template or ""
        self._knows_tools = "tools" in self._template
        self.way = PARSERS[tool_call_parser]
        if self.way == "auto" and self._knows_tools and '"parameters"' in self._template:
            self.way = "plain"

    def encode(self, body: ChatBody) -> tuple[list[int], ToolUse | None]:
        """The tokens of a chat body's messages, and the functions its answer may call.

        Raises:
            RequestError: messages, tools or template arguments are wrong, or the template refuses them.
        """
        tools, use = self.tools(body)
        resumes = body.continue_final_message
        if resumes and use is not None and use.forced:
            raise RequestError("tool_choice: a message cannot be continued as a forced call")
        if not self._template or self._encode is None:
            raise RequestError("the served model has no chat template; send input_ids, or use /v1/completions")
        try:
            messages = chat_messages("messages", body.messages)
            if not messages:
                raise RequestError("messages: the list is empty; at least one message is needed")
            check_variables(self._tokenizer, body.chat_template_kwargs)
            variables = {**body.chat_template_kwargs, "continue_final_message": resumes}
            text = self.text(messages, tools, body.add_generation_prompt and not resumes, **variables)
        except PromptError as error:
            raise RequestError(str(error)) from error
        return self._encode(text + (use.forced if use else ""), False), use

    def text(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], asks: bool, /, **variables: Any) -> str:
        """The chat as text, with its tools in words where the template knows nothing of them. Raises PromptError."""
        if not self._knows_tools:
            messages, tools = _told_in_text(messages, tools, self.way), []
        return render(self._tokenizer, messages, asks, **variables, tools=tools or None)

    def tools(self, body: ChatBody) -> tuple[list[dict[str, Any]], ToolUse | None]:
        """The tools that the prompt shows: none for tool_choice none."""
        tools = []
        for i, tool in enumerate(body.tools):
            checked(ToolBody, json_object(f"tools[{i}]", tool), within=f"tools[{i}].")
            tools.append({"type": "function", "function": tool["function"]})
        names = tuple(tool["function"]["name"] for tool in tools)
        choice, named = body.tool_choice, None
        if isinstance(choice, dict):
            named = json_object("tool_choice.function", choice.get("function")).get("name")
            if named not in names:
                raise RequestError(f"tool_choice: {shown(named)} is not among the tools {', '.join(names) or '(none)'}")
        elif choice is not None and choice not in TOOL_CHOICES:
            raise RequestError(f"tool_choice: expected {', '.join(TOOL_CHOICES)} or a function, found {shown(choice)}")
        elif choice == "required":
            if not tools:
                raise RequestError("tool_choice: required needs tools")
            named = names[0] if len(names) == 1 else None
        if not tools or choice == "none":
            return [], None
        forced = forced_start(self.way, named) if named or choice == "required" else ""
        return tools, ToolUse(names, self.way, forced, named)


def _told_in_text(messages: list[dict[str, Any]], tools: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    """Tools and calls as text, for a template that would leave them out."""
    told = [
        {**message, "content": (message["content"] + as_text(message["tool_calls"])).lstrip("\n")}
        if "tool_calls" in message
        else message
        for message in messages
    ]
    if not tools:
        return told
    system, rest = ([told[0]], told[1:]) if told[0]["role"] == "system" else ([], told)
    content = "\n\n".join([*(message["content"] for message in system), instructions(tools, way)])
    return [{"role": "system", "content": content}, *rest]


class ChatChoice(Choice):
    """Text, and calls of functions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    output_ids_name = "response_token_ids"
    num_calls = 0  # that were sent

    opening: ClassVar[dict[str, Any]] = {"role": "assistant", "content": ""}

    def content(self, answer: ShownAnswer, whole: bool) -> tuple[dict[str, Any], bool]:
        use = self.call.use
        text, calls = (answer.text, []) if use is None else read_calls(answer.text, use, answer.finished)
        new = [
            {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": asdict(call)}
            for call in calls[self.num_calls :]
        ]
        if whole:
            message = {"role": "assistant", "content": text if text.strip() or not calls else None}
            return {"message": {**message, "tool_calls": new} if new else message}, bool(calls)
        delta = {
            "content": text[self.num_characters :],
            "tool_calls": [{"index": i, **call} for i, call in enumerate(new, self.num_calls)],
        }
        self.num_characters, self.num_calls = len(text), len(calls)
        return {"delta": {key: value for key, value in delta.items() if value}}, bool(calls)

    def logprobs(self, answer: ShownAnswer) -> dict[str, Any]:
        def named(logprob: float, token: int) -> dict[str, Any]:
            text, utf8 = answer.token_text(token), token_bytes(answer.tokenizer, token)
            return {"token": text, "bytes": utf8, "logprob": json_number(logprob)}

        sequence = answer.sequence
        content = []
        for i in range(self.num_sent, answer.num_tokens):
            tops = [named(*pair) for pair in likeliest(sequence.top_logprobs, i)]
            content.append(
                {**named(sequence.logprobs[i], sequence.tokens[sequence.num_prompt + i]), "top_logprobs": tops}
            )
        return {"content": content, "refusal": None}
