"""One sequence from request to completion, through interruptions, lost connections and servers that die or fall silent.

Called by client.py; runs in the client's asyncio loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import RequestError, ServerUnreachable
from arealite.api.protocols import OnTokens
from arealite.api.types import Completion, FinishReason, GenerationRequest
from arealite.observe.timeline import span
from arealite.observe.waits import mark
from arealite.rollout.backends.protocol import Segment
from arealite.rollout.counters import Counters
from arealite.rollout.router import Limits, Router, Server

CLOSE_GRACE_S = 1.0  # how long destroy waits for servers to hear that requests were given up
MIN_WAIT_S = 0.1  # while the gate is closed, time does not get shorter: look again only so often
MAX_EMPTY_ABORTS = 20  # interruptions in a row that brought no token, before the server counts as broken


@dataclass(eq=False)
class Flight:
    """A request on its way, with what it has so far."""

    request: GenerationRequest
    on_tokens: OnTokens | None = None
    server_id: str = ""  # empty while it waits for a server
    last_server: Server | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)  # to `on_tokens`
    text: str = ""
    cut_mass: float = 0.0  # see Segment
    num_cached: int | None = None  # of the first part
    cuts: set[int] = field(default_factory=set)  # numbers of tokens after which it was stopped, and went on
    num_failures: int = 0  # in a row
    num_empty_aborts: int = 0  # in a row
    started: float = field(default_factory=time.monotonic)
    last_answer: float = field(default_factory=time.monotonic)

    def add(self, part: Segment) -> None:
        self.token_ids += part.token_ids
        self.logprobs += part.logprobs
        self.versions += part.versions
        self.text += part.text
        self.cut_mass += part.cut_mass
        self.num_cached = part.num_cached if self.num_cached is None else self.num_cached

    def tell(self, new_ids: list[int]) -> None:
        """Whoever follows: `new_ids` came after those that are kept. What was told and lost is not told otherwise."""
        ids = [*self.token_ids, *new_ids]
        if self.on_tokens is None or len(ids) <= len(self.told):
            return
        if ids[: len(self.told)] != self.told:
            self.on_tokens = None
            return
        self.told = ids
        self.on_tokens([*ids])

    def line(self, now: float) -> str:
        """Its line in a stall report."""
        group, rid = self.request.group_id, self.request.rid
        who = f"task {group} member {rid.removeprefix(group + '.')}" if group else f"request {rid}"
        silent_s = now - self.last_answer
        where = f"on {self.server_id}" if self.server_id else "without a server"
        return f"{who} {where}, {len(self.token_ids)} tokens, last answer {silent_s:.1f} s ago"


class Generator:
    """Sends requests to servers until they are done. `version` is that of the weights the servers hold,
    `announced_version` the newest that any of them may hold already."""

    def __init__(
        self,
        router: Router,
        config: InferenceEngineConfig,
        counters: Counters,
        limits: Limits,
        seed: int,
    ) -> None:
        self.router, self.gate = router, router.gate
        self.config, self.counters, self.limits, self.seed = config, counters, limits, seed
        self.version = self.announced_version = 0
        self._flights: set[Flight] = set()
        self.aborts: set[asyncio.Task[None]] = set()  # of requests that were cancelled

    def pending(self) -> list[str]:
        """Lines about the requests on their way, those without an answer for longest first."""
        now = time.monotonic()
        return [flight.line(now) for flight in sorted(self._flights, key=lambda f: f.last_answer)]

    def owner(self) -> str:
        """Who has to act next: the server with the oldest silent request."""
        if not self._flights:
            return "workflow and reward workers"
        if not self.gate.is_open:
            return "resume()"
        silent = min(self._flights, key=lambda f: f.last_answer)
        return silent.server_id or next((s.id for s in self.router.servers if s.line()), "no server")

    async def generate(self, request: GenerationRequest, on_tokens: OnTokens | None = None) -> Completion:
        """Sample one sequence. `on_tokens`: see InferenceEngine.agenerate.

        Consumes: answers of the servers. Produces: one Completion. Waits for: an open gate, a server, then the answer
        to each sending, at most `request_timeout_s`. Unblocked by: the answer, the time limit, a lost connection, the
        server's being taken out, resume().

        Raises:
            RequestError: a server refused the request, or failed at it in a way that would come again.
            ServerUnreachable: sending it `request_retries` times more brought no token, or all servers are gone.
        """
        if request.seed is None:
            request = replace(request, seed=seed_of(self.seed, request.rid))
        flight = Flight(request, on_tokens)
        self._flights.add(flight)
        try:
            with span("request", rid=request.rid):
                return await self._until_done(flight)
        finally:
            self._flights.discard(flight)

    async def score(self, sequences: list[list[int]], lora: str | None) -> list[list[float]]:
        """Logprobs of each sequence's own tokens under the adapter `lora`, sent again to another server when one fails.

        Raises:
            RequestError: a server refused it.
            ServerUnreachable: `request_retries` further sendings failed too.
        """
        return list(await asyncio.gather(*(self._scores(tokens, lora) for tokens in sequences)))

    async def _scores(self, tokens: list[int], lora: str | None) -> list[float]:
        flight = Flight(GenerationRequest("to score", tokens, 0, lora=lora))
        self._flights.add(flight)
        try:
            while True:
                async with self.router.server_for("", len(tokens)) as server:
                    flight.server_id = server.id
                    call = server.backend.score_call(tokens, uuid.uuid4().hex, lora)
                    try:
                        answer = await self.router.ask(server, call, self.config.request_timeout_s)
                        self.router.heard(server)
                        return server.backend.parse_scores(answer, len(tokens), server.id)
                    except ServerUnreachable as error:
                        self.router.fail(server, str(error))
                        flight.num_failures += 1
                        if flight.num_failures > self.config.request_retries:
                            raise
        finally:
            self._flights.discard(flight)

    async def _until_done(self, flight: Flight) -> Completion:
        while True:
            part = await self._send(flight)
            if part is None or (part.finish_reason == "abort" and _may_hide_stop(flight, part)):
                continue
            flight.add(part)
            flight.tell([])
            if part.finish_reason != "abort":
                return self._completion(flight, part.finish_reason, part.matched)
            if len(flight.token_ids) >= flight.request.max_new_tokens:
                return self._completion(flight, "length", None)
            await self._interrupted(flight, part)

    async def close(self) -> None:
        """Give the servers a moment to hear of the requests that were cancelled."""
        if self.aborts:
            await asyncio.wait(self.aborts, timeout=CLOSE_GRACE_S)

    async def _send(self, flight: Flight) -> Segment | None:
        """One sending; None when it failed and the request may be sent again."""
        await self.gate.passed()
        request = flight.request
        flight.server_id = ""
        num_tokens = len(request.input_ids) + request.max_new_tokens
        async with self.router.server_for(request.group_id or request.rid, num_tokens) as server:
            self.counters.add("num_requests_moved", flight.last_server not in (None, server))
            flight.server_id, flight.last_server = server.id, server
            oldest_version = self.version
            try:
                part = await self._answer(flight, server)
            except ServerUnreachable as error:
                flight.num_failures += 1
                if flight.num_failures > self.config.request_retries:
                    raise ServerUnreachable(
                        f"request {request.rid} got no token in {flight.num_failures} sendings; the last: {error}"
                    ) from error
                return None
            finally:
                self.counters.num_events += 1
            if part.token_ids:
                flight.num_failures = 0
            strange = sum(not oldest_version <= v <= self.announced_version for v in part.versions)
            self.counters.add("num_unexpected_versions", strange)
            if self.version and any(v < oldest_version for v in part.versions):
                self.router.fail(server, f"it sampled with older weights than version {oldest_version}")
            return part

    async def _answer(self, flight: Flight, server: Server) -> Segment:
        """The server's answer within `request_timeout_s` of unpaused time; after that it is asked for what it has.
        From a server that is lost meanwhile: the tokens that it has streamed."""
        # A new id for each sending, lest a late abort of the one before hits it; uuid first: servers abort by prefix.
        wire_id = f"{uuid.uuid4().hex}-{flight.request.rid}"
        backend, is_followed = server.backend, flight.on_tokens is not None
        if flight.request.forced_ids and not backend.forces_tokens:
            raise RequestError(
                f"{server.id} is {backend.title}, which cannot be told tokens (forced_ids): use `arealite serve"
                " --forced-decoding`"
            )
        sending = backend.generate_call(flight.request, wire_id, flight.token_ids, is_followed)
        newest = b""
        so_far: Any = None  # what the events say together; of a stream that is followed

        def keep(event: bytes) -> None:
            nonlocal newest, so_far
            newest = event
            self._progress(flight, server)
            if is_followed:
                so_far, new_ids = backend.follow(so_far, event, server.id)
                flight.tell(new_ids)

        call = server.start(self.router.transport.stream(server, sending, keep))
        deadline = self.gate.clock_s() + self.config.request_timeout_s
        told = f"{server.id} ({server.url}) {{}} {flight.request.rid} within {self.config.request_timeout_s} s"
        try:
            while not call.done() and (left_s := deadline - self.gate.clock_s()) > 0:
                await asyncio.wait({call}, timeout=max(left_s, MIN_WAIT_S))
            if not call.done():
                self.counters.add("num_request_timeouts")
                await self._abort(server, wire_id)
                await asyncio.wait({call}, timeout=self.limits.abort_grace_s)
            if not call.done():
                raise ServerUnreachable(f"{told.format('gave no answer to')}, nor when asked to abort it")
            answer = server.result(call)
            part = backend.parse_part(answer if so_far is None else so_far, server.id)
            if part.finish_reason == "abort" and not part.token_ids and self.gate.clock_s() >= deadline:
                raise ServerUnreachable(told.format("sampled no token of"))
            self._progress(flight, server)
            return part
        except ServerUnreachable as error:
            self.counters.add("num_request_failures")
            self.router.fail(server, str(error))
            # A stream holds back text that may be cut off yet.
            if not newest or flight.request.stop or not backend.has_whole_events:
                raise
            return backend.parse_part(json.loads(newest) if so_far is None else so_far, server.id)
        except asyncio.CancelledError:
            abort = asyncio.ensure_future(self._abort(server, wire_id))
            self.aborts.add(abort)
            abort.add_done_callback(self.aborts.discard)
            raise
        finally:
            call.cancel()

    def _progress(self, flight: Flight, server: Server) -> None:
        flight.last_answer = time.monotonic()
        self.router.heard(server)
        self.counters.num_events += 1
        mark("token")

    async def _abort(self, server: Server, wire_id: str) -> None:
        try:
            await self.router.transport.send(server, server.backend.abort_call(wire_id), self.limits.abort_grace_s)
        except (ServerUnreachable, RequestError):
            self.counters.add("num_request_failures")  # the sending itself reports what is wrong

    async def _interrupted(self, flight: Flight, part: Segment) -> None:
        flight.cuts.add(len(flight.token_ids))
        flight.num_empty_aborts = 0 if part.token_ids else flight.num_empty_aborts + 1
        if flight.num_empty_aborts > MAX_EMPTY_ABORTS:
            raise ServerUnreachable(
                f"{flight.server_id} aborted {flight.request.rid} {flight.num_empty_aborts} times in a row without"
                " sampling a token; expected it to hold requests while it is paused"
            )
        if flight.num_empty_aborts > 1:
            await asyncio.sleep(self.limits.backoff_s(flight.num_empty_aborts - 1))

    def _completion(self, flight: Flight, reason: FinishReason, matched: int | str | None) -> Completion:
        latency_s = time.monotonic() - flight.started
        # A server that holds its requests during an update goes on with new weights by itself.
        changes = {i for i, (a, b) in enumerate(pairwise(flight.versions), 1) if a != b}
        num_interruptions = len(flight.cuts | changes)
        self.counters.add("num_generated_tokens", len(flight.token_ids))
        self.counters.add("num_interruptions", num_interruptions)
        self.counters.observe("request_s", latency_s)
        if flight.cut_mass:
            self.counters.observe("cut_mass", flight.cut_mass / len(flight.token_ids))
        return Completion(
            token_ids=flight.token_ids,
            logprobs=flight.logprobs,
            versions=flight.versions,
            finish_reason=reason,
            matched=matched,
            text=flight.text,
            server_id=flight.server_id,
            latency_s=latency_s,
            num_interruptions=num_interruptions,
            num_cached_tokens=flight.num_cached or 0,
        )


def _may_hide_stop(flight: Flight, part: Segment) -> bool:
    """Whether the text ends in what may be the beginning of a stop string: no server would find the rest of it in the
    tokens to come, so the part has to be sampled again."""
    return any(part.text.endswith(stop[:n]) for stop in flight.request.stop for n in range(1, len(stop)))


def seed_of(seed: int, rid: str) -> int:
    """A sampling seed of 31 bits that depends on the run's seed and the request's name only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{rid}".encode(), digest_size=4).digest(), "big") >> 1
