"""Messages of a chat into the prompt's tokens: checked, rendered by the model's own chat template, encoded.

Called by openai_requests.py.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from arealite.api.errors import RequestError
from arealite.inference.bodies import field, of_type, shown
from arealite.inference.tool_calls import PARSERS, ToolUse, as_text, forced_start, instructions

Encode = Callable[[str, bool], list[int]]  # text, and whether the tokenizer adds its special tokens
TOOL_CHOICES = ("none", "auto", "required")


class ChatTemplate:
    """The template of one tokenizer, and the way of writing calls that is asked of its model."""

    def __init__(self, tokenizer: Any, encode: Encode | None, tool_call_parser: str) -> None:
        """`tokenizer` may be None, for a folder without one; `tool_call_parser` is one of PARSERS."""
        self._tokenizer = tokenizer
        self._encode = encode
        template = None if tokenizer is None else tokenizer.chat_template
        self._template = "".join(template.values()) if isinstance(template, dict) else template or ""
        self._knows_tools = "tools" in self._template
        self._way = PARSERS[tool_call_parser]
        if self._way == "auto" and self._knows_tools and '"parameters"' in self._template:
            self._way = "plain"

    def encode(self, body: dict[str, Any]) -> tuple[list[int], ToolUse | None]:
        """The tokens of a chat body's messages, and the functions its answer may call.

        Raises:
            RequestError: messages, tools or template arguments are wrong, or the template refuses them.
        """
        messages = _messages(body.get("messages"))
        tools, use = self.tools(body)
        resumed = field(body, "continue_final_message", bool, False)
        if resumed and use is not None and use.forced:
            raise RequestError("tool_choice: a message cannot be continued as a forced call")
        if not self._template or self._encode is None:
            raise RequestError("the served model has no chat template; send input_ids, or use /v1/completions")
        options = _template_options(self._tokenizer, field(body, "chat_template_kwargs", dict, {}))
        if not self._knows_tools:
            messages = _told_in_text(messages, tools, self._way)
            tools = []
        begins = field(body, "add_generation_prompt", bool, True) and not resumed
        text = self._render(messages, tools or None, begins, resumed, options) + (use.forced if use else "")
        return self._encode(text, False), use

    def _render(self, messages: Any, tools: Any, begins: bool, resumed: bool, options: dict[str, Any]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=begins,
                    continue_final_message=resumed,
                    **options,
                )
            )
        except Exception as error:  # boundary: the template is the model's own program, run on what the client sent
            raise RequestError(f"the chat template refuses these messages: {type(error).__name__}: {error}") from error

    def tools(self, body: dict[str, Any]) -> tuple[list[dict[str, Any]], ToolUse | None]:
        """The tools that the prompt shows: none for tool_choice none."""
        tools = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(field(body, "tools", list, []))]
        names = tuple(tool["function"]["name"] for tool in tools)
        choice = body.get("tool_choice")
        named = None
        if isinstance(choice, dict):
            named = of_type("tool_choice.function", choice.get("function"), dict).get("name")
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
        forced = forced_start(self._way, named) if named or choice == "required" else ""
        return tools, ToolUse(names, self._way, forced, named)


def _tool(name: str, value: Any) -> dict[str, Any]:
    tool = of_type(name, value, dict)
    if tool.get("type", "function") != "function":
        raise RequestError(f"{name}.type: only functions are supported, found {shown(tool['type'])}")
    function = of_type(f"{name}.function", tool.get("function"), dict)
    if not of_type(f"{name}.function.name", function.get("name"), str):
        raise RequestError(f"{name}.function.name: it is empty")
    return {"type": "function", "function": function}


def _messages(value: Any) -> list[dict[str, Any]]:
    messages = [_message(f"messages[{i}]", message) for i, message in enumerate(of_type("messages", value, list))]
    if not messages:
        raise RequestError("messages: the list is empty; at least one message is needed")
    return messages


def _message(name: str, value: Any) -> dict[str, Any]:
    """One message as templates want it: text content, and the arguments of earlier calls as objects."""
    message = dict(of_type(name, value, dict))
    message["role"] = of_type(f"{name}.role", message.get("role"), str)
    message["content"] = _content(f"{name}.content", message.get("content"))
    calls = field(message, "tool_calls", list, [])
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [_earlier_call(f"{name}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return message


def _content(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    parts = []
    for i, part in enumerate(of_type(name, value, list)):
        kind = of_type(f"{name}[{i}]", part, dict).get("type")
        if kind != "text":
            raise RequestError(f"{name}[{i}].type: only text is supported, found {shown(kind)}")
        parts.append(of_type(f"{name}[{i}].text", part.get("text"), str))
    return "\n".join(parts)


def _earlier_call(name: str, value: Any) -> dict[str, Any]:
    call = of_type(name, value, dict)
    function = of_type(f"{name}.function", call.get("function"), dict)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{name}.function.arguments: not valid JSON: {str(error)[:200]}") from error
    of_type(f"{name}.function.arguments", arguments, dict)
    return {**call, "function": {"name": of_type(f"{name}.function.name", function.get("name"), str),
                                 "arguments": arguments}}  # fmt: skip


def _template_options(tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Variables for the template; nothing that steers the tokenizer itself, such as another template."""
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters
    refused = [key for key in options if key in reserved or key in ("messages", "tools", "documents")]
    if refused:
        raise RequestError(f"chat_template_kwargs: {', '.join(refused)} cannot be set here")
    return options


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
