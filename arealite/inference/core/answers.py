"""The text of an answer: where a stop string ends it, and how much of it a client may be shown already.

find_stop_string is called by core/batcher.py; ShownAnswer is read by http/generation.py and openai/.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from arealite.inference.core.requests import GenerateRequest
from arealite.inference.core.sequence import Sequence

BYTES_PER_CHARACTER = 4  # UTF-8 at most; a token is at least one byte
UNFINISHED_CHARACTER = "\ufffd"  # what the first bytes of a character decode to
_BYTE_OF = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # GPT-2's alphabet


def find_stop_string(tokenizer: Any, sequence: Sequence) -> str | None:
    """The stop string that the newest token completes, the earliest in the text if there are several.

    Only the end of the answer is decoded; a hit counts when the whole answer's text has it too. One that an answer's
    first min_new_tokens complete is no end (as in vLLM; SGLang lets it end the answer).
    """
    stop = sequence.request.params.stop
    if not stop or sequence.num_output <= sequence.num_unending:
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
    num_unending = sequence.num_unending
    first_end = len(_decode(tokenizer, sequence, sequence.output_ids[:num_unending])) + 1 if num_unending else 0
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


def held_back(text: str, markers: Iterable[str]) -> str:
    """The text without an end that may be the beginning of one of the markers."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return text[: len(text) - longest]


class ShownAnswer:
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


def token_bytes(tokenizer: Any, token: int) -> list[int]:
    """Its UTF-8. Part of a character has no text: its bytes are read from the vocabulary, which writes them in GPT-2's
    alphabet or as <0xNN>."""
    text = "" if tokenizer is None else str(tokenizer.decode([token]))
    piece = tokenizer.convert_ids_to_tokens(token) if UNFINISHED_CHARACTER in text else ""
    if len(piece) == len("<0xNN>") and piece.startswith("<0x"):
        return [int(piece[1:-1], 16)]
    if piece and all(symbol in _BYTE_OF for symbol in piece):
        return [_BYTE_OF[symbol] for symbol in piece]
    return list(text.encode())
