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
from arealite.rollout.backend import Call
from arealite.rollout.health import Member

SEND_LIMIT_S = 150.0  # above the group's own limits: to meet, and for one broadcast
GRACE_S = 5.0  # for the answers to a broadcast that failed; who is silent then has caused it

Receipt = dict[str, int] | None
Outcomes = dict[Member, Receipt | ArealiteError]


class WeightUpdates:
    """Keeps the process group from one update to the next, as long as the servers stay the same."""

    def __init__(self, ask: Callable[[Member, Call], Awaitable[Any]], pause_mode: str) -> None:
        """`ask` gives a server's answer, or raises RequestError or ServerUnreachable."""
        self._ask = ask
        self._pause_mode = pause_mode
        self._joined: list[Member] = []

    async def load(
        self,
        members: list[Member],
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
        num_attempts = 0
        while members:
            num_attempts += 1
            talk = _Talk(self._ask, members, send)
            try:
                await self._attempt(talk, meta, pause, is_retry=num_attempts > 1)
            finally:
                if talk.failures and send is not None:
                    send.leave()
                    self._joined = []
            for member in members:
                outcomes.pop(member, None)
            outcomes |= {**talk.failures, **talk.receipts}  # the first to fail first
            gone = [m for m in members if isinstance(talk.failures.get(m), ServerUnreachable)]
            if meta.kind != "distributed" or not gone:
                break
            # A broadcast fails for all: again, without them; once more with all when it was all, for the group failed.
            members = [m for m in members if m not in gone] or (members if num_attempts == 1 else [])
        return outcomes

    async def _attempt(
        self, talk: _Talk, meta: WeightUpdateMeta, pause: Callable[[], Awaitable[None]], is_retry: bool
    ) -> None:
        if meta.kind == "distributed":
            meta = await self._meet(talk, meta)
        plans = {m: m.backend.update_plan(meta, self._pause_mode) for m in talk.members}
        is_staged = all(plan.is_staged for plan in plans.values())
        if not is_staged:
            await pause()
            if is_retry:  # the session of the attempt before may be open still
                await talk.try_all({m: plan.after for m, plan in plans.items() if plan.before})
        await talk.make({m: plan.before for m, plan in plans.items()})
        for bucket in range(len(meta.buckets)):
            if talk.is_over:
                return
            await talk.make_bucket({m: plan.buckets[bucket] for m, plan in plans.items()}, bucket, meta.kind)
        if talk.is_over:
            return
        if (
            is_staged and self._pause_mode == "in_place"
        ):  # else the swap itself makes requests start over, at one stroke
            await pause()
        await talk.make({m: plan.after for m, plan in plans.items()})
        talk.read_receipts(meta)

    async def _meet(self, talk: _Talk, meta: WeightUpdateMeta) -> WeightUpdateMeta:
        """All servers and the trainer in one group, the one there is if it is of just these."""
        if self._joined != talk.members:
            self._joined = []
            self._name = await talk.join_group()
            self._joined = [] if talk.failures else list(talk.members)
        return replace(meta, group=self._name)


class _Talk:
    """One attempt: answers and failures so far. In a broadcast all fail together, else each server for itself."""

    def __init__(
        self, ask: Callable[[Member, Call], Awaitable[Any]], members: list[Member], send: WeightSender | None
    ) -> None:
        self.members = members
        self.failures: dict[Member, ArealiteError] = {}
        self.receipts: dict[Member, Receipt] = {}
        self._answers: dict[Member, list[Any]] = {m: [] for m in members}
        self._ask = ask
        self._send = send
        self._is_shared = False

    @property
    def is_over(self) -> bool:
        return bool(self.failures) if self._is_shared else len(self.failures) == len(self.members)

    async def make(self, calls: dict[Member, list[Call]]) -> None:
        """To all that have not failed, at once; each server's calls one after another."""
        if not self.is_over:
            await asyncio.gather(*(self._one(m, own) for m, own in calls.items() if m not in self.failures))

    async def try_all(self, calls: dict[Member, list[Call]]) -> None:
        """Calls that a server may refuse; their answers are of no interest."""

        async def attempt(member: Member, own: list[Call]) -> None:
            with suppress(RequestError, ServerUnreachable):
                for call in own:
                    await self._ask(member, call)

        await asyncio.gather(*(attempt(m, own) for m, own in calls.items()))

    async def make_bucket(self, calls: dict[Member, Call], bucket: int, kind: str) -> None:
        send = self._sender
        work = waits.in_thread(lambda: send.send(bucket), f"weights, bucket {bucket}", "trainer", SEND_LIMIT_S)
        if kind == "tensor":
            text = await work
            assert text is not None
            await self.make({m: [m.backend.with_bucket(call, text)] for m, call in calls.items()})
        else:
            await self._together({m: [call] for m, call in calls.items()}, work)

    async def join_group(self) -> str:
        """The name of the new group, if none failed."""
        send, self._is_shared = self._sender, True
        hosts = [urlsplit(m.server.url).hostname or "" for m in self.members]
        towards = next((host for host in hosts if host not in ("127.0.0.1", "localhost", "::1")), hosts[0])
        ranks = [m.backend.num_ranks for m in self.members]
        place = await waits.in_thread(
            lambda: send.listen(1 + sum(ranks), towards), "weight group", "trainer", SEND_LIMIT_S
        )
        calls = {
            m: [
                m.backend.group_call(
                    place.address, place.port, 1 + sum(ranks[:i]), place.world_size, place.name, place.backend
                )
            ]
            for i, m in enumerate(self.members)
        }
        await self._together(calls, waits.in_thread(send.join, "weight group", "servers", SEND_LIMIT_S))
        return place.name

    async def _together(self, calls: dict[Member, list[Call]], work: Awaitable[Any]) -> None:
        """Calls that are answered when the trainer has done its part, `work`, which fails when a server does.

        Waits for: both. Unblocked by: the group's limit; after a failure by GRACE_S, when the silent ones have failed.
        """
        self._is_shared = True
        sending = asyncio.ensure_future(work)
        asking = {m: asyncio.ensure_future(self._one(m, own)) for m, own in calls.items()}
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
        for member, call in asking.items():
            if not call.done():
                call.cancel()
                self.failures.setdefault(
                    member, ServerUnreachable(f"{member.id} ({member.server.url}) took no part in a broadcast: {why}")
                )
        if not self.failures and why is not None:
            self.failures.update(dict.fromkeys(self.members, WeightSyncError(str(why))))
        first = next(iter(self.failures.values()))
        for member in self.members:
            self.failures.setdefault(member, WeightSyncError(f"{member.id} did not get all of a broadcast: {first}"))

    def read_receipts(self, meta: WeightUpdateMeta) -> None:
        for member in self.members:
            if member not in self.failures:
                try:
                    self.receipts[member] = member.backend.parse_receipt(self._answers[member], meta, member.id)
                except WeightSyncError as error:
                    self.failures[member] = error

    async def _one(self, member: Member, calls: list[Call]) -> None:
        try:
            for call in calls:
                with suppress(*([RequestError] if call.may_be_refused else [])):
                    self._answers[member].append(await self._ask(member, call))
        except ServerUnreachable as error:
            self.failures.setdefault(member, error)
        except RequestError as error:
            self.failures.setdefault(member, WeightSyncError(f"the weights did not reach {member.id}: {error}"))

    @property
    def _sender(self) -> WeightSender:
        if self._send is None:
            raise ConfigError("this update needs its sender: call update_weights(meta, send) with the weight link")
        return self._send
