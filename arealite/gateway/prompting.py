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
from arealite.gateway.forest import OTHER_MESSAGES, REWRITTEN, REWRITTEN_ANSWER, Prefixes, Turn, as_bytes
from arealite.gateway.reading import is_ended_by_token
from arealite.inference.openai.chat import ChatBody, ChatTemplate
from arealite.inference.openai.tools import ToolUse

History = Literal["keep", "template"]
MARK = "\u2042answer\u2042"  # stands where an answer is, to find what the template writes around it
QUESTION: Message = {"role": "user", "content": "?"}
# Variables by which templates of some families keep the thoughts of earlier turns, set where they know them.
KEEPING = {
    "preserve_thinking": True,
    "clear_thinking": False,
    "drop_thinking": False,
    "truncate_history_thinking": False,
    "auto_drop_analysis": False,
}


@dataclass(frozen=True)
class _Asked:
    """Messages as they were rendered: the text, the state of their digest, and what must not change, by name."""

    text: str
    state: hashlib.blake2b
    fixed: dict[str, bytes]


@dataclass(frozen=True)
class NextPrompt:
    """`added_ids` come after all tokens of turn `parent`; without one they are all. `reason`: of Turn. `use`: the
    functions that the answer may call. `thinks`: the prompt ends with the opening of a thought. `num_known` of its
    messages were there with the parent's answer; `asked` is for Memory.note."""

    parent: int | None
    added_ids: list[int]
    reason: str = ""
    use: ToolUse | None = None
    thinks: bool = False
    num_known: int = 0
    asked: _Asked | None = None


@dataclass(frozen=True)
class _Told:
    """What is known of a finished turn: its message; the text of its prompt and answer, without the token that ended
    it, by length and digest; and what else has to be equal for a request that goes on from it, by name."""

    turn: Turn
    message: Message
    num_characters: int
    digest: bytes
    fixed: dict[str, bytes]


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
        keeping = KEEPING if self.history == "keep" else {}
        self._options = {name: value for name, value in keeping.items() if name in str(self.tokenizer.chat_template)}

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
        return self.template.text(messages, tools, asks, **{**self._options, **ask.template_options})

    def ids(self, text: str, is_raw: bool = False) -> list[int]:
        return encode(self.tokenizer, text, is_raw=is_raw)


class Memory:
    """What one session's requests are recognised by. Holds digests, not texts."""

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._told: dict[bytes, list[_Told]] = {}  # by the digest of all messages with the answer
        self._raw: dict[type, Prefixes] = {str: Prefixes(), list: Prefixes()}  # of text, and of tokens
        self._asked: set[bytes] = set()  # digests of all messages that were answered

    def next_prompt(self, ask: Ask) -> NextPrompt:
        """Raises RequestError: messages or tools cannot be read, or the chat template refuses them."""
        try:
            return self._after_text(ask.prompt) if ask.prompt is not None else self._after_messages(ask)
        except PromptError as error:
            raise RequestError(str(error)) from error

    def note(self, turn: Turn, ask: Ask, prompt: NextPrompt, said: str) -> None:
        """A turn is finished: `ask` became `prompt`. `said` is the text of its tokens, without one that ended it."""
        if prompt.asked is not None:
            answer, text = chat_messages("messages", [turn.answer.message()])[0], prompt.asked.text + said
            told = _Told(turn, answer, len(text), _digest(text), prompt.asked.fixed)
            self._asked.add(prompt.asked.state.digest())
            self._told.setdefault(_states([answer], prompt.asked.state)[-1].digest(), []).append(told)
        elif isinstance(ask.prompt, str):
            said = str(self._prompter.tokenizer.decode(turn.sampled, clean_up_tokenization_spaces=False))
            self._raw[str].add(_utf8(ask.prompt + said), turn.id)
        elif ask.prompt is not None:
            self._raw[list].add(as_bytes([*ask.prompt, *turn.sampled]), turn.id)

    def _after_text(self, prompt: str | list[int]) -> NextPrompt:
        """Text goes on from a turn if it begins with all that this one's tokens say, the one that ended it included."""
        if isinstance(prompt, str):
            content = _utf8(prompt)
            num_shared, parent = self._raw[str].longest(content)
            if parent is None:
                return NextPrompt(None, self._prompter.ids(prompt, is_raw=True), "other text")
            rest = content[num_shared:].decode("utf-8", "surrogatepass")
            return NextPrompt(parent, self._prompter.ids(rest) if rest else [], "other text")
        num_known = len(self._prompter.tokenizer)
        if (wrong := next((id for id in prompt if not 0 <= id < num_known), None)) is not None:
            raise RequestError(f"prompt: {wrong} is no token of this model, which has {num_known}")
        num_shared, parent = self._raw[list].longest(as_bytes(prompt))
        return NextPrompt(parent, prompt[num_shared // 8 :], "other tokens")

    def _after_messages(self, ask: Ask) -> NextPrompt:
        prompter = self._prompter
        messages = chat_messages("messages", ask.messages)
        if not messages:
            raise PromptError("messages: there is none, and no prompt either")
        check_variables(prompter.tokenizer, ask.template_options)
        tools, use = prompter.tools_of(ask)
        forced = use.forced if use else ""
        whole = prompter.text(messages, tools, True, ask)
        thinks, states = whole.rstrip().endswith("<think>"), _states(messages)
        asked = _Asked(whole + forced, states[-1], _fixed(ask, messages))
        candidates = self._candidates(messages, states)
        rewritten = self._rewritten(messages, states, {place for place, _ in candidates})
        reason = OTHER_MESSAGES if rewritten < 0 else REWRITTEN_ANSWER
        for place, told in candidates:
            changed = [name for name, value in asked.fixed.items() if told.fixed[name] != value]
            ids = None if changed else self._suffix(told, messages, place, tools, ask, whole)
            if ids is not None:
                ids += prompter.ids(forced) if forced else []
                reason = OTHER_MESSAGES if rewritten < place and reason == REWRITTEN_ANSWER else reason
                return NextPrompt(told.turn.id, ids, reason, use, thinks, place + 1, asked)
            reason = f"other {changed[0]}" if changed else REWRITTEN
        return NextPrompt(None, prompter.ids(asked.text), reason, use, thinks, 0, asked)

    def _candidates(self, messages: list[Message], states: list[hashlib.blake2b]) -> list[tuple[int, _Told]]:
        """Turns whose messages, with the answer, the request begins with, and the answer's place in it: the longest
        first, of those the latest."""
        out = []
        for place in reversed(range(len(messages))):
            if messages[place]["role"] == "assistant":
                known = reversed(self._told.get(states[place].digest(), []))
                out += [(place, told) for told in known if _same_thought(messages[place], told.message)]
        return out

    def _rewritten(self, messages: list[Message], states: list[hashlib.blake2b], known: set[int]) -> int:
        """The last place with another answer than those that were sampled to what lies before it; -1: there is none."""
        answers = (i for i, m in enumerate(messages) if i and m["role"] == "assistant" and i not in known)
        return max((i for i in answers if states[i - 1].digest() in self._asked), default=-1)

    def _suffix(
        self, told: _Told, messages: list[Message], place: int, tools: list[dict[str, Any]], ask: Ask, whole: str
    ) -> list[int] | None:
        """Tokens that come after the answer, those of the end of its turn included; None: it is not proved."""
        is_exact = _digest(whole[: told.num_characters]) == told.digest
        after = whole[told.num_characters :] if is_exact else ""
        if not is_exact and self._prompter.history == "keep":
            after = self._after(messages[:place], messages[place], messages[place + 1 :], tools, ask, whole)
        if not after:
            return None
        ids, completion = self._prompter.ids(after), told.turn.completion
        if completion is not None and is_ended_by_token(completion):
            if ids[:1] == completion.token_ids[-1:]:
                return ids[1:]  # the token that ended the answer is the first of what follows it
            return ids if self._prompter.history == "keep" else None
        return ids

    def _after(
        self,
        earlier: list[Message],
        answer: Message,
        since: list[Message],
        tools: list[dict[str, Any]],
        ask: Ask,
        whole: str,
    ) -> str:
        """What the template writes after an answer whose text, or what lies before, it writes otherwise than it was
        sampled: without thoughts, with other blanks. Asked of a short conversation, which must be the end of the whole
        request from the answer on; else of the request itself. Empty: it cannot be told."""
        for before in ([QUESTION], earlier):
            after = self._around(before, answer, since, tools, ask)[1]
            try:
                begin = len(self._prompter.text(before, tools, False, ask)) if before else 0
                end = self._prompter.text([*before, answer, *since], tools, True, ask)[begin:]
            except PromptError:
                continue
            if after and end.endswith(after) and whole.endswith(end):
                return after
        return ""

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


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(_utf8(text), digest_size=16).digest()


def _states(messages: list[Message], state: hashlib.blake2b | None = None) -> list[hashlib.blake2b]:
    """Digests of each message with all before it, `state` among them. What leads as a system message is left out: some
    clients change a line of it with every call, and tokens decide in the end; so are ids of calls, and thoughts, which
    few clients send back."""
    out, is_leading = [], state is None
    state = hashlib.blake2b(digest_size=16) if state is None else state
    for message in messages:
        is_leading = is_leading and message["role"] in ("system", "developer")
        state = state.copy()
        if not is_leading:
            calls = [
                [call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])
            ]
            key = [message["role"], message["content"].strip(), calls]
            state.update(_utf8(json.dumps(key, sort_keys=True)))
        out.append(state)
    return out


def _same_thought(message: Message, told: Message) -> bool:
    """Whether the thought is the same, or was not sent back."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    return not thought or thought.strip() == (told.get("reasoning_content") or "").strip()


def _fixed(ask: Ask, messages: list[Message]) -> dict[str, bytes]:
    """What must not change from turn to turn of one row."""
    num_leading = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    values = {
        "system message": [m["content"] for m in messages[:num_leading]],
        "tools": [] if ask.tool_choice == "none" else ask.tools,
        "template options": ask.template_options,
        "model": ask.model,
    }
    return {name: _digest(json.dumps(value, sort_keys=True)) for name, value in values.items()}
