"""Messages and tools of a chat body into the prompt's tokens, by the model's own chat template.

Called by openai_requests.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arealite.api.errors import PromptError, RequestError
from arealite.dataset.prompts import chat_messages, check_variables, render
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
        tools, use = self.tools(body)
        resumed = field(body, "continue_final_message", bool, False)
        if resumed and use is not None and use.forced:
            raise RequestError("tool_choice: a message cannot be continued as a forced call")
        if not self._template or self._encode is None:
            raise RequestError("the served model has no chat template; send input_ids, or use /v1/completions")
        variables = field(body, "chat_template_kwargs", dict, {})
        begins = field(body, "add_generation_prompt", bool, True) and not resumed
        try:
            messages = chat_messages("messages", body.get("messages"))
            if not messages:
                raise RequestError("messages: the list is empty; at least one message is needed")
            check_variables(self._tokenizer, variables)
            if not self._knows_tools:
                messages = _told_in_text(messages, tools, self._way)
                tools = []
            variables = {**variables, "tools": tools or None, "continue_final_message": resumed}
            text = render(self._tokenizer, messages, begins, **variables) + (use.forced if use else "")
        except PromptError as error:
            raise RequestError(str(error)) from error
        return self._encode(text, False), use

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
