"""One request while it is served: its tokens so far, where its keys and values lie, and how it ended.

Made by Engine.submit_all, owned by the engine thread until `future` is resolved, read by answers.py after that.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from arealite.inference.core.requests import GenerateRequest

Scored = list[tuple[float, int]]  # (logprob, token id)


@dataclass(eq=False)
class Sequence:
    """`tokens` is the prompt and everything generated; the first `num_computed` of them have keys and values in
    `pages`. `logprobs` and `versions` (a weight version string per token) have one entry per generated token."""

    request: GenerateRequest
    future: Future[Sequence] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    input_logprobs: list[float | None] = field(default_factory=list)
    pages: array[int] = field(default_factory=lambda: array("i"))
    num_computed: int = 0
    num_cached: int = 0  # leading tokens that were found computed when it first ran
    is_cached: bool = False  # most of its tokens were found computed when it came
    num_overtaking: int = 0  # later ones that were let by for that
    num_retractions: int = 0
    cut_mass: float = 0.0  # what top-k, top-p and min-p left out, summed over the generated tokens
    seed: int = 0
    listener: Callable[[Sequence], None] | None = None  # called on the engine thread after each token but the last
    # The likeliest tokens, and those that the client names, per output token and per scored prompt token.
    top_logprobs: list[Scored | None] = field(default_factory=list)
    token_ids_logprobs: list[Scored | None] = field(default_factory=list)
    input_top_logprobs: list[Scored | None] = field(default_factory=list)
    input_token_ids_logprobs: list[Scored | None] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    weight_version: str = ""  # of the server when it ended
    submitted_at: float = field(default_factory=time.perf_counter)
    finished_at: float = 0.0
    stop_ids: frozenset[int] = frozenset()  # tokens that end it; set by the batcher, which knows the model's
    epoch: int = 0  # of the weights that its keys and values were computed with; see cache.PrefixCache
    num_unending: int = field(init=False)  # so many generated tokens do not end it
    adjusts_logits: bool = field(init=False)  # see logits.py
    num_prompt: int = field(init=False)
    is_plain: bool = field(init=False)  # of its logits, nothing but a draw from all of them is wanted
    _prompt_key: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self._prompt_key = np.asarray(self.tokens, np.int32).tobytes()
        self.num_prompt = len(self.tokens)
        params = self.request.params
        penalties = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1
        self.num_unending = max(0, params.min_new_tokens - self.request.num_given)
        self.adjusts_logits = bool(penalties or params.logit_bias or self.num_unending)
        asks = self.request.top_logprobs_num or self.request.token_ids_logprob or params.forced_ids
        self.is_plain = not (self.adjusts_logits or params.is_restricted or asks)
        self.future.set_running_or_notify_cancel()  # whoever waits may go away; the engine resolves it all the same

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_missing(self) -> int:
        """Tokens whose keys and values are still to be computed; never 0 between steps, since the last one is new."""
        return len(self.tokens) - self.num_computed

    @property
    def key(self) -> bytes:
        """Its tokens, as they are compared with others'."""
        return self._prompt_key + np.asarray(self.output_ids, np.int32).tobytes()

    @property
    def needs_scores(self) -> bool:
        """Logprobs of the prompt are wanted and not all there."""
        start = self.request.logprob_start
        return start is not None and len(self.input_logprobs) < self.num_prompt - start

    @property
    def num_scored(self) -> int:
        """The prompt's first so many tokens need not be computed for logprobs: of what follows them, all is known or
        nothing is wanted."""
        start = self.request.logprob_start
        return self.num_prompt - 1 if start is None else start + max(0, len(self.input_logprobs) - 1)

    def forget_scores(self) -> None:
        """Prompt logprobs that are not complete begin anew: other weights may come before the rest."""
        if self.needs_scores:
            for scores in (self.input_logprobs, self.input_top_logprobs, self.input_token_ids_logprobs):
                scores.clear()

    def finish(self, reason: dict[str, Any], weight_version: str) -> None:
        """Mark as ended; the engine resolves the future after its pages are free."""
        self.finish_reason = reason
        self.weight_version = weight_version
        self.finished_at = time.perf_counter()


class Span(NamedTuple):
    """Tokens [start, start + count) of a sequence, computed in one forward pass; those before have keys and values."""

    sequence: Sequence
    start: int
    count: int  # type: ignore[assignment]  # not tuple's method

    @property
    def end(self) -> int:
        return self.start + self.count
