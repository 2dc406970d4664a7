"""POST /v1/completions: text that continues a prompt. Called by http/routes.py."""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field

from arealite.api.errors import RequestError
from arealite.inference.answers import ShownAnswer
from arealite.inference.http.bodies import checked, shown
from arealite.inference.http.generation import json_number
from arealite.inference.openai.calls import (
    MAX_TOP_LOGPROBS,
    Choice,
    OpenAIBody,
    OpenAICall,
    Served,
    call_of,
    likeliest,
    sampling_of,
)

DEFAULT_MAX_TOKENS = 16


class CompletionBody(OpenAIBody):
    """`prompt` is text, token ids, or a list of either; `logprobs` is how many of the likeliest tokens are shown."""

    prompt: Any = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


def parse_completion(fields: dict[str, Any], served: Served) -> OpenAICall:
    """As `parse_chat`."""
    body = checked(CompletionBody, fields)
    prompt = body.prompt
    is_text = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str))
    if not is_text and not isinstance(prompt, list):
        raise RequestError(f"prompt: expected text, token ids, or a list of either, found {shown(prompt)}")
    length = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = {**sampling_of(body, served), "max_new_tokens": length}
    source = {"text" if is_text else "input_ids": prompt}
    scores = body.echo and body.wants_logprobs
    return OpenAICall(body, *call_of(body, served, source, sampling, body.logprobs or 0, scores))


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
