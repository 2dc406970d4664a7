"""Sampled tokens read back as an answer: thoughts, text and calls of tools, whole or while they grow.

Used by session.py; one reader per turn.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from arealite.api.types import Completion, GenerationRequest
from arealite.gateway.asks import CLOSE_THOUGHT, Answer, AnswerReason, CallOfTool
from arealite.inference.core.answers import held_back, token_bytes
from arealite.inference.openai.tools import ToolCall, ToolUse, read_calls

OPEN_THOUGHT = "<think>"
UNFINISHED = "\ufffd"  # what the beginning of a character of several tokens reads as


def is_ended_by_token(completion: Completion) -> bool:
    """Whether the last token is one that ends answers, and says nothing."""
    return completion.finish_reason == "stop" and not isinstance(completion.matched, str)


class AnswerReader:
    """`thinks`: the prompt ends within a thought. What may still become something else (the beginning of a mark, of a
    stop string, of a character) is held back while the answer grows."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        use: ToolUse | None,
        thinks: bool,
        request: GenerationRequest,
    ) -> None:
        self.said = ""  # all text of the tokens but that of one that ended the answer
        self._tokenizer, self._use, self._thinks = tokenizer, use, thinks
        self._stop, self._stop_token_ids = request.stop, {*request.stop_token_ids, *tokenizer.all_special_ids}
        self._num_prompt, self._call_ids = len(request.input_ids), f"call_{request.rid.replace('.', '_')}_"
        self._begin = self._end = 0  # of the tokens that were decoded last, and what comes next

    def growing(self, ids: list[int]) -> Answer:
        """Of all ids so far."""
        if ids and ids[-1] in self._stop_token_ids:
            ids = ids[:-1]
        begun = self._decoded(ids[self._begin : self._end])
        more = self._decoded(ids[self._begin :])
        if len(more) > len(begun) and not more.endswith(UNFINISHED):
            self.said += more[len(begun) :]
            self._begin, self._end = self._end, len(ids)
        return self._answer(held_back(self.said, self._stop), len(ids), None, None)

    def whole(self, completion: Completion, wants_logprobs: bool = False) -> Answer:
        ids, matched = completion.token_ids, completion.matched
        text = self.said = self._decoded(ids[:-1] if is_ended_by_token(completion) else ids)
        if isinstance(matched, str) and matched in text:
            text = text[: text.rindex(matched)]
        reason: AnswerReason = "length" if completion.finish_reason == "length" else "stop"
        answer = self._answer(text, len(ids), reason, matched if isinstance(matched, str) else None)
        pairs = zip(ids, completion.logprobs, strict=True) if wants_logprobs else ()
        sampled = tuple((self._decoded([id]), token_bytes(self._tokenizer, id), logprob) for id, logprob in pairs)
        return replace(answer, sampled=sampled, num_cached_tokens=completion.num_cached_tokens)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""

    def _answer(self, text: str, num_tokens: int, reason: AnswerReason | None, matched: str | None) -> Answer:
        thought, text = self._thought(text, reason is not None)
        calls: list[ToolCall] = []
        if self._use is not None and text:
            text, calls = read_calls(text, self._use, reason is not None)
        if calls and reason == "stop":
            reason = "tool_calls"
        elif matched is not None and reason == "stop":
            reason = "stop_string"
        return Answer(
            text=text,
            reasoning=thought,
            calls=tuple(CallOfTool(f"{self._call_ids}{i}", c.name, c.arguments) for i, c in enumerate(calls)),
            reason=reason,
            matched=matched,
            num_prompt_tokens=self._num_prompt,
            num_tokens=num_tokens,
            num_reasoning_tokens=num_tokens if thought and not text and not calls else 0,
        )

    def _thought(self, text: str, is_whole: bool) -> tuple[str, str]:
        """What was thought, and what comes behind it."""
        begins = text.lstrip()
        if not self._thinks and not begins.startswith(OPEN_THOUGHT):
            may_begin = not is_whole and OPEN_THOUGHT.startswith(begins)
            return "", "" if may_begin else text
        inside = begins.removeprefix(OPEN_THOUGHT) if not self._thinks else text
        thought, close, after = inside.partition(CLOSE_THOUGHT)
        if not close and not is_whole:
            thought = held_back(thought, [CLOSE_THOUGHT]).rstrip()
        return thought.strip("\n"), after.lstrip("\n") if close else ""
