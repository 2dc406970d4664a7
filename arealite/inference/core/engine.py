"""The engine thread: it alone touches the model, the KV cache and the queue; everyone else sends it requests and calls.

Made by serve.py, fed by http/. Between two steps it takes what came in; paused or idle it sleeps on its inbox.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import torch

from arealite import devices
from arealite.api.errors import ArealiteError, RequestError
from arealite.inference.core.adapters import Adapter
from arealite.inference.core.batcher import Batcher, abort_reason
from arealite.inference.core.requests import GenerateRequest
from arealite.inference.core.sequence import Sequence
from arealite.observe import waits

logger = logging.getLogger(__name__)

IDLE_SLICE_S = 5.0  # an idle engine starts its wait anew this often, so that idleness never looks like a stall
IDLE_LIMIT_S = 60.0
STEP_LIMIT_S = 600.0  # one forward pass; shown, not enforced: nothing can interrupt it
CALL_LIMIT_S = 600.0  # a call waits for the step that is running, and a weight update reads a folder
SHUTDOWN = "the server is shutting down"
MAX_QUEUED = 65_536  # requests

PauseMode = Literal["abort", "retract", "in_place"]
T = TypeVar("T")
Call = tuple[Callable[[], Any], Future[Any]]  # work for the engine thread between two steps, and its answer


class EngineFailure(Exception):
    """The engine thread has ended; the message is its traceback, or says that the server shuts down."""


class QueueFull(EngineFailure):
    """More requests than are let wait; later, or another server, may take them."""


class Engine:
    """Owner of a Batcher. `start`, `stop`, `submit_all`, `call` and `ask` may be used from any thread; the methods that
    change what is served (pause, abort, replace_adapter, ...) run on the engine thread, through `call` or `ask`."""

    def __init__(
        self, batcher: Batcher, seed: int, max_queued: int = MAX_QUEUED, num_threads: int | None = None
    ) -> None:
        """`seed` starts the stream of seeds for requests that bring none; `max_queued` requests may wait;
        `num_threads` compute, if the process should not decide."""
        self.batcher = batcher
        self._num_threads = num_threads
        self._max_queued = max_queued
        self.paused: PauseMode | None = None
        self.failure = ""
        self.stopped = threading.Event()
        self._inbox: queue.SimpleQueue[Sequence | Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing enters the inbox from outside once `stopped` is set
        self._seeds = random.Random(seed)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, limit_s: float) -> None:
        """Abort what is in flight and end the thread; waits at most `limit_s` for the current step."""
        self._inbox.put(None)
        self._thread.join(limit_s)

    def submit_all(self, requests: list[GenerateRequest]) -> list[Sequence]:
        """Queue requests, all or none; a sequence's future is resolved with the sequence itself, once it has ended.

        Raises:
            QueueFull: so many may not wait.
            EngineFailure: the engine has ended.
        """
        sequences = [Sequence(request) for request in requests]
        num_queued = len(self.batcher.scheduler.waiting) + self._inbox.qsize()
        if num_queued + len(requests) > self._max_queued:
            raise QueueFull(f"{num_queued} requests wait, {len(requests)} more would pass {self._max_queued}")
        with self._lock:
            for sequence in sequences:
                seed = sequence.request.params.sampling_seed
                sequence.seed = self._seeds.getrandbits(63) if seed is None else seed
                self._put(sequence)
        return sequences

    def call(self, run: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread between two steps, in the order of calls and submissions.

        An ArealiteError is its answer; any other exception ends the engine, since nobody knows what it left behind.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # whoever waits may go away, the call is made
        with self._lock:
            self._put((run, future))
        return future

    async def ask(self, name: str, run: Callable[[], T], limit_s: float | None = None) -> T:
        """`call`, awaited under a name and a limit; the call is made at once, and also when the awaiting ends."""
        future = asyncio.wrap_future(self.call(run))
        return await waits.bounded(future, name, "engine", limit_s or CALL_LIMIT_S)

    def _put(self, entry: Sequence | Call) -> None:
        if self.stopped.is_set():
            raise EngineFailure(self.failure or SHUTDOWN)
        self._inbox.put(entry)

    def pause(self, mode: PauseMode) -> None:
        """Stop stepping. abort: end all requests with what they have; retract: drop their keys and values, keep their
        tokens; in_place: keep both."""
        self.paused = mode
        if mode == "abort":
            self.abort(lambda _: True)
        elif mode == "retract":
            self.batcher.scheduler.retract_all()

    def resume(self) -> None:
        self.paused = None

    def abort(self, chosen: Callable[[Sequence], bool]) -> None:
        """End the chosen ones of the requests in flight."""
        for sequence in self.batcher.in_flight():
            if chosen(sequence):
                begun = bool(sequence.pages) or sequence.num_output > 0
                self.batcher.finish(sequence, abort_reason("Aborted" if begun else "Abort in waiting queue"))

    def flush_cache(self) -> bool:
        """Forget computed prompts; False while keys and values are in use."""
        if self.batcher.scheduler.running:
            return False
        self.batcher.scheduler.prefix.clear()
        return True

    def release_memory(self) -> None:
        """Give back the memory of the KV cache; requests that come wait for `resume_memory`.

        Raises:
            RequestError: requests have keys and values there.
        """
        scheduler = self.batcher.scheduler
        if scheduler.running:
            raise RequestError(
                f"{len(scheduler.running)} requests are running, whose keys and values cannot be given up: call"
                " /pause_generation with mode retract or abort before"
            )
        scheduler.prefix.clear()
        self.batcher.release_memory()

    def resume_memory(self) -> None:
        """Raises RequestError: the card has no such memory any more, and the cache stays released."""
        if not self.batcher.scheduler.pool.has_memory:
            try:
                self.batcher.scheduler.pool.take_memory()
            except torch.OutOfMemoryError as error:
                raise RequestError(f"the KV cache cannot have its memory back, others have it: {error}") from error

    def set_weight_version(self, version: str, abort_all: bool) -> None:
        if abort_all:
            self.abort(lambda _: True)
        self.batcher.weight_version = version

    def replace_adapter(self, name: str, adapter: Adapter, weight_version: str | None) -> None:
        """Serve `adapter` under `name` from now on, instead of the one of that name, if there is one. Running requests
        and computed prompts fare as in weight_updates.py's `make_live`."""
        self.forget_computed(False)
        self.batcher.model.adapters.add(name, adapter, in_place=True)
        if weight_version is not None:
            self.batcher.weight_version = weight_version

    def forget_computed(self, abort_all: bool) -> None:
        """Weights are about to change: requests end (`abort_all`), or start over unless they are paused in place."""
        self.batcher.scheduler.prefix.clear()  # first, so that nothing of those who end now is kept
        if abort_all:
            self.abort(lambda _: True)
        elif self.paused != "in_place":
            self.batcher.scheduler.retract_all()

    def remove_adapter(self, name: str) -> bool:
        """False while requests use it."""
        if any(sequence.request.lora == name for sequence in self.batcher.in_flight()):
            return False
        self.batcher.model.adapters.remove(name)
        self.batcher.scheduler.prefix.clear()  # the name may come back with other weights
        return True

    def _run(self) -> None:
        """Consumes: the inbox (requests, calls, the stop mark).
        Produces: resolved futures.
        Waits for: the inbox, when idle or paused.
        Unblocked by: submit_all, call and stop, each of which puts an entry there.
        """
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        devices.use(self.batcher.model.device)
        try:
            with torch.inference_mode():
                while self._take_inbox():
                    if self._is_busy:
                        with waits.waiting("engine step", "model", STEP_LIMIT_S, self._rids):
                            self.batcher.step()
            self._close("")
        except Exception:  # supervisor: whatever happened, every client must hear of it and the process must end
            logger.exception("the engine thread failed")
            self._close(traceback.format_exc())

    @property
    def _is_busy(self) -> bool:
        return self.paused is None and self.batcher.has_work and self.batcher.scheduler.pool.has_memory

    def _take_inbox(self) -> bool:
        """Take everything that came in, sleeping while there is nothing to do; False at the stop mark."""
        idle = not self._is_busy
        while True:
            try:
                entry = self._sleep() if idle else self._inbox.get_nowait()
            except queue.Empty:
                return True
            idle = False
            if entry is None:
                return False
            if isinstance(entry, Sequence):
                self.batcher.add(entry)
            else:
                self._answer(*entry)

    def _sleep(self) -> Sequence | Call | None:
        """One slice of idleness, visible as a wait that tells when the last token was made."""
        state = "idle" if self.paused is None else f"paused ({self.paused})"
        if not self.batcher.scheduler.pool.has_memory:
            state += ", memory released"
        last = self.batcher.counters.last_token_at
        since = time.strftime("%H:%M:%S", time.localtime(last)) if last else "never"
        with waits.waiting(f"engine {state}, last token {since}", "clients", IDLE_LIMIT_S, self._rids):
            return self._inbox.get(timeout=IDLE_SLICE_S)

    def _rids(self) -> list[str]:
        return [s.request.rid for s in self.batcher.in_flight()]

    def _answer(self, run: Callable[[], Any], future: Future[Any]) -> None:
        try:
            self.batcher.catch_up()
            future.set_result(run())
        except ArealiteError as error:
            future.set_exception(error)
        except Exception:  # judged by the supervisor in _run, and answered with all the others when it closes
            self._inbox.put((run, future))
            raise

    def _close(self, failure: str) -> None:
        """End every request: as aborted on a stop, with the traceback on a failure."""
        with self._lock:
            self.failure = failure
            self.stopped.set()
        pending = self.batcher.in_flight()
        while not self._inbox.empty():
            entry = self._inbox.get()
            if isinstance(entry, Sequence):
                pending.append(entry)
            elif entry is not None:
                entry[1].set_exception(EngineFailure(failure or SHUTDOWN))
        for sequence in pending:
            if failure:
                sequence.future.set_exception(EngineFailure(failure))
            else:
                sequence.finish(abort_reason(SHUTDOWN), self.batcher.weight_version)
                sequence.future.set_result(sequence)
