"""One step of continuous batching: who joins, one forward pass over prompts, one token for every running request.

Owned by the engine thread (engine.py), which calls `step` between two looks at its inbox.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from arealite.inference.layout import span_order
from arealite.inference.model import ServedModel
from arealite.inference.responses import find_stop_string
from arealite.inference.sampler import sample, uniform
from arealite.inference.scheduler import Admitted, Scheduler
from arealite.inference.scores import note_choices, score_prompt
from arealite.inference.sequence import Sequence, Span
from arealite.observe import waits

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 4096  # prompt tokens computed per step at most, so that running requests are not held up for long
RATE_WINDOW_S = 2.0  # span over which the generation rate is taken


@dataclass
class EngineCounters:
    """Totals since the start, and the current rate. Written by the engine thread, read by anyone."""

    num_generated_tokens: int = 0
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    num_nan_requests: int = 0
    tokens_per_s: float = 0.0
    last_token_at: float = 0.0  # time.time()


def abort_reason(message: str, err_type: str | None = None) -> dict[str, Any]:
    """The wire's finish reason of a request that did not end by itself."""
    return {"type": "abort", "message": message, "status_code": None, "err_type": err_type}


class Batcher:
    """The requests in flight on one model. `weight_version` stamps every token made from now on."""

    def __init__(self, model: ServedModel, max_running: int, kv_cache_tokens: int, weight_version: str) -> None:
        self.model = model
        self.weight_version = weight_version
        self.counters = EngineCounters()
        self.scheduler = Scheduler(model.make_pool(kv_cache_tokens), max_running, replay=model.deterministic)
        self._rate_since = time.perf_counter()
        self._rate_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, sequence: Sequence) -> None:
        self.scheduler.waiting.append(sequence)

    def in_flight(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def finish(self, sequence: Sequence, reason: dict[str, Any]) -> None:
        """End a request and answer it."""
        self.scheduler.remove(sequence)
        sequence.finish(reason, self.weight_version)
        sequence.future.set_result(sequence)

    def step(self) -> None:
        """Let waiting requests join, then give every running one its next token."""
        room = PREFILL_TOKENS
        while room > 0:
            admitted = self.scheduler.admit(room)
            if not (admitted.computed or admitted.shared):
                break
            room -= sum(num for _, num in admitted.computed)
            self._begin(admitted)
        if self.scheduler.running:
            self._decode()
        self._measure()

    def _begin(self, admitted: Admitted) -> None:
        """Compute the newcomers' prompts (one pass for all; one each where deterministic) and their first tokens."""
        num_per_pass = 1 if self.model.deterministic else self.scheduler.max_running
        for start in range(0, len(admitted.computed), num_per_pass):
            self._prefill(admitted.computed[start : start + num_per_pass])
        self.counters.num_cached_tokens += sum(s.num_cached for s, _ in admitted.shared)
        ready = [(s, logits) for s, logits in admitted.shared if not s.num_output]
        if ready:
            self._sample([s for s, _ in ready], torch.stack([logits for _, logits in ready]))

    def _prefill(self, newcomers: list[tuple[Sequence, int]]) -> None:
        """One pass over the first so many tokens of each, and the next token of those that are complete with it."""
        sequences, lengths = [s for s, _ in newcomers], [n for _, n in newcomers]
        hidden = self.model.forward(self.scheduler.pool, [Span(s, 0, n) for s, n in newcomers])
        self.counters.num_prefill_tokens += len(hidden)
        ends = torch.tensor(lengths, device=hidden.device).cumsum(0)
        logits = self.model.logits(hidden[ends - 1])
        finite = torch.isfinite(logits).all(-1).tolist()
        for i, (sequence, length) in enumerate(newcomers):
            if sequence.request.logprob_start is not None:
                score_prompt(self.model, sequence, 0, hidden[int(ends[i]) - length : int(ends[i])])
            if length == sequence.num_prompt and finite[i]:
                self.scheduler.index.add(sequence.prompt_key, sequence.pages, logits[i].clone())
        ready = [i for i, (s, length) in enumerate(newcomers) if length == len(s.tokens)]
        if ready:
            self._sample([sequences[i] for i in ready], logits[ready])

    def _decode(self) -> None:
        self.scheduler.grow()
        spans = sorted((Span(s, s.num_computed, 1) for s in self.scheduler.running), key=span_order)
        if not spans:
            return
        rows = [span.sequence for span in spans]
        num_rows = self.scheduler.max_running if self.model.deterministic else 0
        logits = self.model.logits(self.model.forward(self.scheduler.pool, spans, num_rows), num_rows)
        for sequence in rows:
            sequence.num_computed += 1
        ready = [i for i, s in enumerate(rows) if s.num_computed == len(s.tokens)]
        if ready:
            self._sample([rows[i] for i in ready], logits if len(ready) == len(rows) else logits[ready])

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Append one token to each sequence and end those that are done."""
        params = [s.request.params for s in sequences]
        uniforms = [uniform(s.seed, len(s.tokens)) for s in sequences]
        banned = [self._stop_ids(s) if s.num_output < s.request.params.min_new_tokens else None for s in sequences]
        drawn = sample(logits, params, uniforms, banned)
        note_choices(sequences, logits)
        for i, sequence in enumerate(sequences):
            if not drawn.ok[i]:
                self._finish_nan(sequence)
                continue
            if sequence.request.params.max_new_tokens > 0:
                sequence.tokens.append(drawn.tokens[i])
                sequence.logprobs.append(drawn.logprobs[i])
                sequence.versions.append(self.weight_version)
                self.counters.num_generated_tokens += 1
            reason = self._finish_reason(sequence)
            if reason is not None:
                self.finish(sequence, reason)
            elif sequence.listener is not None:
                sequence.listener(sequence)
        self.counters.last_token_at = time.time()
        waits.mark("token")

    def _stop_ids(self, sequence: Sequence) -> frozenset[int]:
        params = sequence.request.params
        return frozenset() if params.ignore_eos else self.model.eos_token_ids | params.stop_token_ids

    def _finish_reason(self, sequence: Sequence) -> dict[str, Any] | None:
        """Why the sequence ends with its last token: stop string, stop token, length, in this order; None to go on."""
        params = sequence.request.params
        if sequence.num_output:
            matched: str | int | None = find_stop_string(self.model.tokenizer, sequence)
            if matched is None and sequence.tokens[-1] in self._stop_ids(sequence):
                matched = sequence.tokens[-1]
            if matched is not None:
                return {"type": "stop", "matched": matched}
        if sequence.num_output >= params.max_new_tokens:
            return {"type": "length", "length": params.max_new_tokens}
        return None

    def _finish_nan(self, sequence: Sequence) -> None:
        self.counters.num_nan_requests += 1
        logger.error("request %s: the logits were not finite", sequence.request.rid)
        self.scheduler.index.clear()  # it may hold the page that this sequence goes on writing to
        self.scheduler.pool.clean(sequence.pages)
        message = "the model's logits were not finite; check the weights of the last update"
        self.finish(sequence, abort_reason(message, "NumericalError"))

    def _measure(self) -> None:
        now = time.perf_counter()
        if now - self._rate_since >= RATE_WINDOW_S:
            made = self.counters.num_generated_tokens - self._rate_tokens
            self.counters.tokens_per_s = made / (now - self._rate_since)
            self._rate_since, self._rate_tokens = now, self.counters.num_generated_tokens
