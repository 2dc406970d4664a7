"""The next prompt of a session: the tokens that were sampled before, kept as they are, and what has been said since.

Called by session.py. The chat template is asked for text only; what a model sampled is never decoded and encoded again.
No model family has code of its own here: what a template does is found out by rendering, and believed when it is
proved by the text of the whole request. Where it is not, the turn begins a new row, and the reason is counted.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from arealite.api.errors import ConfigError, PromptError, RequestError
from arealite.dataset.prompts import chat_messages, check_variables, encode
from arealite.gateway.asks import Ask, Message
from arealite.gateway.forest import Turn
from arealite.inference.openai.chat import ChatBody, ChatTemplate
from arealite.inference.openai.tools import ToolUse

History = Literal["keep", "template"]
MARK = "\u2042answer\u2042"  # stands where an answer is, to find what the template writes around it
FIRST = "first"


@dataclass(frozen=True)
class NextPrompt:
    """`added_ids` come after all tokens of turn `parent`; without one they are the whole prompt, for `reason`. `use`:
    the functions that the answer may call. `thinks`: the prompt ends with the opening of a thought."""

    parent: int | None
    added_ids: list[int]
    reason: str
    use: ToolUse | None
    thinks: bool


@dataclass(frozen=True)
class _Told:
    """What is known of a finished turn: its last message; the text of its messages before the answer, by length and
    digest; and what else has to be equal for a request that goes on from it, by name."""

    turn: Turn
    message: Message
    num_characters: int
    digest: bytes
    fixed: dict[str, str]
    forced: str


@dataclass
class Prompter:
    """Makes prompts with one tokenizer; keeps nothing of any session.

    `history`: "keep" extends what was sampled even where the deployed template would show it shortened later (without
    its thoughts); "template" does so only where the template writes the very same text, and begins a new row otherwise.
    """

    tokenizer: PreTrainedTokenizerBase
    history: History = "keep"
    tool_call_parser: str = "auto"
    template: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        if self.history not in ("keep", "template"):
            raise ConfigError(f"history: expected keep or template, found {self.history!r}")
        self.template = ChatTemplate(self.tokenizer, None, self.tool_call_parser)

    def memory(self) -> Memory:
        """For one session."""
        return Memory(self)

    def tools_of(self, ask: Ask) -> tuple[list[dict[str, Any]], ToolUse | None]:
        """Raises RequestError: a tool cannot be read, or the choice names none of them."""
        choice: Any = ask.tool_choice
        if choice not in ("none", "auto", "required"):
            choice = {"type": "function", "function": {"name": choice}}
        return self.template.tools(ChatBody(tools=ask.tools, tool_choice=choice))

    def text(self, messages: list[Message], tools: list[dict[str, Any]], asks: bool, ask: Ask) -> str:
        """Raises PromptError."""
        return self.template.text(messages, tools, asks, **ask.template_options)

    def ids(self, text: str, is_raw: bool = False) -> list[int]:
        return encode(self.tokenizer, text, is_raw=is_raw)


class Memory:
    """What one session's requests are recognised by. Holds a digest per turn, not its text."""

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._told: dict[bytes, list[_Told]] = {}  # by the digest of all messages with the answer
        self._raw: list[tuple[int, bytes, Turn]] = []  # of raw text: characters with the answer, digest
        self._raw_ids: list[tuple[list[int], Turn]] = []  # of token ids

    def next_prompt(self, ask: Ask) -> NextPrompt:
        """Raises RequestError: messages or tools cannot be read, or the chat template refuses them."""
        try:
            return self._after_text(ask) if ask.prompt is not None else self._after_messages(ask)
        except PromptError as error:
            raise RequestError(str(error)) from error

    def note(self, turn: Turn, text: str) -> None:
        """A turn is finished; `text` is what its tokens say, all of them, for raw prompts."""
        ask = turn.ask
        if isinstance(ask.prompt, str):
            whole = ask.prompt + text
            self._raw.append((len(whole), _digest(whole), turn))
        elif ask.prompt is not None:
            self._raw_ids.append(([*ask.prompt, *turn.sampled], turn))
        else:
            messages = chat_messages("messages", [*ask.messages, turn.answer.message()])
            tools, use = self._prompter.tools_of(ask)
            before = self._prompter.text(messages[:-1], tools, False, ask)
            forced = use.forced if use else ""
            told = _Told(turn, messages[-1], len(before), _digest(before), _fixed(ask, messages), forced)
            self._told.setdefault(_digests(messages)[-1], []).append(told)

    # -- raw text ------------------------------------------------------------------------------------------------

    def _after_text(self, ask: Ask) -> NextPrompt:
        prompt = ask.prompt
        if isinstance(prompt, str):
            found = [(n, t) for n, digest, t in self._raw if n <= len(prompt) and _digest(prompt[:n]) == digest]
            if found:
                size, turn = max(found, key=lambda pair: (pair[0], pair[1].id))
                rest = prompt[size:]
                return NextPrompt(turn.id, self._prompter.ids(rest) if rest else [], "", None, False)
            return NextPrompt(None, self._prompter.ids(prompt, is_raw=True), self._root("other text"), None, False)
        assert prompt is not None
        known = [(len(ids), t) for ids, t in self._raw_ids if prompt[: len(ids)] == ids]
        if known:
            size, turn = max(known, key=lambda pair: (pair[0], pair[1].id))
            return NextPrompt(turn.id, prompt[size:], "", None, False)
        return NextPrompt(None, list(prompt), self._root("other tokens"), None, False)

    def _root(self, reason: str) -> str:
        return reason if self._told or self._raw or self._raw_ids else FIRST

    # -- messages ------------------------------------------------------------------------------------------------

    def _after_messages(self, ask: Ask) -> NextPrompt:
        prompter = self._prompter
        messages = chat_messages("messages", ask.messages)
        if not messages:
            raise PromptError("messages: there is none, and no prompt either")
        check_variables(prompter.tokenizer, ask.template_options)
        tools, use = prompter.tools_of(ask)
        forced = use.forced if use else ""
        whole = prompter.text(messages, tools, True, ask)
        thinks = whole.rstrip().endswith("<think>")
        reason, fixed = self._root("other messages"), _fixed(ask, messages)
        for place, told in self._candidates(messages):
            changed = [name for name, value in fixed.items() if told.fixed[name] != value]
            ids = None if changed else self._suffix(told, messages, place, tools, ask, whole)
            if ids is not None:
                return NextPrompt(told.turn.id, [*ids, *(prompter.ids(forced) if forced else [])], "", use, thinks)
            reason = f"other {changed[0]}" if changed else "the template writes the history otherwise"
        return NextPrompt(None, prompter.ids(whole + forced), reason, use, thinks)

    def _candidates(self, messages: list[Message]) -> list[tuple[int, _Told]]:
        """Turns whose messages, with the answer, the request begins with, and the answer's place in it: the longest
        first, of those the latest."""
        out = []
        for place, digest in reversed(list(enumerate(_digests(messages)))):
            if messages[place]["role"] == "assistant":
                known = reversed(self._told.get(digest, []))
                out += [(place, told) for told in known if _same_thought(messages[place], told.message)]
        return out

    def _suffix(
        self, told: _Told, messages: list[Message], place: int, tools: list[dict[str, Any]], ask: Ask, whole: str
    ) -> list[int] | None:
        """Tokens that come after the answer, those of the end of its turn included; None: it is not proved."""
        answer, since = messages[place], messages[place + 1 :]
        before, after = self._around(messages[:place], answer, since, tools, ask)
        is_same = _digest(before[: told.num_characters]) == told.digest
        if self._prompter.history == "keep" and not (is_same and after and whole.endswith(after)):
            # The template shows what lies before otherwise by now, such as without its thoughts: what follows is asked
            # of a short conversation, and believed if the whole request ends with it.
            _, after = self._around([{"role": "user", "content": "?"}], answer, since, tools, ask)
        if not after or not whole.endswith(after):
            return None
        ids, sampled = self._prompter.ids(after), told.turn.sampled
        if sampled[-1:] == ids[:1]:  # the token that ended the answer is the first of what follows it
            ids, sampled = ids[1:], sampled[:-1]
        if self._prompter.history == "template":
            says = self._prompter.tokenizer.decode(sampled, clean_up_tokenization_spaces=False)
            if not is_same or whole != f"{before}{told.forced}{says}{after}":
                return None
        return ids

    def _around(
        self, earlier: list[Message], answer: Message, since: list[Message], tools: list[dict[str, Any]], ask: Ask
    ) -> tuple[str, str]:
        """The text before an answer and after it, found by a mark in its place; empty where the template hides it."""

        def split(marked: Message, following: list[Message], asks: bool) -> tuple[str, str]:
            before, mark, after = self._prompter.text([*earlier, marked, *following], tools, asks, ask).partition(MARK)
            return (before, after) if mark and MARK not in after else ("", "")

        plain: Message = {"role": "assistant", "content": MARK}
        try:
            return split(plain, since, True)
        except PromptError:
            if "tool_calls" not in answer:
                return "", ""
        try:  # results of tools may have to follow calls, whose text the answer's own tokens have
            calling = {**plain, "tool_calls": answer["tool_calls"]}
            before, after = split(calling, since, True)
            calls = split(calling, [], False)[1].removesuffix(split(plain, [], False)[1])
            return before, after.removeprefix(calls)
        except PromptError:
            return "", ""


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _digests(messages: list[Message]) -> list[bytes]:
    """Of each message with all before it. What leads as a system message is left out: some clients change a line of it
    with every call, and tokens decide in the end; so are ids of calls, and thoughts, which few clients send back."""
    state, out, is_leading = hashlib.blake2b(digest_size=16), [], True
    for message in messages:
        is_leading = is_leading and message["role"] in ("system", "developer")
        if not is_leading:
            calls = [
                [call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])
            ]
            key = [message["role"], message["content"].strip(), calls]
            state.update(json.dumps(key, sort_keys=True).encode("utf-8", "surrogatepass"))
        out.append(state.copy().digest())
    return out


def _same_thought(message: Message, told: Message) -> bool:
    """Whether the thought is the same, or was not sent back."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    return not thought or thought.strip() == (told.get("reasoning_content") or "").strip()


def _fixed(ask: Ask, messages: list[Message]) -> dict[str, str]:
    """What must not change from turn to turn of one row."""
    num_leading = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    return {
        "system message": json.dumps([m["content"] for m in messages[:num_leading]]),
        "tools": json.dumps([] if ask.tool_choice == "none" else ask.tools, sort_keys=True),
        "template options": json.dumps(ask.template_options, sort_keys=True),
        "model": ask.model,
    }
