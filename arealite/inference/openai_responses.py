"""What /v1/chat/completions and /v1/completions answer: whole, or as a stream's chunks. Called by routes.py.

The keys are OpenAI's; `matched_stop`, `metadata`, token ids and `meta_info` are SGLang's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from arealite.inference.openai_requests import OpenAICall
from arealite.inference.responses import Answer, Scored, json_number, meta_info, version_spans
from arealite.inference.tool_calls import ToolCall, read_calls


class Choice:
    """One choice of an answer, and how much of it has been sent. Its two kinds differ in their keys."""

    kind = chunk_kind = ""  # the answer's "object"
    output_ids_name = ""

    def __init__(self, call: OpenAICall, index: int) -> None:
        self.call = call
        self.index = index
        self.num_sent = 0  # tokens whose logprobs were sent
        self.num_characters = 0  # of the text sent

    def opening(self) -> dict[str, Any] | None:
        """The chunk that comes before all text, if there is one."""
        return None

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The choice of an answer that has ended."""
        content, called = self.content(answer)
        return self._show(answer, content, called)

    def grown(self, answer: Answer) -> dict[str, Any] | None:
        """The next chunk, with all logprobs that were not sent; None when there is nothing to send."""
        content, called = self.new_content(answer)
        new_logprobs = self.call.logprobs and answer.num_tokens > self.num_sent
        return self._show(answer, content, called) if any(content.values()) or answer.finished or new_logprobs else None

    def _show(self, answer: Answer, content: dict[str, Any], called: bool) -> dict[str, Any]:
        shown = {"index": self.index, **content, "logprobs": None, "finish_reason": None}
        if self.call.logprobs:
            shown["logprobs"] = self.logprobs(answer)
        self.num_sent = answer.num_tokens
        if not answer.finished:
            return shown
        reason = answer.finish_reason or {}
        kind = "tool_calls" if called and reason.get("type") == "stop" else reason.get("type")
        ending = {"finish_reason": kind, "matched_stop": reason.get("matched")}
        return {**shown, **ending, **_extras(self.call, answer, self.output_ids_name)}

    def content(self, answer: Answer) -> tuple[dict[str, Any], bool]:
        """All that is said, and whether a function is called."""
        raise NotImplementedError

    def new_content(self, answer: Answer) -> tuple[dict[str, Any], bool]:
        """The same of what was not sent yet."""
        raise NotImplementedError

    def logprobs(self, answer: Answer) -> dict[str, Any]:
        """Of the tokens from `num_sent` on."""
        raise NotImplementedError


class ChatChoice(Choice):
    """Text, and calls of functions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    output_ids_name = "response_token_ids"
    num_calls = 0

    def opening(self) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def content(self, answer: Answer) -> tuple[dict[str, Any], bool]:
        content, calls = self._read(answer)
        message: dict[str, Any] = {"role": "assistant", "content": content if content.strip() or not calls else None}
        if calls:
            message["tool_calls"] = [_shown_call(call) for call in calls]
        return {"message": message}, bool(calls)

    def new_content(self, answer: Answer) -> tuple[dict[str, Any], bool]:
        content, calls = self._read(answer)
        delta: dict[str, Any] = {}
        if len(content) > self.num_characters:
            delta["content"] = content[self.num_characters :]
            self.num_characters = len(content)
        if len(calls) > self.num_calls:
            new = enumerate(calls[self.num_calls :], self.num_calls)
            delta["tool_calls"] = [{"index": i, **_shown_call(call)} for i, call in new]
            self.num_calls = len(calls)
        return {"delta": delta}, bool(calls)

    def _read(self, answer: Answer) -> tuple[str, list[ToolCall]]:
        return read_calls(answer.text, self.call.use, answer.finished) if self.call.use else (answer.text, [])

    def logprobs(self, answer: Answer) -> dict[str, Any]:
        sequence = answer.sequence
        content = []
        for i in range(self.num_sent, answer.num_tokens):
            entry = _named(answer, sequence.logprobs[i], sequence.tokens[sequence.num_prompt + i])
            tops = _top(sequence.top_logprobs, i)
            content.append({**entry, "top_logprobs": [_named(answer, *pair) for pair in tops]})
        return {"content": content, "refusal": None}


class CompletionChoice(Choice):
    """Text that continues the prompt; `echo` repeats the prompt before it."""

    kind = chunk_kind = "text_completion"
    output_ids_name = "token_ids"
    offset = 0  # characters of the tokens whose logprobs were sent

    def content(self, answer: Answer) -> tuple[dict[str, Any], bool]:
        prompt, skip = "", answer.request.params.skip_special_tokens  # such as the first one, which nobody wrote
        if self.call.echo and answer.tokenizer is not None:
            prompt = answer.tokenizer.decode(answer.request.prompt_ids, skip_special_tokens=skip)
        return {"text": prompt + answer.text}, False

    def new_content(self, answer: Answer) -> tuple[dict[str, Any], bool]:
        text = self.content(answer)[0]["text"][self.num_characters :]
        self.num_characters += len(text)
        return {"text": text}, False

    def logprobs(self, answer: Answer) -> dict[str, Any]:
        """With `echo` the prompt's tokens come first, the very first one without a logprob."""
        sequence, first, last = answer.sequence, self.num_sent, answer.num_tokens
        ids = answer.output_ids[first:]
        logprobs: list[float | None] = list(sequence.logprobs[first:last])
        tops = [_top(sequence.top_logprobs, i) for i in range(first, last)]
        if self.call.echo and not first:
            prompt = answer.request.prompt_ids
            tops = [_top(sequence.input_top_logprobs, i) for i in range(len(prompt))] + tops
            scored = sequence.input_logprobs or [None] * len(prompt)  # none of a request that was aborted in the queue
            ids, logprobs = prompt + ids, [*scored, *logprobs]
        texts = [answer.token_text(token) for token in ids]
        *offsets, self.offset = accumulate(map(len, texts), initial=self.offset)
        return {
            "tokens": texts,
            "token_logprobs": [json_number(logprob) for logprob in logprobs],
            "top_logprobs": [{answer.token_text(token): json_number(p) for p, token in top} for top in tops]
            if answer.request.top_logprobs_num
            else None,
            "text_offset": offsets,
        }


def _shown_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _named(answer: Answer, logprob: float, token: int) -> dict[str, Any]:
    return {"token": answer.token_text(token), "bytes": answer.token_bytes(token), "logprob": json_number(logprob)}


def _top(positions: list[Scored | None], i: int) -> Scored:
    return (positions[i] or []) if i < len(positions) else []


def _extras(call: OpenAICall, answer: Answer, output_name: str) -> dict[str, Any]:
    """What an RL client asks for beyond the text."""
    extra: dict[str, Any] = {}
    if call.return_token_ids or call.return_prompt_token_ids:
        extra["prompt_token_ids"] = answer.request.prompt_ids
    if call.return_token_ids:
        extra[output_name] = answer.output_ids
    if call.return_meta_info:
        extra["meta_info"] = meta_info(answer)
    return extra


def _usage(call: OpenAICall, answers: list[Answer]) -> dict[str, Any]:
    """A prompt counts once, however many answers it has."""
    firsts = answers[:: call.num_samples]
    prompt_tokens = sum(answer.sequence.num_prompt for answer in firsts)
    completion_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(answer.sequence.num_cached for answer in firsts)},
    }


def _frame(call: OpenAICall, kind: str) -> dict[str, Any]:
    """What every part of one answer has: its id is the first request's, by which it can be aborted."""
    return {"id": call.generate.requests[0].rid, "object": kind, "created": int(time.time()), "model": call.model}


def whole_answer(call: OpenAICall, choice_of: type[Choice], answers: list[Answer]) -> dict[str, Any]:
    first = answers[0].sequence
    return {
        **_frame(call, choice_of.kind),
        "choices": [choice_of(call, i).whole(answer) for i, answer in enumerate(answers)],
        "usage": _usage(call, answers),
        "metadata": {"weight_version": first.weight_version, "weight_versions": version_spans(first.versions)},
    }


async def chunks(
    call: OpenAICall, choice_of: type[Choice], growing: AsyncGenerator[tuple[int, Answer], None]
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream of one answer; its usage comes last, if asked for."""
    frame = _frame(call, choice_of.chunk_kind)
    choices = [choice_of(call, i) for i in range(len(call.generate.requests))]
    answers: dict[int, Answer] = {}
    async with aclosing(growing):
        async for i, answer in growing:  # nothing before it: what is refused here is still answered by a status
            opening = None if i in answers else choices[i].opening()
            if opening is not None:
                yield {**frame, "choices": [opening]}
            answers[i] = answer
            chunk = choices[i].grown(answer)
            if chunk is not None:
                usage = {"usage": _usage(call, [answer])} if call.usage_in_each else {}
                yield {**frame, "choices": [chunk], **usage}
    if call.include_usage:
        yield {**frame, "choices": [], "usage": _usage(call, [answers[i] for i in sorted(answers)])}
