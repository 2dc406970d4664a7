"""POST /v1/completions: text that continues a prompt; and what it shares with chats: a body becomes a call of
/generate, whose checks then hold for both, and answers become choices, whole or as a stream's chunks.

Used by chat.py and http/routes.py. The keys are OpenAI's; `matched_stop`, `metadata`, token ids and `meta_info` are
SGLang's.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from arealite.api.errors import RequestError
from arealite.inference.core.answers import ShownAnswer
from arealite.inference.core.requests import Body, ServedLimits
from arealite.inference.core.sequence import Scored
from arealite.inference.http.bodies import checked, shown
from arealite.inference.http.generation import (
    SAMPLING_KEYS,
    GenerateCall,
    json_number,
    meta_info,
    parse_generate,
    version_spans,
)
from arealite.inference.openai.tools import ToolUse

MAX_TOP_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16  # of a completion
_RENAMED = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}  # all other sampling keys have SGLang's names
_FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_UNSUPPORTED = ("functions", "function_call", "audio", "suffix", "use_beam_search")


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class ResponseFormat(Body):
    type: Literal["text"] = "text"


class OpenAIBody(Body):
    """Of both. The sampling keys are extra, and checked as those of /generate; `max_tokens` counts generated ones."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    lora_path: str | None = None
    rid: Any = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat = ResponseFormat()
    max_tokens: Any = None
    best_of: int | None = None
    return_token_ids: bool = False
    return_prompt_token_ids: bool = False
    return_meta_info: bool = False
    logprobs: Any = None  # a truth value of a chat, a number of a completion, where 0 asks for some too
    echo: bool = False  # of a completion: its prompt comes before the text

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None and self.logprobs is not False


@dataclass(frozen=True)
class Served:
    """What bodies are read against: `defaults` are sampling values that a body may leave out; `model_name` is what
    /v1/models shows."""

    limits: ServedLimits
    model_name: str
    defaults: dict[str, Any]


@dataclass(frozen=True)
class OpenAICall:
    """One checked call. Its requests are those of each prompt, one after the other."""

    body: OpenAIBody
    generate: GenerateCall
    model: str
    use: ToolUse | None = None  # of a chat


def model_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Sampling values that a model's generation_config.json asks for."""
    wanted = {key: generation_config.get(key) for key in _FROM_GENERATION_CONFIG}
    if wanted["top_k"] == 0:  # all tokens, as Transformers writes it
        wanted["top_k"] = -1
    return {key: value for key, value in wanted.items() if value is not None}


def sampling_of(body: OpenAIBody, served: Served) -> dict[str, Any]:
    """The `sampling_params` that a body asks for, without a length. Raises RequestError: what is not supported."""
    extra = body.model_extra or {}
    for name in _UNSUPPORTED:
        if extra.get(name):
            raise RequestError(f"{name}: not supported by this server; leave it out")
    if body.best_of not in (None, extra.get("n") or 1):
        raise RequestError("best_of: not supported by this server; use n")
    asked = {_RENAMED.get(name, name): value for name, value in extra.items()}
    off = ("stop_regex", "regex", "ebnf", "custom_params")
    return {**served.defaults, **{name: asked[name] for name in (*SAMPLING_KEYS, *off) if name in asked}}


def call_of(
    body: OpenAIBody, served: Served, prompt: dict[str, Any], sampling: dict[str, Any], num_top: int
) -> tuple[GenerateCall, str]:
    """The call of /generate, and the model's name for the answer. Raises RequestError, with the names that stand in the
    client's body."""
    model, adapter = body.model or served.model_name, body.lora_path
    if adapter is None and model != served.model_name:  # "base:adapter", or an adapter's own name
        adapter = model if model in served.limits.adapters else model.partition(":")[2].strip() or None
    generate = {
        **prompt,
        "sampling_params": sampling,
        "return_logprob": body.wants_logprobs,
        "top_logprobs_num": num_top,
        "logprob_start_len": 0 if body.echo and body.wants_logprobs else -1,
        "lora_path": adapter,
        "rid": body.rid,
        "stream": body.stream,
    }
    try:
        return parse_generate(generate, served.limits), model
    except RequestError as error:
        message = str(error).replace("sampling_params.", "")
        for name, generates in {**_RENAMED, "max_tokens": "max_new_tokens"}.items():
            message = message.replace(generates, name)
        if "messages" not in body.model_fields_set:
            message = re.sub(r"^(exactly one of )?(text and input_ids|text|input_ids)\b", "prompt", message)
        raise RequestError(message) from error


class CompletionBody(OpenAIBody):
    """`prompt` is text, token ids, or a list of either; `logprobs` is how many of the likeliest tokens are shown."""

    prompt: Any = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


def parse_completion(fields: dict[str, Any], served: Served) -> OpenAICall:
    """Raises RequestError: anything missing, contradictory, of the wrong type, out of range or not supported."""
    body = checked(CompletionBody, fields)
    prompt = body.prompt
    is_text = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str))
    if not is_text and not isinstance(prompt, list):
        raise RequestError(f"prompt: expected text, token ids, or a list of either, found {shown(prompt)}")
    length = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = {**sampling_of(body, served), "max_new_tokens": length}
    source = {"text" if is_text else "input_ids": prompt}
    return OpenAICall(body, *call_of(body, served, source, sampling, body.logprobs or 0))


class Choice:
    """One choice of an answer, and how much of it has been sent. Its two kinds differ in their keys."""

    kind = chunk_kind = ""  # the answer's "object"
    output_ids_name = ""
    opening: ClassVar[dict[str, Any] | None] = None  # the delta that comes before all text

    def __init__(self, call: OpenAICall, index: int) -> None:
        self.call = call
        self.index = index
        self.num_sent = 0  # tokens whose logprobs were sent
        self.num_characters = 0  # of the text sent

    def content(self, answer: ShownAnswer, whole: bool) -> tuple[dict[str, Any], bool]:
        """What is said and was not sent yet, as a chunk has it or as the `whole` answer, and whether a function is
        called."""
        raise NotImplementedError

    def logprobs(self, answer: ShownAnswer) -> dict[str, Any]:
        """Of the tokens from `num_sent` on."""
        raise NotImplementedError

    def show(self, answer: ShownAnswer, whole: bool) -> dict[str, Any] | None:
        """The whole, or the next chunk, with logprobs; once it has ended, with its reason and what an RL client asks
        for beyond. None: there is nothing new."""
        body = self.call.body
        content, called = self.content(answer, whole)
        has_new = any(content.values()) or (body.wants_logprobs and answer.num_tokens > self.num_sent)
        if not answer.finished and not has_new:
            return None
        told = {"index": self.index, **content, "logprobs": None, "finish_reason": None}
        if body.wants_logprobs:
            told["logprobs"] = self.logprobs(answer)
        self.num_sent = answer.num_tokens
        if not answer.finished:
            return told
        reason = answer.finish_reason or {}
        told["finish_reason"] = "tool_calls" if called and reason.get("type") == "stop" else reason.get("type")
        told["matched_stop"] = reason.get("matched")
        if body.return_token_ids or body.return_prompt_token_ids:
            told["prompt_token_ids"] = answer.request.prompt_ids
        if body.return_token_ids:
            told[self.output_ids_name] = answer.output_ids
        if body.return_meta_info:
            told["meta_info"] = meta_info(answer)
        return told


def likeliest(positions: list[Scored | None], i: int) -> Scored:
    return (positions[i] or []) if i < len(positions) else []


class CompletionChoice(Choice):
    """`echo` repeats the prompt before the text."""

    kind = chunk_kind = "text_completion"
    output_ids_name = "token_ids"
    offset = 0  # characters of the tokens whose logprobs were sent

    def content(self, answer: ShownAnswer, whole: bool) -> tuple[dict[str, Any], bool]:
        prompt, skip = "", answer.request.params.skip_special_tokens  # such as the first one, which nobody wrote
        if self.call.body.echo and answer.tokenizer is not None:
            prompt = answer.tokenizer.decode(answer.request.prompt_ids, skip_special_tokens=skip)
        text = (prompt + answer.text)[self.num_characters :]
        self.num_characters += len(text)
        return {"text": text}, False

    def logprobs(self, answer: ShownAnswer) -> dict[str, Any]:
        """With `echo` the prompt's tokens come first, the very first one without a logprob."""
        sequence, first, last = answer.sequence, self.num_sent, answer.num_tokens
        ids = answer.output_ids[first:]
        logprobs: list[float | None] = list(sequence.logprobs[first:last])
        tops = [likeliest(sequence.top_logprobs, i) for i in range(first, last)]
        if self.call.body.echo and not first:
            prompt = answer.request.prompt_ids
            tops = [likeliest(sequence.input_top_logprobs, i) for i in range(len(prompt))] + tops
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


def _usage(answers: list[ShownAnswer]) -> dict[str, Any]:
    """A prompt counts once, however many answers it has."""
    firsts = answers[:: answers[0].request.params.n]
    prompt_tokens = sum(answer.sequence.num_prompt for answer in firsts)
    completion_tokens = sum(answer.num_tokens for answer in answers)
    return token_usage(prompt_tokens, completion_tokens, sum(answer.sequence.num_cached for answer in firsts))


def token_usage(num_prompt: int, num_completion: int, num_cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def frame(answer_id: str, kind: str, model: str) -> dict[str, Any]:
    """What every part of one answer has."""
    return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}


def _frame(call: OpenAICall, kind: str) -> dict[str, Any]:
    """The id is the first request's, by which it can be aborted."""
    return frame(call.generate.requests[0].rid, kind, call.model)


def whole_answer(call: OpenAICall, choices: list[Choice], answers: list[ShownAnswer]) -> dict[str, Any]:
    first = answers[0].sequence
    pairs = zip(choices, answers, strict=True)
    return {
        **_frame(call, choices[0].kind),
        "choices": [choice.show(answer, whole=True) for choice, answer in pairs],
        "usage": _usage(answers),
        "metadata": {"weight_version": first.weight_version, "weight_versions": version_spans(first.versions)},
    }


async def chunks(
    call: OpenAICall, choices: list[Choice], growing: AsyncGenerator[tuple[int, ShownAnswer], None]
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream of one answer; its usage comes last, if asked for."""
    options = call.body.stream_options
    frame = _frame(call, choices[0].chunk_kind)
    answers: dict[int, ShownAnswer] = {}
    async with aclosing(growing):
        async for i, answer in growing:  # nothing before it: what is refused here is still answered by a status
            opening = choices[i].opening
            if opening is not None and i not in answers:
                begun = {"index": i, "delta": opening, "logprobs": None, "finish_reason": None}
                yield {**frame, "choices": [begun]}
            answers[i] = answer
            chunk = choices[i].show(answer, whole=False)
            if chunk is not None:
                usage = {"usage": _usage([answer])} if options.continuous_usage_stats else {}
                yield {**frame, "choices": [chunk], **usage}
    if options.include_usage:
        yield {**frame, "choices": [], "usage": _usage([answers[i] for i in sorted(answers)])}
