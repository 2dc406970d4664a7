"""A session's next prompt: the tokens that were sampled before, as they are, and what was said since, for session.py.

A request is compared with the turns of the session by its messages; the one that it goes on from gives its tokens. What
comes after them is taken from the chat template: the text of the whole request, behind the text of what the turn knew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from arealite.api.errors import PromptError, RequestError
from arealite.api.types import Completion
from arealite.dataset.prompts import Message, chat_messages, encode, render
from arealite.gateway.asks import Answer, Ask, CallOfTool
from arealite.inference.openai.chat import ChatTemplate
from arealite.inference.openai.tools import ToolUse, forced_start, read_calls

History = Literal["keep", "template"]
THOUGHT = "</think>"


class Past(Protocol):
    """A turn as it is looked at here: what was asked, what was answered, and all tokens up to its end."""

    @property
    def ask(self) -> Ask: ...

    @property
    def answer(self) -> Answer: ...

    @property
    def completion(self) -> Completion: ...

    @property
    def tokens(self) -> list[int]: ...


@dataclass(frozen=True)
class NextPrompt:
    """`added_ids` come after the tokens of the turn `parent` (its place in the session); None: they are all of the
    prompt, and `split_reason` says why no turn is gone on from ("" for a first one)."""

    parent: int | None
    added_ids: list[int]
    split_reason: str = ""


class Prompter:
    """Makes tokens of requests and answers of tokens.

    Args:
        history: what was thought in earlier turns: "keep" leaves it where it was sampled, "template" goes on from a
            turn only where the chat template would write the very same.
        tool_call_parser: how calls are written (inference/openai/tools.py).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, history: History = "keep", tool_call_parser: str = "auto"
    ) -> None:
        self.tokenizer, self.history = tokenizer, history
        self._template = ChatTemplate(tokenizer, None, tool_call_parser)

    def next_prompt(self, ask: Ask, turns: Sequence[Past]) -> NextPrompt:
        """Raises RequestError: no messages, or the chat template refuses them."""
        try:
            if ask.prompt is not None:
                return self._continued(ask.prompt, turns)
            return self._chat(ask, turns)
        except PromptError as error:
            raise RequestError(str(error)) from error

    def tool_use(self, ask: Ask) -> ToolUse | None:
        """The functions that the answer may call, and how its first call begins where it has to."""
        names = tuple(tool["function"]["name"] for tool in ask.tools)
        if not names or ask.tool_choice == "none":
            return None
        if ask.tool_choice == "auto":
            return ToolUse(names, self._template.way)
        named = ask.tool_choice if ask.tool_choice != "required" else names[0] if len(names) == 1 else None
        if named is not None and named not in names:
            raise RequestError(f"tool_choice: there is no tool {named}; there are {', '.join(names)}")
        return ToolUse(names, self._template.way, forced_start(self._template.way, named), named)

    def read(self, ask: Ask, completion: Completion, turn_number: int) -> Answer:
        """What was sampled, as text, thoughts and calls; a call that cannot be read stays text."""
        ids, matched = completion.token_ids, completion.matched
        if completion.finish_reason == "stop" and not isinstance(matched, str):
            ids = ids[:-1]  # the token that ended it
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if isinstance(matched, str):
            text = text[: text.rfind(matched)] if matched in text else text
        thought, end, said = text.rpartition(THOUGHT)
        reasoning, text = (thought.removeprefix("<think>").strip("\n"), said.lstrip("\n")) if end else ("", text)
        use = None if ask.prompt is not None else self.tool_use(ask)
        text, found = (text, []) if use is None else read_calls(text, use, True)
        calls = tuple(CallOfTool(f"call_{turn_number}_{i}", call.name, call.arguments) for i, call in enumerate(found))
        reason = "tool_calls" if calls else "stop_string" if isinstance(matched, str) else completion.finish_reason
        return Answer(
            text,
            reasoning,
            calls,
            "length" if reason == "length" else "stop" if reason == "abort" else reason,
            matched if isinstance(matched, str) else None,
            num_tokens=len(completion.token_ids),
        )

    def _continued(self, prompt: str | list[int], turns: Sequence[Past]) -> NextPrompt:
        """Raw text, or tokens, behind the longest of the turns that it begins with."""
        for number in sorted(range(len(turns)), key=lambda i: -len(turns[i].tokens)):
            past: str | list[int] = turns[number].tokens
            if isinstance(prompt, str):
                past = str(self.tokenizer.decode(turns[number].tokens, clean_up_tokenization_spaces=False))
            if prompt[: len(past)] == past:
                rest = prompt[len(past) :]
                return NextPrompt(number, encode(self.tokenizer, rest) if isinstance(rest, str) else rest)
        ids = encode(self.tokenizer, prompt, is_raw=True) if isinstance(prompt, str) else prompt
        return NextPrompt(None, ids, "another text" if turns else "")

    def _chat(self, ask: Ask, turns: Sequence[Past]) -> NextPrompt:
        messages = chat_messages("messages", ask.messages)
        if not messages:
            raise RequestError("there are no messages: give at least one")
        use = self.tool_use(ask)
        forced = use.forced if use is not None else ""
        whole = self._text(ask, messages)
        known = [identity(message) for message in messages]
        reason = "other messages" if turns else ""
        for number in sorted(range(len(turns)), key=lambda i: (-len(turns[i].ask.messages), -i)):
            turn = turns[number]
            past = [*turn.ask.messages, turn.answer.message()]
            if turn.ask.prompt is not None or known[: len(past)] != [identity(message) for message in past]:
                continue
            if turn.ask.tools != ask.tools or turn.ask.template_options != ask.template_options:
                reason = "other tools"
                continue
            rest = self._rest(ask, messages, len(past), whole)
            if rest is None:
                reason = "the chat template writes the history anew"
                continue
            return NextPrompt(number, encode(self.tokenizer, self._unsampled(turn, rest) + forced))
        return NextPrompt(None, encode(self.tokenizer, whole + forced), reason)

    def _text(self, ask: Ask, messages: list[Message], asks: bool = True) -> str:
        tools = [] if ask.tool_choice == "none" else ask.tools
        return self._template.text(messages, tools, asks, **ask.template_options)

    def _rest(self, ask: Ask, messages: list[Message], num_past: int, whole: str) -> str | None:
        """What the template writes from the end of the last known answer on; None where it cannot be told."""
        written = self._text(ask, messages[:num_past], False)
        closing = self._closing()
        if whole.startswith(written) and written.endswith(closing):
            return closing + whole[len(written) :]
        if self.history == "template":
            return None
        # It rewrites what was thought: what it writes behind the same answer without thoughts is the same.
        answer = {key: value for key, value in messages[num_past - 1].items() if key != "reasoning_content"}
        short = [{"role": "user", "content": "question"}, answer]
        written = render(self.tokenizer, short, False, **ask.template_options)
        whole = render(self.tokenizer, [*short, *messages[num_past:]], True, **ask.template_options)
        return closing + whole[len(written) :] if whole.startswith(written) and written.endswith(closing) else None

    def _closing(self) -> str:
        """What the chat template writes after an answer."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        return render(self.tokenizer, turns, False).rpartition("answer")[2]

    def _unsampled(self, turn: Past, rest: str) -> str:
        """`rest` without the token that ended the answer, which was sampled. An answer that was cut is closed."""
        completion = turn.completion
        if completion.finish_reason != "stop" or isinstance(completion.matched, str):
            return rest
        return rest.removeprefix(str(self.tokenizer.decode(completion.token_ids[-1:])))


def identity(message: Message) -> tuple[Any, ...]:
    """What two messages have in common that say the same: ids of calls, the order of keys and absent content differ
    from client to client."""
    calls = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        parsed = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        calls.append((call["function"]["name"], json.dumps(parsed, sort_keys=True)))
    return message["role"], (message.get("content") or "").strip(), tuple(calls)
