"""The servers as one: pause, resume, adapters, and how any of them come to a version of the weights.

Called by client.py and membership.py; runs in the client's asyncio loop, the trainer's broadcasts in a thread. Requests
themselves are sent by generate.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import ArealiteError, ConfigError, RequestError, ServerUnreachable, WeightSyncError, listed
from arealite.api.protocols import WeightSender
from arealite.api.types import WeightUpdateMeta
from arealite.observe import waits
from arealite.rollout.backends.protocol import Call
from arealite.rollout.router import ConnectionLost, Router, Server

SEND_LIMIT_S = 150.0  # above the group's own limits: to meet, and for one broadcast
GRACE_S = 5.0  # for the answers to a broadcast that failed; who is silent then has caused it

Ask = Callable[[Server, Call], Awaitable[Any]]
Receipt = dict[str, int] | None


class Fleet:
    """A server that fails is taken out, and the others go on without it.

    Weights reach servers in one way, `_bring`: in an update, in its repetition without those that failed, and when one
    comes back. After it each server holds the weights, or is out until it answers again, or waits for the next time.
    """

    def __init__(self, router: Router, config: InferenceEngineConfig) -> None:
        self.router, self.config = router, config
        self.gate = router.gate
        self._update: WeightUpdateMeta | None = None  # the last one
        self._send: WeightSender | None = None  # its sender
        # Between pause and update the trainer may be writing the next weights where the last ones are.
        self._is_readable = False
        # The process group of weights is kept from one update to the next, as long as its servers stay the same.
        self._group, self._group_servers = "", list[Server]()
        self._adapters: dict[str, str] = {}  # name -> folder
        self._lock = asyncio.Lock()  # a server that rejoins sees one state of the others
        self._unanswered: dict[object, tuple[str, str]] = {}  # key -> server id and its line, oldest first

    def pending(self) -> list[str]:
        """Lines about servers that have not answered or take no requests."""
        asked = [f"{server_id}: {line}" for server_id, line in self._unanswered.values()]
        return asked + [line for server in self.router.servers if (line := server.line())]

    def owner(self) -> str:
        """The server that has not answered for longest; empty when nothing was asked."""
        return next((server_id for server_id, _ in self._unanswered.values()), "")

    @property
    def adapter(self) -> str | None:
        """The name of the policy's adapter on the servers, if its updates are one."""
        return None if self._update is None else self._update.adapter

    async def prepare_update(self) -> None:
        """Wait until no server is being sent the last update again, and let none begin before the next."""
        self._is_readable = False
        async with self._lock:
            pass

    async def pause(self) -> None:
        """Stop generation everywhere, as `pause_mode` says."""
        self.gate.close()
        await self.prepare_update()
        async with self._lock:
            await self._tell_gate()

    async def resume(self) -> None:
        """Let all servers generate again."""
        async with self._lock:
            self._is_readable = self._update is not None
            self.gate.open()
            await self._tell_gate()

    async def update_weights(
        self, meta: WeightUpdateMeta, send: WeightSender | None = None
    ) -> dict[str, dict[str, int]]:
        """All servers load `meta` at the same time; receipts of those that give one. Generation is paused when it has
        to be, and stays so. Servers that fail are taken out, and where a broadcast failed with them it is made again;
        when all are gone, the first that comes back is waited for, `setup_timeout_s`.

        Raises:
            WeightSyncError: no server took the weights; names each and its message.
        """
        deadline = time.monotonic() + self.config.setup_timeout_s
        while True:
            await self._some_reachable(meta.version, deadline)
            async with self._lock:
                try:
                    receipts = await self._bring(self._reachable(), meta, send)
                except (WeightSyncError, RequestError, ServerUnreachable) as error:
                    raise WeightSyncError(f"version {meta.version} reached no server: {error}") from error
                if receipts:
                    self._update, self._send, self._is_readable = meta, send, True
                    return {server.id: receipt for server, receipt in receipts.items() if receipt is not None}

    async def catch_up(self, server: Server) -> None:
        """Bring a server that answers to the state of the others; it stays "updating" when the weights cannot be had
        before the next update.

        Raises:
            WeightSyncError, ServerUnreachable, RequestError, ConfigError: it cannot be used.
        """
        async with self._lock:
            is_current = await self._holds_update(server)
            if server.state != "updating":  # it was taken out, or is no longer listed
                return
            if is_current:
                await self._equip(server)
            elif self._is_readable and self._update is not None:
                await self._bring([server], self._update, self._send)

    async def set_adapter(self, name: str, path: str | None) -> None:
        """All servers load the adapter in folder `path` as `name`, those that come later too; None: they unload it.

        Raises:
            RequestError: a server refused it.
        """
        refusals: list[RequestError] = []

        async def change(server: Server) -> None:
            backend = server.backend
            try:
                await self.ask(server, backend.lora_call(name, path) if path else backend.unload_lora_call(name))
            except RequestError as error:
                refusals.append(error)

        async with self._lock:
            await self._each([s for s in self.router.servers if s.state in ("serving", "draining")], change)
            if refusals:
                raise refusals[0]
            self._adapters = {k: v for k, v in self._adapters.items() if k != name} | ({name: path} if path else {})

    async def ask(self, server: Server, call: Call, limit_s: float | None = None) -> Any:
        """The answer, within `setup_timeout_s` if not said otherwise. Raises as `Transport.send`."""
        key = object()
        self._unanswered[key] = (server.id, f"{server.url}{call.path} not answered yet")
        try:
            return await self.router.ask(server, call, limit_s or self.config.setup_timeout_s)
        finally:
            del self._unanswered[key]

    # -- inside --------------------------------------------------------------------------------------------------

    def _reachable(self) -> list[Server]:
        return [server for server in self.router.servers if server.is_reachable]

    async def _some_reachable(self, version: int, deadline: float) -> None:
        """Waits for: a server that answers probes, until `deadline`. Unblocked by: membership.py's loops, or the
        limit."""
        while (left_s := deadline - time.monotonic()) <= 0 or not self._reachable():
            if not await self.router.wait_change(left_s):
                raise WeightSyncError(
                    f"version {version} reached no server within {self.config.setup_timeout_s:g} s"
                    f" (rollout.setup_timeout_s): {self.router.lines()}"
                )

    async def _each(
        self, servers: list[Server], act: Callable[[Server], Coroutine[Any, Any, Any]]
    ) -> dict[Server, ArealiteError]:
        """`act` on these servers at once. Those that fail are taken out, and returned. All are waited for, so that none
        is still at work when the caller reacts."""
        outcomes = zip(servers, await asyncio.gather(*map(act, servers), return_exceptions=True), strict=True)
        failures: dict[Server, ArealiteError] = {}
        for server, outcome in outcomes:
            if isinstance(outcome, ArealiteError):
                failures[server] = outcome
                self.router.lose(server, outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        return failures

    async def _tell_gate(self) -> None:
        """All that can be reached are paused, or not, as the gate is. Raises ArealiteError: all refuse it."""
        servers = self._reachable()
        _raise_refusal(servers, await self._each(servers, self._set_pause), ConnectionLost)

    async def _set_pause(self, server: Server) -> None:
        backend = server.backend
        await self.ask(
            server, backend.resume_call() if self.gate.is_open else backend.pause_call(self.config.pause_mode)
        )

    async def _holds_update(self, server: Server) -> bool:
        """Whether the server took the last update from us, and still says so: in an earlier life of the run it may have
        got other weights under this number. Version 0 is also that of a server just started. Before the first update
        the servers that the run was started with hold what it begins with."""
        if self._update is None:
            return not server.is_guest
        if self._update.version == 0 or server.update is not self._update:
            return False
        try:
            facts = await self.ask(server, Call(server.backend.version_path, method="GET"))
        except RequestError:
            return False  # this version has no such route
        return isinstance(facts, dict) and facts.get("weight_version") == str(self._update.version)

    async def _equip(self, server: Server) -> None:
        """A server that comes back and holds the weights gets what else the others have, and serves."""
        for name, path in self._adapters.items():
            with suppress(RequestError):  # it has none of this name
                await self.ask(server, server.backend.unload_lora_call(name))
            await self.ask(server, server.backend.lora_call(name, path))
        await self._set_pause(server)
        if server.state == "updating":  # else it was taken out, or is no longer listed
            self.router.move(server, "serving", "it answers, and holds the current weights")

    async def _bring(
        self, servers: list[Server], meta: WeightUpdateMeta, send: WeightSender | None
    ) -> dict[Server, Receipt]:
        """One attempt to have `servers` hold the weights of `meta`, all at the same time. Returns the receipts of those
        that do. Who fails is taken out; where a broadcast failed for all because of some, the others stay as they are.

        A server that comes back ("updating") is paused before, so that what it still worked at is ended; it serves once
        its receipt is right and it has what else the others have.

        Raises:
            ConfigError: a server cannot read updates of this kind.
            ArealiteError: none holds them, and it was not only that they are gone.
        """
        back = [s for s in servers if s.state == "updating"]

        async def pause() -> None:
            if self.gate.is_open and len(back) < len(servers):
                self.gate.close()
                await self._tell_gate()

        async def check_in(server: Server) -> None:
            receipt = attempt.receipts[server] or meta.checksums
            if wrong := [name for name, value in meta.checksums.items() if receipt.get(name) != value]:
                raise WeightSyncError(f"{server.id} holds other weights than it was sent: {listed(wrong)}")
            await self._equip(server)

        failures = await self._each(back, lambda s: self.ask(s, s.backend.pause_call("abort")))
        attempt = _Attempt(self.ask, [s for s in servers if s not in failures], meta, send)
        try:
            known = self._group if attempt.servers == self._group_servers else ""
            await attempt.run(known, self.config.pause_mode, pause)
        finally:
            if attempt.failures and send is not None:
                send.leave()
            self._group, self._group_servers = attempt.group, [] if attempt.failures else attempt.servers
        for server, error in attempt.lost().items():
            failures[server] = error
            self.router.lose(server, error)
        failures |= await self._each([s for s in back if s in attempt.receipts], check_in)
        _raise_refusal(servers, failures, ServerUnreachable if attempt.is_shared else ConnectionLost)
        receipts = {server: receipt for server, receipt in attempt.receipts.items() if server not in failures}
        for server in receipts:
            server.update, server.is_verified = meta, receipts[server] is not None
        return receipts


def _raise_refusal(servers: list[Server], failures: dict[Server, ArealiteError], gone: type[ServerUnreachable]) -> None:
    """When all `servers` have failed, and not only because they are gone."""
    refusals = [error for error in failures.values() if not isinstance(error, gone)]
    if refusals and len(failures) == len(servers):
        raise refusals[0]


class _Attempt:
    """The conversation of one update with all `servers` at once: answers, failures and receipts so far. In a broadcast
    all fail together, else each server for itself. `group`: the name of the process group."""

    def __init__(self, ask: Ask, servers: list[Server], meta: WeightUpdateMeta, send: WeightSender | None) -> None:
        self.servers, self.group = servers, ""
        self.failures: dict[Server, ArealiteError] = {}  # the first to fail first
        self.receipts: dict[Server, Receipt] = {}
        self.is_shared = meta.kind == "distributed"
        self._ask, self.meta, self._send = ask, meta, send
        self._answers: dict[Server, list[Any]] = {s: [] for s in servers}

    def lost(self) -> dict[Server, ArealiteError]:
        """Those that failed by themselves: where a broadcast lost some, the others had to fail with them."""
        gone: dict[Server, ArealiteError]
        gone = {s: error for s, error in self.failures.items() if isinstance(error, ServerUnreachable)}
        return gone if self.is_shared and gone and not self.receipts else self.failures

    async def run(self, group: str, pause_mode: str, pause: Callable[[], Awaitable[None]]) -> None:
        """`group`: the one that these servers and the trainer, and no others, are in already; empty when there is none.
        `pause` is awaited before the first call that must find generation paused."""
        if not self.servers:
            return
        if self.is_shared:
            self.group = group or await self._join_group()
        meta = replace(self.meta, group=self.group)
        plans = {s: s.backend.update_plan(meta, pause_mode) for s in self.servers if not self._is_over}
        is_staged = all(plan.is_staged for plan in plans.values())
        if not is_staged:
            await pause()
        await self._make({s: plan.before for s, plan in plans.items()})
        for bucket in range(len(meta.buckets)):
            if not self._is_over:
                await self._broadcast({s: plan.buckets[bucket] for s, plan in plans.items()}, bucket)
        if self._is_over:
            if not is_staged:  # the next attempt must find no session open
                left = [s for s, plan in plans.items() if plan.before and s not in self.lost()]
                await asyncio.gather(*(self._one(s, [replace(plans[s].after[0], may_be_refused=True)]) for s in left))
            return
        if is_staged and pause_mode == "in_place":  # else the swap makes requests start over, at one stroke
            await pause()
        await self._make({s: plan.after for s, plan in plans.items()})
        for server in (s for s in self.servers if s not in self.failures):
            try:
                self.receipts[server] = server.backend.parse_receipt(self._answers[server], meta, server.id)
            except WeightSyncError as error:
                self.failures[server] = error

    @property
    def _is_over(self) -> bool:
        return bool(self.failures) if self.is_shared else len(self.failures) == len(self.servers)

    async def _make(self, calls: dict[Server, list[Call]]) -> None:
        """To all that have not failed, at once; each server's calls one after another."""
        if not self._is_over:
            await asyncio.gather(*(self._one(s, own) for s, own in calls.items() if s not in self.failures))

    async def _one(self, server: Server, calls: list[Call]) -> None:
        try:
            for call in calls:
                with suppress(*([RequestError] if call.may_be_refused else [])):
                    self._answers[server].append(await self._ask(server, call))
        except ServerUnreachable as error:
            self.failures.setdefault(server, error)
        except RequestError as error:
            self.failures.setdefault(server, WeightSyncError(f"the weights did not reach {server.id}: {error}"))

    async def _join_group(self) -> str:
        """The name of a new group of these servers and the trainer, if none failed."""
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

    async def _broadcast(self, calls: dict[Server, Call], bucket: int) -> None:
        send = self._sender
        work = waits.in_thread(lambda: send.send(bucket), f"weights, bucket {bucket}", "trainer", SEND_LIMIT_S)
        await self._together(calls, work)

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

    @property
    def _sender(self) -> WeightSender:
        if self._send is None:
            raise ConfigError("this update needs its sender: call update_weights(meta, send) with the weight link")
        return self._send
