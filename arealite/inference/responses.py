"""What a client is shown of an answer: its text without what stopped it, and the entries of /generate.

`Answer` is read by routes.py and openai_responses.py, find_stop_string by batcher.py.
"""

from __future__ import annotations

import math
import time
from itertools import groupby
from typing import Any

from arealite.inference.core.sequence import Scored, Sequence
from arealite.inference.requests import GenerateRequest
from arealite.inference.tool_calls import held_back

BYTES_PER_CHARACTER = 4  # UTF-8 at most; a token is at least one byte
UNFINISHED_CHARACTER = "\ufffd"  # what the first bytes of a character decode to
# GPT-2's alphabet: a printable byte is its own character, the others are those from 256 on, in order.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}


def find_stop_string(tokenizer: Any, sequence: Sequence) -> str | None:
    """The stop string that the newest token completes, the earliest in the text if there are several.

    Only the end of the answer is decoded; a hit counts when the whole answer's text has it too. One that an answer's
    first min_new_tokens complete is no end (as in vLLM; SGLang lets it end the answer).
    """
    stop = sequence.request.params.stop
    if not stop or sequence.num_output <= sequence.num_forced:
        return None
    window = (max(map(len, stop)) + 1) * BYTES_PER_CHARACTER
    end = _decode(tokenizer, sequence, sequence.output_ids[-window:])
    if not any(s in end for s in stop):
        return None
    text = _decode(tokenizer, sequence, sequence.output_ids)
    at = {s: _find(tokenizer, sequence, text, s) for s in stop}
    return min((s for s in stop if at[s] >= 0), key=at.__getitem__, default=None)


def _find(tokenizer: Any, sequence: Sequence, text: str, stop: str) -> int:
    """Where in the answer's text the stop string is that may end it; -1 if nowhere."""
    num_forced = sequence.num_forced
    first_end = len(_decode(tokenizer, sequence, sequence.output_ids[:num_forced])) + 1 if num_forced else 0
    return text.find(stop, max(0, first_end - len(stop)))


def _decode(tokenizer: Any, sequence: Sequence, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=sequence.request.params.skip_special_tokens))


def answer_text(tokenizer: Any, sequence: Sequence) -> str:
    """The decoded answer without what stopped it (unless no_stop_trim); "" without a tokenizer."""
    if tokenizer is None:
        return ""
    matched = None if sequence.request.params.no_stop_trim else (sequence.finish_reason or {}).get("matched")
    if isinstance(matched, int):
        return _decode(tokenizer, sequence, sequence.output_ids[:-1])
    text = _decode(tokenizer, sequence, sequence.output_ids)
    return text if matched is None else text[: _find(tokenizer, sequence, text, matched)]


class Answer:
    """One sequence as far as its client has been shown it; while it runs, the engine thread adds to it.

    `num_known` tokens are known not to be the last. `text` and the first `num_tokens` tokens are shown; `new_text` and
    the tokens from `first_new` on were added by the last `advance`. Text that may yet be cut off stays out until it is
    known that it is not.
    """

    def __init__(self, tokenizer: Any, sequence: Sequence) -> None:
        self.tokenizer = tokenizer
        self.sequence = sequence
        self.text = ""
        self.new_text = ""
        self.num_known = 0
        self.num_tokens = 0
        self.first_new = 0
        self.finished = False
        self._decoded = ""  # the text of the first `_num_decoded` tokens
        self._window = 0  # decoding starts at this token
        self._num_decoded = 0

    @property
    def request(self) -> GenerateRequest:
        return self.sequence.request

    @property
    def finish_reason(self) -> dict[str, Any] | None:
        return self.sequence.finish_reason if self.finished else None

    @property
    def output_ids(self) -> list[int]:
        return self.sequence.output_ids[: self.num_tokens]

    def advance(self) -> bool:
        """Look at the sequence again; False when there is nothing new to show. The engine's failure is raised."""
        sequence = self.sequence
        self.finished = sequence.future.done()
        if self.finished:
            sequence.future.result()
            num_tokens, text = sequence.num_output, answer_text(self.tokenizer, sequence)
        else:
            num_tokens = self.num_known
            text = held_back(self._decode_more(num_tokens), self.request.params.stop)
        if not self.finished and num_tokens <= self.num_tokens:
            return False
        self.first_new, self.num_tokens = self.num_tokens, num_tokens
        self.new_text = text[len(self.text) :]
        self.text = text
        return True

    def _decode_more(self, num_tokens: int) -> str:
        """The text of the first tokens, from that of fewer: a few earlier ones are decoded again, because a token's
        text depends on the one before; an unfinished character is left out."""
        if self.tokenizer is None:
            return ""
        ids = self.sequence.output_ids
        known = _decode(self.tokenizer, self.sequence, ids[self._window : self._num_decoded])
        now = _decode(self.tokenizer, self.sequence, ids[self._window : num_tokens])
        if now.endswith(UNFINISHED_CHARACTER):
            return self._decoded
        self._decoded += now[len(known) :]
        self._window, self._num_decoded = self._num_decoded, num_tokens
        return self._decoded

    def token_text(self, token: int) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode([token]))

    def token_bytes(self, token: int) -> list[int]:
        """Its UTF-8. Part of a character has no text: its bytes are read from the vocabulary, which writes them in
        GPT-2's alphabet or as <0xNN>."""
        text = self.token_text(token)
        piece = self.tokenizer.convert_ids_to_tokens(token) if UNFINISHED_CHARACTER in text else ""
        if len(piece) == len("<0xNN>") and piece.startswith("<0x"):
            return [int(piece[1:-1], 16)]
        if piece and all(symbol in _BYTE_OF for symbol in piece):
            return [_BYTE_OF[symbol] for symbol in piece]
        return list(text.encode())


def version_spans(versions: list[str]) -> list[dict[str, Any]]:
    """Runs of equal versions: {"version", "start", "end"} in generated-token positions."""
    spans = []
    end = 0
    for version, run in groupby(versions):
        start, end = end, end + len(list(run))
        spans.append({"version": version, "start": start, "end": end})
    return spans


def json_number(value: float | None) -> float | None:
    """JSON has no NaN: a prompt scored by broken weights reads null, and its request ends as aborted."""
    return value if value is not None and math.isfinite(value) else None


def _entry(answer: Answer, logprob: float | None, token: int) -> list[Any]:
    text = answer.token_text(token) if answer.request.return_text_in_logprobs else None
    return [json_number(logprob), token, text]


def _entries(answer: Answer, positions: list[Scored | None]) -> list[list[list[Any]] | None]:
    return [None if scored is None else [_entry(answer, *pair) for pair in scored] for scored in positions]


def _logprobs(answer: Answer, first: int) -> dict[str, list[Any]]:
    """The lists of logprobs: of the prompt, and of the answer's tokens from `first` on."""
    sequence, request, shown = answer.sequence, answer.request, slice(first, answer.num_tokens)
    start = request.logprob_start
    scored = [] if start is None else zip(sequence.input_logprobs, request.prompt_ids[start:], strict=False)
    lists: dict[str, list[Any]] = {
        "input_token_logprobs": [_entry(answer, *pair) for pair in scored],
        "output_token_logprobs": [
            _entry(answer, *pair) for pair in zip(sequence.logprobs[shown], sequence.output_ids[shown], strict=True)
        ],
    }
    if request.top_logprobs_num:
        lists["input_top_logprobs"] = _entries(answer, sequence.input_top_logprobs)
        lists["output_top_logprobs"] = _entries(answer, sequence.top_logprobs[shown])
    if request.token_ids_logprob:
        lists["input_token_ids_logprobs"] = _entries(answer, sequence.input_token_ids_logprobs)
        lists["output_token_ids_logprobs"] = _entries(answer, sequence.token_ids_logprobs[shown])
    return lists


def meta_info(answer: Answer, first: int = 0) -> dict[str, Any]:
    """The protocol's account of one answer, with the logprobs of its tokens from `first` on."""
    sequence = answer.sequence
    versions = sequence.versions[: answer.num_tokens]
    account: dict[str, Any] = {
        "id": answer.request.rid,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": sequence.num_prompt,
        "completion_tokens": answer.num_tokens,
        "cached_tokens": sequence.num_cached,
        "weight_version": sequence.weight_version if answer.finished else "".join(versions[-1:]),
        "weight_versions": version_spans(versions),
        "num_retractions": sequence.num_retractions,
        "e2e_latency": (sequence.finished_at if answer.finished else time.perf_counter()) - sequence.submitted_at,
    }
    if sequence.cut_mass:  # ours
        account["cut_mass"] = sequence.cut_mass
    if answer.request.return_logprob:
        account |= _logprobs(answer, first)
        account["output_token_logprobs_length"] = answer.num_tokens
    return account


def render(answer: Answer, only_new: bool = False, with_prompt: bool = False) -> dict[str, Any]:
    """One entry of the /generate answer; `only_new` has just what the last `advance` added."""
    first = answer.first_new if only_new else 0
    entry: dict[str, Any] = {
        "text": answer.new_text if only_new else answer.text,
        "output_ids": answer.output_ids[first:],
        "meta_info": meta_info(answer, first),
    }
    if with_prompt:
        entry["prompt_token_ids"] = answer.request.prompt_ids
    return entry
