"""Messages and raw text become tokens here, with the chat template and the tokenizer, and nowhere else.

Called for rows when they are loaded (loader.py, examples.py), by workflows for what they send, and by the built-in
server for what it is sent.
"""

from __future__ import annotations

import inspect
import json
import re
from reprlib import repr as shown  # what was found, shortened
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from arealite.api.errors import PromptError
from arealite.api.types import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

# A template is a program of the model's authors that runs on what users wrote.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

MAX_BY_CHANCE = 20  # characters that may stand in a text without being the message
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of what an assistant thought before its answer
FIX = (
    "change the messages (what a system message says can stand in prompt_template), or set tokenizer_path to a"
    " tokenizer whose template takes them"
)


def chat_messages(name: str, value: Any) -> list[Message]:
    """Messages as templates want them: content as text, arguments of earlier calls as objects, no key without a value.

    Raises PromptError: something is missing or of the wrong type; its place is named, beginning with `name`.
    """
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(_typed(name, value, list, "a list"))]


def _message(name: str, value: Any) -> Message:
    message = {key: v for key, v in _typed(name, value, dict, "{'role': ..., 'content': ...}").items() if v is not None}
    _typed(f"{name}.role", message.get("role"), str, "a string")
    message["content"] = _content(f"{name}.content", message.get("content"))
    calls = _typed(f"{name}.tool_calls", message.pop("tool_calls", []), list, "a list")
    if calls:
        message["tool_calls"] = [_earlier_call(f"{name}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return message


def _content(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for i, part in enumerate(_typed(name, value, list, "a string or a list of parts")):
        kind = _typed(f"{name}[{i}]", part, dict, "{'type': 'text', 'text': ...}").get("type")
        if kind != "text":
            raise PromptError(f"{name}[{i}].type: only text is supported, found {shown(kind)}")
        texts.append(_typed(f"{name}[{i}].text", part.get("text"), str, "a string"))
    return "\n".join(texts)


def _earlier_call(name: str, value: Any) -> dict[str, Any]:
    call = _typed(name, value, dict, "{'type': 'function', 'function': ...}")
    function = _typed(f"{name}.function", call.get("function"), dict, "{'name': ..., 'arguments': ...}")
    _typed(f"{name}.function.name", function.get("name"), str, "a string")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{name}.function.arguments: not valid JSON: {str(error)[:200]}") from error
    _typed(f"{name}.function.arguments", arguments, dict, "a JSON object")
    return {**call, "function": {"name": function["name"], "arguments": arguments}}


def _typed(name: str, value: Any, kind: type, called: str) -> Any:
    if not isinstance(value, kind):
        raise PromptError(f"{name}: expected {called}, found {shown(value)}")
    return value


def check_variables(tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], are_known: bool = False) -> None:
    """Raises PromptError for what steers the tokenizer itself, such as another template, rather than its template; and
    if they have to be known, for what the template does not name."""
    for name in variables:
        reserved = inspect.signature(tokenizer.apply_chat_template).parameters  # a tenth of a call of an agent
        if name in reserved or name == "messages":
            raise PromptError(f"chat_template_kwargs: {name} cannot be set here")
        if are_known and not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise PromptError(f"chat_template_kwargs: the chat template has no variable {name}: leave it out")


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], asks: bool = True, /, **variables: Any) -> str:
    """The chat as text; `asks`: ends where the assistant is to begin. `variables` are the template's, tools too.

    Raises PromptError: the template refuses the messages.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **variables))
    except TEMPLATE_ERRORS as error:
        raise PromptError(
            f"the chat template refuses these messages: {type(error).__name__}: {error}; {FIX}"
        ) from error


def check_shown(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str, asks: bool = True, /, **variables: Any
) -> None:
    """Raises PromptError where `text`, the rendered messages, lacks one of them, a call, or a tool. Templates leave out
    silently what they do not know; what the assistant said before others spoke some shorten on purpose."""

    def is_ignored(others: list[Message], **changes: Any) -> bool:
        try:
            return render(tokenizer, others, asks, **variables | changes) == text
        except PromptError:  # it looked, and did not like it
            return False

    lost = ["the tools"] if variables.get("tools") and is_ignored(messages, tools=None) else []
    for i, message in enumerate(messages):
        role, said, is_last = message["role"], message["content"].strip(), i == len(messages) - 1
        dropped = [key for key in ("tool_calls", *(REASONING if is_last else ())) if message.get(key)]
        others = {
            f"the {key.replace('_', ' ')}": {name: value for name, value in message.items() if name != key}
            for key in dropped
        }
        is_seen = role in ("user", "assistant") and len(said) > MAX_BY_CHANCE and said in text
        if not is_seen and (role != "assistant" or (is_last and said)):
            others[shown(message["content"])] = message | {"content": message["content"] + "?"}
        for what, other in others.items():
            if is_ignored([*messages[:i], other, *messages[i + 1 :]]):
                lost.append(f"{what} of role {role!r}")
    if lost:
        raise PromptError(f"the chat template leaves out {lost[0]}; {FIX}")


def check_text(text: str) -> str:
    """The text, if it consists of characters; else raises PromptError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text has half of a surrogate pair, which is no character ({shown(text[error.start])} at"
            f" {error.start}): remove it"
        ) from error
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str, is_raw: bool = False) -> list[int]:
    """Token ids of a text. A chat template has written the special tokens itself; raw text gets those that the
    tokenizer puts before a text, if they do not stand there already, and no end that nobody wrote.

    Raises PromptError: the text cannot be encoded.
    """
    plain = list(tokenizer(check_text(text), add_special_tokens=False)["input_ids"])
    if not is_raw:
        return plain
    ids = list(tokenizer(text)["input_ids"])
    if ids[-1:] == [tokenizer.eos_token_id] and ids[len(ids) - 1 - len(plain) : -1] == plain:
        ids = ids[:-1]
    before = ids[: len(ids) - len(plain)]
    return plain if plain[: len(before)] == before else ids


def prompt_text(tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """A task's prompt as the model is asked it. Raises PromptError: the template refuses it, or it is no text."""
    if task.messages is None:
        return check_text(task.prompt or "")
    return check_text(render(tokenizer, task.messages, **task.template_options))


def prompt_of(tokenizer: PreTrainedTokenizerBase, task: Task) -> tuple[str, list[int]]:
    """`prompt_text` and its token ids. Raises PromptError as that does, and where there is no token."""
    text = prompt_text(tokenizer, task)
    ids = encode(tokenizer, text, is_raw=task.messages is None)
    if not ids:
        raise PromptError("the prompt has no token: give it a text")
    return text, ids


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the chat template writes after an answer, white space left out; [] if it writes none, or fails."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        return encode(tokenizer, render(tokenizer, turns, False).rpartition("answer")[2].strip())
    except PromptError:
        return []
