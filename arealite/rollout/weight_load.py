"""The conversation of one weight update with all servers at once: group, buckets, swap, and what each server said.

Called by fleet.py, which keeps one of these; runs in the client's asyncio loop, the trainer's broadcasts in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from arealite.api.errors import ArealiteError, ConfigError, RequestError, ServerUnreachable, WeightSyncError
from arealite.api.protocols import WeightSender
from arealite.api.types import WeightUpdateMeta
from arealite.observe import waits
from arealite.rollout.backends.protocol import Call
from arealite.rollout.router import Server

SEND_LIMIT_S = 150.0  # above the group's own limits: to meet, and for one broadcast
GRACE_S = 5.0  # for the answers to a broadcast that failed; who is silent then has caused it

Ask = Callable[[Server, Call], Awaitable[Any]]
Receipt = dict[str, int] | None
Outcomes = dict[Server, Receipt | ArealiteError]


class WeightLoads:
    """Keeps the process group from one update to the next, as long as the servers stay the same. `ask` gives a
    server's answer, or raises RequestError or ServerUnreachable."""

    def __init__(self, ask: Ask, pause_mode: str) -> None:
        self.ask = ask
        self._pause_mode = pause_mode
        self._group: list[Server] = []
        self._name = ""  # of the group

    async def load(
        self,
        servers: list[Server],
        meta: WeightUpdateMeta,
        send: WeightSender | None,
        pause: Callable[[], Awaitable[None]],
    ) -> Outcomes:
        """What each server answered in the end: its receipt, or why it does not hold the weights. `pause` is awaited
        before the first call that must find generation paused.

        Raises:
            ConfigError: a server cannot read updates of this kind.
        """
        outcomes: Outcomes = {}
        is_retry = False
        while servers:
            attempt = _Attempt(self.ask, servers, send, meta.kind == "distributed")
            try:
                await self._attempt(attempt, meta, pause, is_retry)
            finally:
                if attempt.failures and send is not None:
                    send.leave()
                    self._group = []
            for server in servers:
                outcomes.pop(server, None)
            outcomes |= {**attempt.failures, **attempt.receipts}  # the first to fail first
            gone = [s for s in servers if isinstance(attempt.failures.get(s), ServerUnreachable)]
            if meta.kind != "distributed" or not gone:
                break
            # A broadcast fails for all: again, without them; once more with all when it was all, for the group failed.
            servers = [s for s in servers if s not in gone] or ([] if is_retry else servers)
            is_retry = True
        return outcomes

    async def _attempt(
        self, attempt: _Attempt, meta: WeightUpdateMeta, pause: Callable[[], Awaitable[None]], is_retry: bool
    ) -> None:
        if meta.kind == "distributed":
            if self._group != attempt.servers:  # all servers and the trainer are to be in one group, and no others
                self._group = []
                self._name = await attempt.join_group()
                self._group = [] if attempt.failures else list(attempt.servers)
            meta = replace(meta, group=self._name)
        plans = {s: s.backend.update_plan(meta, self._pause_mode) for s in attempt.servers}
        is_staged = all(plan.is_staged for plan in plans.values())
        if not is_staged:
            await pause()
            if is_retry:  # the session of the attempt before may be open still
                await attempt.try_all({s: plan.after for s, plan in plans.items() if plan.before})
        await attempt.make({s: plan.before for s, plan in plans.items()})
        for bucket in range(len(meta.buckets)):
            if not attempt.is_over:
                await attempt.broadcast({s: plan.buckets[bucket] for s, plan in plans.items()}, bucket)
        if attempt.is_over:
            return
        if is_staged and self._pause_mode == "in_place":  # else the swap makes requests start over, at one stroke
            await pause()
        await attempt.make({s: plan.after for s, plan in plans.items()})
        attempt.read_receipts(meta)


class _Attempt:
    """Answers and failures so far. In a broadcast (`is_shared`) all fail together, else each server for itself."""

    def __init__(self, ask: Ask, servers: list[Server], send: WeightSender | None, is_shared: bool) -> None:
        self.servers = servers
        self.failures: dict[Server, ArealiteError] = {}
        self.receipts: dict[Server, Receipt] = {}
        self._answers: dict[Server, list[Any]] = {s: [] for s in servers}
        self._ask, self._send, self._is_shared = ask, send, is_shared

    @property
    def is_over(self) -> bool:
        return bool(self.failures) if self._is_shared else len(self.failures) == len(self.servers)

    async def make(self, calls: dict[Server, list[Call]]) -> None:
        """To all that have not failed, at once; each server's calls one after another."""
        if not self.is_over:
            await asyncio.gather(*(self._one(s, own) for s, own in calls.items() if s not in self.failures))

    async def try_all(self, calls: dict[Server, list[Call]]) -> None:
        """Calls that a server may refuse; their answers are of no interest."""

        async def attempt(server: Server, own: list[Call]) -> None:
            with suppress(RequestError, ServerUnreachable):
                for call in own:
                    await self._ask(server, call)

        await asyncio.gather(*(attempt(s, own) for s, own in calls.items()))

    async def broadcast(self, calls: dict[Server, Call], bucket: int) -> None:
        send = self._sender
        work = waits.in_thread(lambda: send.send(bucket), f"weights, bucket {bucket}", "trainer", SEND_LIMIT_S)
        await self._together(calls, work)

    async def join_group(self) -> str:
        """The name of the new group, if none failed."""
        send = self._sender
        hosts = [urlsplit(s.url).hostname or "" for s in self.servers]
        towards = next((host for host in hosts if host not in ("127.0.0.1", "localhost", "::1")), hosts[0])
        size = 1 + sum(s.backend.num_ranks for s in self.servers)
        place = await waits.in_thread(lambda: send.listen(size, towards), "weight group", "trainer", SEND_LIMIT_S)
        calls, rank = {}, 1
        for server in self.servers:
            calls[server] = server.backend.group_call(place, rank)
            rank += server.backend.num_ranks
        await self._together(calls, waits.in_thread(send.join, "weight group", "servers", SEND_LIMIT_S))
        return place.name

    async def _together(self, calls: dict[Server, Call], work: Awaitable[Any]) -> None:
        """Calls that are answered when the trainer has done its part, `work`, which fails when a server does.

        Waits for: both. Unblocked by: the group's limit; after a failure by GRACE_S, when the silent ones have failed.
        """
        sending = asyncio.ensure_future(work)
        asking = {s: asyncio.ensure_future(self._one(s, [call])) for s, call in calls.items()}
        waiting: set[asyncio.Future[Any]] = {sending, *asking.values()}
        while waiting and not self.failures and not (sending.done() and sending.exception()):
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not waiting and not self.failures:
            return
        self._sender.cancel()
        sending.add_done_callback(lambda done: done.cancelled() or done.exception())  # it has been heard of
        self._sender.leave()
        await asyncio.wait(asking.values(), timeout=GRACE_S)
        why = sending.exception() if sending.done() else None
        for server, call in asking.items():
            if not call.done():
                call.cancel()
                lost = ServerUnreachable(f"{server.id} ({server.url}) took no part in a broadcast: {why}")
                self.failures.setdefault(server, lost)
        if not self.failures and why is not None:
            self.failures.update(dict.fromkeys(self.servers, WeightSyncError(str(why))))
        first = next(iter(self.failures.values()))
        for server in self.servers:
            self.failures.setdefault(server, WeightSyncError(f"{server.id} did not get all of a broadcast: {first}"))

    def read_receipts(self, meta: WeightUpdateMeta) -> None:
        for server in self.servers:
            if server not in self.failures:
                try:
                    self.receipts[server] = server.backend.parse_receipt(self._answers[server], meta, server.id)
                except WeightSyncError as error:
                    self.failures[server] = error

    async def _one(self, server: Server, calls: list[Call]) -> None:
        try:
            for call in calls:
                with suppress(*([RequestError] if call.may_be_refused else [])):
                    self._answers[server].append(await self._ask(server, call))
        except ServerUnreachable as error:
            self.failures.setdefault(server, error)
        except RequestError as error:
            self.failures.setdefault(server, WeightSyncError(f"the weights did not reach {server.id}: {error}"))

    @property
    def _sender(self) -> WeightSender:
        if self._send is None:
            raise ConfigError("this update needs its sender: call update_weights(meta, send) with the weight link")
        return self._send
