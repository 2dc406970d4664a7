"""The servers as one: pause, resume, weight updates, adapters, scores; and how one that comes back joins the others.

Called by client.py and membership.py; runs in the client's asyncio loop. Requests themselves are sent by generate.py.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import ArealiteError, RequestError, ServerUnreachable, WeightSyncError
from arealite.api.protocols import WeightSender
from arealite.api.types import WeightUpdateMeta
from arealite.rollout.backends.protocol import Call
from arealite.rollout.router import Router, Server
from arealite.rollout.transport import ConnectionLost, Transport
from arealite.rollout.weight_load import WeightLoads

T = TypeVar("T")


class Fleet:
    """A server that fails is taken out, and the others go on without it."""

    def __init__(self, router: Router, transport: Transport, config: InferenceEngineConfig) -> None:
        self.router, self.transport, self.config = router, transport, config
        self.gate = router.gate
        self.loads = WeightLoads(self.ask, config.pause_mode)
        self._update: WeightUpdateMeta | None = None  # the last one
        self._send: WeightSender | None = None  # its sender
        # Between pause and update the trainer may be writing the next weights where the last ones are.
        self._is_readable = False
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
            await self._all(self._reachable(), self._set_pause)

    async def resume(self) -> None:
        """Let all servers generate again."""
        async with self._lock:
            self._is_readable = self._update is not None
            self.gate.open()
            await self._all(self._reachable(), self._set_pause)

    async def update_weights(
        self, meta: WeightUpdateMeta, send: WeightSender | None = None
    ) -> dict[str, dict[str, int]]:
        """All servers load `meta` at the same time; receipts of those that give one. Generation is paused when it has
        to be, and stays so. Servers that fail are taken out; when all are unreachable, the first that comes back is
        waited for, `setup_timeout_s`.

        Raises:
            WeightSyncError: no server took the weights; names each and its message.
        """
        deadline = time.monotonic() + self.config.setup_timeout_s
        while True:
            await self._some_reachable(meta.version, deadline)
            async with self._lock:
                try:
                    receipts = await self._load(self._reachable(), meta, send)
                except (WeightSyncError, RequestError, ServerUnreachable) as error:
                    raise WeightSyncError(f"version {meta.version} reached no server: {error}") from error
                if receipts:
                    self._update, self._send, self._is_readable = meta, send, True
                    for server in receipts:
                        server.update = meta
                        if server.state == "updating":
                            self.router.move(server, "serving", f"it holds version {meta.version}")
                    return {server.id: receipt for server, receipt in receipts.items() if receipt is not None}

    async def join(self, server: Server) -> bool:
        """Bring a server that answers to the state of the others; False when the weights cannot be had before the
        next update.

        Raises:
            WeightSyncError, ServerUnreachable, RequestError, ConfigError: it cannot be used.
        """
        await self._detect(server)
        async with self._lock:
            if not await self._holds_update(server):
                if not self._is_readable:
                    return False
                assert self._update is not None, "without an update there is none to lack"
                receipts = await self._load([server], self._update, self._send, is_join=True)
                if server not in receipts:
                    raise ConnectionLost(server.why)
                receipt = receipts[server] or self._update.checksums
                wrong = [name for name, value in self._update.checksums.items() if receipt.get(name) != value]
                if wrong:
                    raise WeightSyncError(f"{server.id} holds other weights than it was sent: {', '.join(wrong[:4])}")
            for name, path in self._adapters.items():
                with suppress(RequestError):  # it has none of this name
                    await self.ask(server, server.backend.unload_lora_call(name))
                await self.ask(server, server.backend.lora_call(name, path))
            await self._set_pause(server)
            server.update = self._update
            if server.state == "updating":  # else it was taken out, or is no longer listed
                self.router.move(server, "serving", "it answers, and holds the current weights")
        return True

    async def set_adapter(self, name: str, path: str | None) -> None:
        """All servers load the adapter in folder `path` as `name`, those that come later too; None: they unload it.

        Raises:
            RequestError: a server refused it.
        """

        def call(server: Server) -> Coroutine[Any, Any, Any]:
            backend = server.backend
            return self.ask(server, backend.lora_call(name, path) if path else backend.unload_lora_call(name))

        async with self._lock:
            servers = [s for s in self.router.servers if s.state in ("serving", "draining")]
            outcomes = await asyncio.gather(*map(call, servers), return_exceptions=True)
            if refusal := next((o for o in outcomes if isinstance(o, RequestError)), None):
                raise refusal
            self._successes(dict(zip(servers, outcomes, strict=True)))
            self._adapters = {k: v for k, v in self._adapters.items() if k != name} | ({name: path} if path else {})

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Logprobs of each sequence's own tokens, sent again to another server when one fails.

        Raises:
            RequestError: a server refused it.
            ServerUnreachable: `request_retries` further sendings failed too.
        """

        async def one(tokens: list[int]) -> list[float]:
            num_failures = 0
            while True:
                async with self.router.server_for("", len(tokens)) as server:
                    call = server.backend.score_call(tokens, uuid.uuid4().hex, self.adapter)
                    try:
                        answer = await self.ask(server, call, self.config.request_timeout_s)
                        self.router.heard(server)
                        return server.backend.parse_scores(answer, len(tokens), server.id)
                    except ServerUnreachable as error:
                        self.router.fail(server, str(error))
                        num_failures += 1
                        if num_failures > self.config.request_retries:
                            raise

        return list(await asyncio.gather(*map(one, sequences)))

    async def ask(self, server: Server, call: Call, limit_s: float | None = None) -> Any:
        """The answer, within `setup_timeout_s` if not said otherwise. Raises as `Transport.send`."""
        key = object()
        self._unanswered[key] = (server.id, f"{server.url}{call.path} not answered yet")
        try:
            return await server.ask(self.transport.send(server, call, limit_s or self.config.setup_timeout_s))
        finally:
            del self._unanswered[key]

    # -- inside --------------------------------------------------------------------------------------------------

    async def _detect(self, server: Server) -> None:
        """Put the backend for the server's version. Raises ConfigError when the server cannot be used as it runs."""
        if server.is_detected:
            return
        facts = {}
        for path in server.backend.facts_paths:
            with suppress(RequestError):  # this version has no such route
                # vLLM looks at all of its machine before it tells its settings for the first time: seconds.
                limit_s = self.config.setup_timeout_s
                facts[path] = await self.transport.send(server, Call(path, method="GET"), limit_s)
        server.backend, server.is_detected = server.backend.detect(facts, server.id), True

    async def _holds_update(self, server: Server) -> bool:
        """Whether the server took the last update from us, and still says so: in an earlier life of the run it may have
        got other weights under this number. Version 0 is also that of a server just started."""
        if self._update is None or self._update.version == 0 or server.update is not self._update:
            return self._update is None
        try:
            facts = await self.ask(server, Call(server.backend.version_path, method="GET"))
        except RequestError:
            return False  # this version has no such route
        return isinstance(facts, dict) and facts.get("weight_version") == str(self._update.version)

    def _reachable(self) -> list[Server]:
        return [server for server in self.router.servers if server.is_reachable]

    async def _set_pause(self, server: Server) -> None:
        """Paused or not, as the others are."""
        backend = server.backend
        await self.ask(
            server, backend.resume_call() if self.gate.is_open else backend.pause_call(self.config.pause_mode)
        )

    async def _load(
        self, servers: list[Server], meta: WeightUpdateMeta, send: WeightSender | None, is_join: bool = False
    ) -> dict[Server, dict[str, int] | None]:
        """Receipts. A server that comes back is paused for it, and what it still worked at is ended."""

        async def pause() -> None:  # in the middle of an update, which has the lock
            if self.gate.is_open and not is_join:
                self.gate.close()
                await self._all(self._reachable(), self._set_pause)

        back = [s for s in servers if s.state == "updating"]
        others = len(back) < len(servers)
        reached = await self._all(back, lambda s: self.ask(s, s.backend.pause_call("abort")), others)
        ready = [s for s in servers if s in reached or s not in back]
        receipts = self._successes(await self.loads.load(ready, meta, send, pause))
        released = await self._all([s for s in back if s in receipts], self._set_pause, others)
        return {s: receipt for s, receipt in receipts.items() if s in released or s not in back}

    async def _some_reachable(self, version: int, deadline: float) -> None:
        """Waits for: a server that answers probes, until `deadline`. Unblocked by: the loops below, or the limit."""
        while not self._reachable():
            if not await self.router.wait_change(deadline - time.monotonic()):
                raise WeightSyncError(
                    f"version {version} reached no server within {self.config.setup_timeout_s:g} s"
                    f" (rollout.setup_timeout_s): {self.router.lines()}"
                )

    async def _all(
        self, servers: list[Server], act: Callable[[Server], Coroutine[Any, Any, T]], others: bool = False
    ) -> dict[Server, T]:
        """`act` on these servers at once; results of those that did not fail, the others are taken out. All are waited
        for, so that none is still at work when the caller reacts. `others`: there are servers beside these.

        Raises:
            ArealiteError: none succeeded, there are no others, and it was not only that they are gone.
        """
        outcomes = await asyncio.gather(*map(act, servers), return_exceptions=True)
        return self._successes(dict(zip(servers, outcomes, strict=True)), others)

    def _successes(self, outcomes: Mapping[Server, T | BaseException], others: bool = False) -> dict[Server, T]:
        results: dict[Server, T] = {}
        refused: list[ArealiteError] = []
        for server, outcome in outcomes.items():
            if isinstance(outcome, ArealiteError):
                self.router.fail(server, str(outcome), is_dead=isinstance(outcome, ConnectionLost))
                refused += [] if isinstance(outcome, ConnectionLost) else [outcome]
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                results[server] = outcome
        if refused and not results and not others:
            raise refused[0]
        return results
