"""One step of continuous batching: a forward pass over pieces of prompts and one token of every running request.

Owned by the engine thread (engine.py), which calls `step` between two looks at its inbox.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch

from arealite.devices import give_back
from arealite.inference.core.answers import find_stop_string
from arealite.inference.core.cache import PAGE_TOKENS
from arealite.inference.core.graphs import Started, decode_graphs
from arealite.inference.core.layout import to_device
from arealite.inference.core.logits import adjust, force, note_choices, score_prompt
from arealite.inference.core.sampler import Sampled, sample, uniform_numbers
from arealite.inference.core.scheduler import REPLAY_TOKENS, Scheduler
from arealite.inference.core.sequence import Sequence, Span
from arealite.inference.core.served_model import ServedModel
from arealite.observe import waits

logger = logging.getLogger(__name__)

STEP_TOKENS_CPU = 512  # a tenth of a second for a small model
STEP_TOKENS_GPU = 8192
JOINING_SHARE_GPU = 16  # passes with prompts are no graphs: few of them, with several prompts each
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

    def __init__(
        self,
        model: ServedModel,
        max_running: int,
        kv_cache_tokens: int,
        weight_version: str,
        step_tokens: int | None = None,
    ) -> None:
        """`step_tokens`: of prompts, computed in one step at most, so that nobody who runs is held up for long."""
        self.model = model
        self.weight_version = weight_version
        self.counters = EngineCounters()
        if step_tokens is None:
            step_tokens = STEP_TOKENS_CPU if model.device.type == "cpu" else STEP_TOKENS_GPU
        pool, joining = model.make_pool(kv_cache_tokens), None if model.device.type == "cpu" else JOINING_SHARE_GPU
        self.scheduler = Scheduler(pool, max_running, step_tokens, model.deterministic, joining)
        self._graphs = decode_graphs(model, self.scheduler.pool, max_running)
        self._started: Started | None = None  # a pass whose tokens nobody has seen
        self._rate_since = time.perf_counter()
        self._rate_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._started)

    def add(self, sequence: Sequence) -> None:
        params = sequence.request.params
        sequence.stop_ids = frozenset() if params.ignore_eos else self.model.eos_token_ids | params.stop_token_ids
        if self.model.adapters.lacks(sequence.request.lora):  # unloaded since the request was read
            self._answer(sequence, abort_reason(f"no adapter {sequence.request.lora!r} is loaded", "BadRequest"))
        else:
            self.scheduler.queue(sequence)

    def in_flight(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def finish(self, sequence: Sequence, reason: dict[str, Any]) -> None:
        """End a request and answer it."""
        self.scheduler.remove(sequence)
        self._answer(sequence, reason)

    def _answer(self, sequence: Sequence, reason: dict[str, Any]) -> None:
        sequence.finish(reason, self.weight_version)
        sequence.future.set_result(sequence)

    def step(self) -> None:
        """Let waiting requests join, give every running one its next token, and go on with the prompts.

        On a GPU, a pass that only decodes is begun and left; what it drew is looked at when the next one has begun.
        """
        if self._started is not None:
            ahead = self._start_ahead(self._started)
            self.catch_up()
            self._started = ahead
            if ahead is not None:
                self._measure()
                return
        for newcomer in self.scheduler.admit():
            self.counters.num_cached_tokens += newcomer.num_computed
        try:
            for spans in self.scheduler.plan():
                self._run(spans)
        except torch.OutOfMemoryError as error:
            self._shrink(error)
        self._measure()

    def catch_up(self) -> None:
        """Take in what was drawn by the pass begun last. Whoever looks at sequences or changes them does it before."""
        if self._started is not None:
            started, self._started = self._started, None
            self._append(started.sequences, None, started.wait())

    def release_memory(self) -> None:
        """Of the KV cache, which nobody uses."""
        if self._graphs is not None:
            self._graphs.clear()
        self.scheduler.pool.give_memory()

    def _start_ahead(self, started: Started) -> Started | None:
        """Begin the pass after `started`, whose tokens are not known, for those that are not sure to end with them;
        None if nobody goes on, somebody may join, or there is no room."""
        scheduler = self.scheduler
        goes_on = [
            s.finish_reason is None and len(s.tokens) + 1 < s.num_prompt + s.request.params.max_new_tokens
            for s in started.sequences
        ]
        going = list(compress(started.sequences, goes_on))
        if self._graphs is None or not going or scheduler.may_admit or not scheduler.grow_ahead(going):
            return None
        ahead = self._graphs.start_next(goes_on)
        if ahead is not None:
            for sequence in going:
                sequence.num_computed += 1
        return ahead

    def _decode(self, spans: list[Span]) -> bool:
        """A pass of one token of each sequence by a graph; False where there is none for these."""
        if self._graphs is None or not self.model.adapters.is_empty:
            return False
        sequences = [span.sequence for span in spans]
        hidden = None
        if all(sequence.is_plain for sequence in sequences):
            self._started = self._graphs.start(sequences)
        else:
            hidden = self._graphs.hidden(sequences)
        if self._started is None and hidden is None:
            return False
        for sequence in sequences:
            sequence.num_computed += 1
        if hidden is not None:
            self._append(sequences, *self._draw(sequences, self.model.logits(hidden)))
        return True

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        """Go on with half of what runs together, which begins anew. Raises MemoryError: there was but one."""
        scheduler = self.scheduler
        num_running, num_prompt = len(scheduler.running), scheduler.step_tokens
        advice = (
            f"no memory for a step of {num_running} requests and up to {num_prompt} tokens of prompts: {error}. Lower"
            " --kv-cache-tokens first, then --chunked-prefill-tokens and --max-running-requests"
        )
        if num_running == 1 and num_prompt <= PAGE_TOKENS:
            raise MemoryError(advice) from error
        scheduler.max_running, scheduler.step_tokens = max(1, num_running // 2), max(PAGE_TOKENS, num_prompt // 2)
        logger.warning("%s. Going on with at most %d and %d", advice, scheduler.max_running, scheduler.step_tokens)
        scheduler.retract_all()
        give_back()

    def _run(self, spans: list[Span]) -> None:
        """One forward pass, and the next token of every sequence that lacks none after it."""
        model, num_tokens = self.model, sum(span.count for span in spans)
        is_decode = all(span.count == 1 and span.start >= span.sequence.num_prompt for span in spans)
        if is_decode and self._decode(spans):
            return
        num_rows = 0 if not model.deterministic else self.scheduler.max_running if is_decode else REPLAY_TOKENS
        hidden = model.forward(self.scheduler.pool, spans, num_rows)
        ends = np.cumsum([span.count for span in spans])
        is_finite = None if is_decode else torch.isfinite(hidden).all()
        for span in spans:
            span.sequence.num_computed = span.end
        ready = [i for i, span in enumerate(spans) if span.end == len(span.sequence.tokens)]
        if ready:
            last = hidden if len(ready) == num_tokens else hidden[to_device([ends[ready] - 1], hidden.device)[0]]
            sequences = [spans[i].sequence for i in ready]
            logits, drawn = self._draw(sequences, model.logits(last, num_rows if is_decode else 0))
        if is_finite is not None:  # after the tokens, for which a GPU is waited for
            self._take_prompts(spans, ends, hidden, bool(is_finite))
        if ready:
            self._append(sequences, logits, drawn)

    def _take_prompts(self, spans: list[Span], ends: np.ndarray, hidden: torch.Tensor, is_finite: bool) -> None:
        """Score and share what has been computed of prompts, and end those with results that are not finite."""
        for span, end in zip(spans, ends, strict=True):
            part = hidden[end - span.count : end]
            is_sound = is_finite or bool(torch.isfinite(part).all())
            sequence = span.sequence
            if span.start < sequence.num_prompt:
                self.counters.num_prefill_tokens += span.count
                if sequence.needs_scores:
                    score_prompt(self.model, sequence, span.start, part)
            if not is_sound:
                self._finish_nan(sequence)
            elif span.count > 1:
                self.scheduler.share(sequence)

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor) -> tuple[torch.Tensor, Sampled]:
        """The next token of each sequence, and the logits that it was drawn from."""
        params = [s.request.params for s in sequences]
        uniforms = uniform_numbers((s.seed for s in sequences), (len(s.tokens) for s in sequences))
        logits = adjust(sequences, logits)
        return logits, force(sequences, logits, sample(logits, params, uniforms))

    def _append(self, sequences: list[Sequence], logits: torch.Tensor | None, drawn: Sampled) -> None:
        """Append one token to each sequence and end those that are done. `logits` are not needed for plain ones."""
        if logits is not None:
            note_choices(sequences, logits)
        for i, sequence in enumerate(sequences):
            if sequence.finish_reason is not None:  # by its prompt, or after this pass had begun
                continue
            if not drawn.ok[i]:
                self._finish_nan(sequence)
                continue
            if sequence.request.params.max_new_tokens > 0:
                sequence.tokens.append(drawn.tokens[i])
                sequence.logprobs.append(drawn.logprobs[i])
                sequence.versions.append(self.weight_version)
                sequence.cut_mass += drawn.cut.get(i, 0.0)
                self.counters.num_generated_tokens += 1
            reason = self._finish_reason(sequence)
            if reason is not None:
                self.finish(sequence, reason)
            elif sequence.listener is not None:
                sequence.listener(sequence)
        self.counters.last_token_at = time.time()
        waits.mark("token")

    def _finish_reason(self, sequence: Sequence) -> dict[str, Any] | None:
        """Why the sequence ends with its last token: stop string, stop token, length, in this order; None to go on."""
        params = sequence.request.params
        if sequence.num_output:
            matched: str | int | None = find_stop_string(self.model.tokenizer, sequence)
            if matched is None and sequence.tokens[-1] in sequence.stop_ids:
                matched = sequence.tokens[-1]
            if matched is not None:
                return {"type": "stop", "matched": matched}
        if sequence.num_output >= params.max_new_tokens:
            return {"type": "length", "length": params.max_new_tokens}
        return None

    def _finish_nan(self, sequence: Sequence) -> None:
        self.counters.num_nan_requests += 1
        logger.error("request %s: the logits were not finite", sequence.request.rid)
        message = "the model's logits were not finite; check the weights of the last update"
        self.scheduler.discard(sequence)
        self._answer(sequence, abort_reason(message, "NumericalError"))

    def _measure(self) -> None:
        now = time.perf_counter()
        if now - self._rate_since >= RATE_WINDOW_S:
            num_tokens = self.counters.num_generated_tokens - self._rate_tokens
            self.counters.tokens_per_s = num_tokens / (now - self._rate_since)
            self._rate_since, self._rate_tokens = now, self.counters.num_generated_tokens
