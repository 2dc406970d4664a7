"""Control of all servers together: health at start, pause, resume, weight update, scoring; and how one rejoins.

Called by client.py and watch.py; runs in the client's asyncio loop. Requests themselves are sent by generate.py.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import ArealiteError, RequestError, ServerUnreachable, WeightSyncError
from arealite.api.protocols import WeightSender
from arealite.api.types import WeightUpdateMeta
from arealite.rollout.backend import Call
from arealite.rollout.health import Member
from arealite.rollout.router import Router
from arealite.rollout.transport import ConnectionLost, Transport
from arealite.rollout.updates import WeightUpdates

HEALTH_POLL_S = 0.2
HEALTH_LIMIT_S = 30.0  # of one probe: SGLang generates a token for it

T = TypeVar("T")


class Fleet:
    """The run's servers as one. A server that fails is taken out, and the others go on without it."""

    def __init__(self, router: Router, transport: Transport, config: InferenceEngineConfig) -> None:
        self.router = router
        self.transport = transport
        self.config = config
        self.is_paused = False
        self._updates = WeightUpdates(self._ask, config.pause_mode)
        self._update: WeightUpdateMeta | None = None  # the last one
        self._send: WeightSender | None = None  # its sender
        # Between pause and update the trainer may be writing the next weights where the last ones are.
        self._is_readable = False
        self._adapters: dict[str, str] = {}  # name -> folder
        self._lock = asyncio.Lock()  # a server that rejoins sees one state of the others
        self._unanswered: dict[object, tuple[str, str]] = {}  # key -> server id and its line, oldest first

    def pending(self) -> list[str]:
        """Lines about servers that are out or have not answered. Any thread may call."""
        out = [line for m in list(self.router.members) if (line := m.line())]
        return [f"{server_id}: {line}" for server_id, line in list(self._unanswered.values())] + out

    def owner(self) -> str:
        """The server that has not answered for longest; empty when nothing was asked. Any thread may call."""
        return next((server_id for server_id, _ in list(self._unanswered.values())), "")

    @property
    def adapter(self) -> str | None:
        """The name of the policy's adapter on the servers, if its updates are one."""
        return None if self._update is None else self._update.adapter

    async def wait_healthy(self) -> None:
        """Consumes: answers of the servers' health routes. Produces: nothing. Waits for: 200 from every server, at
        most `setup_timeout_s`. Unblocked by: the servers, or the limit.

        Raises:
            ServerUnreachable: names the servers that did not come up and what was wrong last.
            ConfigError: a server cannot be used as it was started.
        """
        deadline = time.monotonic() + self.config.setup_timeout_s
        members = list(self.router.members)
        for member in members:
            self._unanswered[member] = (member.id, f"{member.server.url}{member.backend.health_path} not asked yet")

        async def come_up(member: Member) -> None:
            call = Call(member.backend.health_path, method="GET")
            while member.is_listed:  # else it was replaced meanwhile
                try:
                    await self.transport.send(member.server, call, HEALTH_LIMIT_S)
                    await self.detect(member)
                    break
                except (ServerUnreachable, RequestError) as error:
                    self._unanswered[member] = (member.id, str(error))
                if time.monotonic() > deadline:
                    return
                await asyncio.sleep(HEALTH_POLL_S)
            del self._unanswered[member]

        await asyncio.gather(*map(come_up, members))
        if any(member in self._unanswered for member in members):
            raise ServerUnreachable(
                f"not healthy after {self.config.setup_timeout_s} s: {'; '.join(self.pending())}. Look into the"
                " servers' logs, or raise rollout.setup_timeout_s"
            )

    async def detect(self, member: Member) -> None:
        """Put the backend for the server's version. Raises ConfigError when the server cannot be used as it runs."""
        if member.is_detected:
            return
        facts = {}
        for path in member.backend.facts_paths:
            try:
                # vLLM looks at all of its machine before it tells its settings for the first time: seconds.
                limit_s = self.config.setup_timeout_s
                facts[path] = await self.transport.send(member.server, Call(path, method="GET"), limit_s)
            except RequestError:
                continue  # this version has no such route
        member.backend = member.backend.detect(facts, member.id)
        member.is_detected = True

    async def prepare_update(self) -> None:
        """Wait until no server is being sent the last update again, and let none begin before the next."""
        self._is_readable = False
        async with self._lock:
            pass

    async def pause(self) -> None:
        """Stop generation everywhere, as `pause_mode` says."""
        self.is_paused = True
        await self.prepare_update()
        async with self._lock:
            await self._everywhere(self._set_pause)

    async def _pause_for_swap(self, hold: Callable[[], None]) -> None:
        """In the middle of an update, which has the lock."""
        if not self.is_paused:
            self.is_paused = True
            hold()
            await self._everywhere(self._set_pause)

    async def resume(self) -> None:
        """Let all servers generate again."""
        async with self._lock:
            self.is_paused, self._is_readable = False, self._update is not None
            await self._everywhere(self._set_pause)

    async def update_weights(
        self, meta: WeightUpdateMeta, send: WeightSender | None = None, hold: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, int]]:
        """All servers load `meta` at the same time; receipts of those that give one. Generation is paused when it has
        to be (`hold` is called just before), and stays so. Servers that fail are taken out; when all are unreachable,
        the first that comes back is waited for, `setup_timeout_s`.

        Raises:
            WeightSyncError: no server took the weights; names each and its message.
        """
        deadline = time.monotonic() + self.config.setup_timeout_s
        while True:
            await self._some_reachable(meta.version, deadline)
            async with self._lock:
                members = [m for m in self.router.members if m.breaker.state != "open"]
                try:
                    receipts = await self._load(members, meta, send, lambda: self._pause_for_swap(hold))
                except (WeightSyncError, RequestError, ServerUnreachable) as error:
                    raise WeightSyncError(f"version {meta.version} reached no server: {error}") from error
                for member in self.router.members:
                    member.holds_weights = member in receipts
                if receipts:
                    self._update, self._send, self._is_readable = meta, send, True
                    for member in receipts:
                        member.update = meta
                    self.router.notify()
                    return {member.id: receipt for member, receipt in receipts.items() if receipt is not None}

    async def join(self, member: Member) -> bool:
        """Bring a server that answers to the state of the others; False when the weights cannot be had before the
        next update.

        Raises:
            WeightSyncError, ServerUnreachable, RequestError, ConfigError: it cannot be used.
        """
        await self.detect(member)
        async with self._lock:
            if not await self._holds_update(member):
                if not self._is_readable:
                    return False
                assert self._update is not None
                receipts = await self._load([member], self._update, self._send, _nothing)
                if member not in receipts:
                    raise ConnectionLost(member.breaker.last_failure)
                receipt = receipts[member]
                wrong = [name for name, value in self._update.checksums.items() if (receipt or {}).get(name) != value]
                if receipt is not None and wrong:
                    raise WeightSyncError(f"{member.id} holds other weights than it was sent: {', '.join(wrong[:4])}")
            for name, path in self._adapters.items():
                with suppress(RequestError):  # it has none of this name
                    await self._ask(member, member.backend.unload_lora_call(name))
                await self._ask(member, member.backend.lora_call(name, path))
            await self._set_pause(member)
            member.holds_weights, member.update = True, self._update
        return True

    async def set_adapter(self, name: str, path: str | None) -> None:
        """All servers load the adapter in folder `path` as `name`, those that come later too; None: they unload it.

        Raises:
            RequestError: a server refused it.
        """
        async with self._lock:
            members = [m for m in self.router.members if m.is_alive]
            calls = [
                m.backend.unload_lora_call(name) if path is None else m.backend.lora_call(name, path) for m in members
            ]
            outcomes = await asyncio.gather(*map(self._ask, members, calls), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, RequestError):
                    raise outcome
            self._successes(dict(zip(members, outcomes, strict=True)))
            self._adapters.pop(name, None)
            if path is not None:
                self._adapters[name] = path

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Logprobs of each sequence's own tokens, sent again to another server when one fails.

        Raises:
            RequestError: a server refused it.
            ServerUnreachable: `request_retries` further sendings failed too.
        """

        async def one(tokens: list[int]) -> list[float]:
            num_failures = 0
            while True:
                member = await self.router.acquire("", len(tokens))
                call = member.backend.score_call(tokens, uuid.uuid4().hex, self.adapter)
                try:
                    answer = await self._ask(member, call, self.config.request_timeout_s)
                    self.router.succeeded(member)
                    return member.backend.parse_scores(answer, len(tokens), member.id)
                except ServerUnreachable as error:
                    self.router.fail(member, str(error))
                    num_failures += 1
                    if num_failures > self.config.request_retries:
                        raise
                finally:
                    self.router.release(member, len(tokens))

        return list(await asyncio.gather(*map(one, sequences)))

    async def _set_pause(self, member: Member) -> None:
        """Paused or not, as the others are."""
        backend = member.backend
        await self._ask(member, backend.pause_call(self.config.pause_mode) if self.is_paused else backend.resume_call())

    async def _load(
        self,
        members: list[Member],
        meta: WeightUpdateMeta,
        send: WeightSender | None,
        pause: Callable[[], Awaitable[None]],
    ) -> dict[Member, dict[str, int] | None]:
        """Receipts. A server that comes back is paused for it, and what it still worked at is ended."""
        back = [m for m in members if not m.holds_weights]
        others = len(back) < len(members)
        reached = await self._all(back, lambda m: self._ask(m, m.backend.pause_call("abort")), others)
        ready = [m for m in members if m in reached or m not in back]
        receipts = self._successes(await self._updates.load(ready, meta, send, pause))
        released = await self._all([m for m in back if m in receipts], self._set_pause, others)
        return {m: receipt for m, receipt in receipts.items() if m in released or m not in back}

    async def _holds_update(self, member: Member) -> bool:
        """Whether the server took the last update from us, and still says so: in an earlier life of the run it may have
        got other weights under this number. Version 0 is also that of a server just started."""
        if self._update is None or self._update.version == 0 or member.update is not self._update:
            return self._update is None
        try:
            facts = await self._ask(member, Call(member.backend.version_path, method="GET"))
        except RequestError:
            return False  # this version has no such route
        return isinstance(facts, dict) and facts.get("weight_version") == str(self._update.version)

    async def _some_reachable(self, version: int, deadline: float) -> None:
        """Waits for: a server that answers probes, until `deadline`. Unblocked by: watch.py, or the limit."""
        while all(member.breaker.state == "open" for member in self.router.members):
            if not await self.router.wait_change(deadline - time.monotonic()):
                raise WeightSyncError(
                    f"version {version} reached no server within {self.config.setup_timeout_s:g} s"
                    f" (rollout.setup_timeout_s): {self.router.told()}"
                )

    async def _ask(self, member: Member, call: Call, limit_s: float | None = None) -> Any:
        key = object()
        self._unanswered[key] = (member.id, f"{member.server.url}{call.path} not answered yet")
        try:
            return await member.ask(self.transport.send(member.server, call, limit_s or self.config.setup_timeout_s))
        finally:
            del self._unanswered[key]

    async def _everywhere(self, act: Callable[[Member], Coroutine[Any, Any, T]]) -> dict[Member, T]:
        """`act` on all servers that answer, at once; results of those that did not fail. All are waited for, so that
        none is still loading weights when the caller reacts.

        Raises:
            ArealiteError: none succeeded, and it was not only that they are gone.
        """
        return await self._all([m for m in self.router.members if m.breaker.state != "open"], act)

    async def _all(
        self, members: list[Member], act: Callable[[Member], Coroutine[Any, Any, T]], others: bool = False
    ) -> dict[Member, T]:
        """As `_everywhere`, on these. `others`: there are servers beside them, so that all of them may fail."""
        outcomes = await asyncio.gather(*map(act, members), return_exceptions=True)
        return self._successes(dict(zip(members, outcomes, strict=True)), others)

    def _successes(self, outcomes: Mapping[Member, T | BaseException], others: bool = False) -> dict[Member, T]:
        """Of those that did not fail; the others are taken out. Raises as `_all` does."""
        results: dict[Member, T] = {}
        failures: list[ArealiteError] = []
        for member, outcome in outcomes.items():
            if isinstance(outcome, ArealiteError):
                failures.append(outcome)
                self.router.fail(member, str(outcome), is_dead=isinstance(outcome, ConnectionLost))
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                results[member] = outcome
        refused = [f for f in failures if not isinstance(f, ConnectionLost)]
        if refused and not results and not others:
            raise refused[0]
        return results


async def _nothing() -> None:
    """Nothing has to be paused."""
