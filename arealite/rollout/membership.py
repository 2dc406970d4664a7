"""The loops that keep the list of servers true: they probe, take out, bring back, add and drain servers.

Made by client.py; everything runs in the client's asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from arealite.api.errors import ArealiteError, ConfigError, RequestError, ServerUnreachable
from arealite.rollout.backends.protocol import Backend, Call
from arealite.rollout.fleet import Fleet
from arealite.rollout.router import Address, ConnectionLost, Limits, Server, State, addresses_of

FIRST_PROBE_LIMIT_S = 30.0  # SGLang generates a token for it, and may have to compile first

logger = logging.getLogger(__name__)


class Watch:
    """One loop per server, and one for the servers file, which lists addresses, one a line (None: there is none).
    `backend` is that of servers until their version is known."""

    def __init__(self, fleet: Fleet, backend: Backend, limits: Limits, servers_file: Path | None) -> None:
        self._fleet, self._router, self._backend, self._limits = fleet, fleet.router, backend, limits
        self._silence_s = fleet.config.server_silence_s
        self._file = servers_file
        self._listed: set[str] = set()  # URLs
        self.loops: set[asyncio.Task[None]] = set()

    async def start(self, addresses: list[Address]) -> None:
        """Consumes: answers of the servers. Produces: their loops, which end when they are cancelled. Waits for: all
        of them to serve, at most `setup_timeout_s`. Unblocked by: the servers, or the limit.

        Raises:
            ServerUnreachable: names the servers that did not come up and what was wrong last.
            ConfigError: a server cannot be used as it was started.
        """
        limit_s = self._fleet.config.setup_timeout_s
        deadline = time.monotonic() + limit_s
        first = [self.add(address) for address in addresses]
        self._listed = {address.url for address in addresses}
        if self._file is not None:  # a server may be replaced before it was reached
            self._spawn(self._follow(self._file))
        while any(s.state != "serving" and s in self._router.servers for s in first):
            if refusal := next((s.refusal for s in first if s.refusal), None):
                raise refusal
            if not await self._router.wait_change(deadline - time.monotonic()):
                raise ServerUnreachable(
                    f"not healthy after {limit_s} s: {'; '.join(self._fleet.pending())}. Look into the servers'"
                    " logs, or raise rollout.setup_timeout_s"
                )

    def add(self, address: Address) -> Server:
        """A server that takes requests as soon as it answers and holds the weights. One of the same name is replaced,
        unless it is in use: then the new one gets a name of its own."""
        servers = self._router.servers
        if same := next((s for s in servers if s.url == address.url), None):
            if same.state == "draining":
                state: State = "serving" if same.is_reachable else "joining"
                self._router.move(same, state, "it is in the list of servers again")
            return same
        names = {s.id: s for s in servers}
        name, old = address.id, names.get(address.id)
        if old is not None and old.state == "draining":
            self._drop(old, "replaced by another server")
        elif old is not None:
            name = next(f"server-{i}" for i in range(len(names) + 1) if f"server-{i}" not in names)
        server = Server(name, address.url, self._backend)
        server.woken.set()
        servers.append(server)
        self._spawn(self._watch(server))
        return server

    def set_listed(self, texts: list[str]) -> None:
        """New addresses are added; servers that were in the list before and are no more are drained: they get no new
        requests, and are forgotten when their last one has ended."""
        addresses = addresses_of(texts)
        urls = {address.url for address in addresses}
        for server in list(self._router.servers):
            if server.url in self._listed - urls:
                server.num_failures = int(server.state != "serving")  # only one that serves has something to end
                self._router.move(server, "draining", "is no longer in the list of servers")
        for address in addresses:
            if address.url not in self._listed:
                self.add(address)
        self._listed = urls

    def _drop(self, server: Server, why: str) -> None:
        self._router.servers.remove(server)
        self._router.fail(server, why, is_dead=True)

    async def _follow(self, path: Path) -> None:
        """Consumes: the servers file. Produces: servers. Waits for: the next look. Unblocked by: time; ends when it is
        cancelled."""
        seen = ""
        while True:
            try:
                text = path.read_text()
                if text != seen and text.strip():
                    seen = text
                    self.set_listed(text.split())
            except OSError:
                pass  # not written yet, or its file system is gone for a moment
            except ConfigError as error:
                logger.error("the servers stay as they are: %s: %s", path, error)
            await asyncio.sleep(self._limits.file_s)

    async def _watch(self, server: Server) -> None:
        """One server, as long as there is one.

        Consumes: answers to probes. Produces: a server taken out, or back with the current weights. Waits for:
        `probe_s` of silence, or the end of a back-off. Unblocked by: time, `woken` (its state changed); ends when it is
        dropped.
        """
        num_misses = 0
        while server in self._router.servers:
            with suppress(TimeoutError):
                async with asyncio.timeout(server.wait_s or self._limits.probe_s):
                    await server.woken.wait()
            server.woken.clear()
            if server not in self._router.servers or server.wait_s:
                continue
            if server.state == "draining" and not (server.num_running and server.is_reachable):
                self._drop(server, server.why)
            elif server.state not in ("serving", "draining"):
                await self._bring_in(server)
            elif not self._fleet.gate.is_open and not server.backend.is_healthy_paused:
                server.heard_at = time.monotonic()
            elif time.monotonic() - server.heard_at >= self._limits.probe_s:
                num_misses = 0 if await self._answers(server) else num_misses + 1
                self._judge(server, num_misses)

    async def _answers(self, server: Server) -> bool:
        try:
            await self._probe(server)
        except ConnectionLost as error:
            self._router.lose(server, error)
        except ArealiteError:
            return False  # it lives, or is frozen: its silence decides
        return True

    def _judge(self, server: Server, num_misses: int) -> None:
        """Take out a server that neither sent a token nor answered two probes: one may be our own fault, when this
        process was frozen. The last one stays: it may only be slow, and nobody would do its work."""
        silent_s = time.monotonic() - server.heard_at
        others = any(s.state == "serving" for s in self._router.servers if s is not server)
        if num_misses >= 2 and silent_s >= self._silence_s and others:
            self._router.fail(server, f"it has answered nothing for {silent_s:.1f} s", is_dead=True)

    async def _bring_in(self, server: Server) -> None:
        """From joining or out to updating when it answers, and to serving when it has what the others have; a server
        whose weights cannot be had stays updating until the next update brings them. The others wait for it, so one
        that freezes meanwhile is taken out."""
        num_misses = 0
        try:
            await self._probe(server)
            if server.state in ("joining", "out"):
                self._router.move(server, "updating", server.why)
            joining = asyncio.ensure_future(self._join(server))
            try:
                while not (await asyncio.wait({joining}, timeout=self._limits.probe_s))[0]:
                    num_misses = 0 if await self._answers(server) else num_misses + 1
                    self._judge(server, num_misses)
                joining.result()
            finally:
                joining.cancel()
        except ArealiteError as error:
            server.refusal = error if isinstance(error, ConfigError) else None
            self._router.lose(server, error)

    async def _join(self, server: Server) -> None:
        """Raises ConfigError when the server cannot be used as it runs, and what Fleet.catch_up raises."""
        if not server.is_detected:
            facts = {}
            limit_s = self._fleet.config.setup_timeout_s  # vLLM looks at all of its machine before it first tells
            for path in server.backend.facts_paths:
                with suppress(RequestError):  # this version has no such route
                    facts[path] = await self._router.transport.send(server, Call(path, method="GET"), limit_s)
            server.backend, server.is_detected = server.backend.detect(facts, server.id), True
        await self._fleet.catch_up(server)

    async def _probe(self, server: Server) -> None:
        """Where /health samples a token, a server that was out is asked for less: it may be paused still."""
        backend, is_new = server.backend, server.state == "joining"
        was_out = server.state in ("out", "updating") and not backend.is_healthy_paused
        call = Call(backend.version_path if was_out else backend.health_path, method="GET")
        limit_s = FIRST_PROBE_LIMIT_S if is_new else self._silence_s / 2
        await self._router.ask(server, call, limit_s)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        loop = asyncio.ensure_future(work)
        self.loops.add(loop)
        loop.add_done_callback(self._ended)

    def _ended(self, loop: asyncio.Task[None]) -> None:
        self.loops.discard(loop)
        if not loop.cancelled() and (error := loop.exception()) is not None:
            logger.error("servers are no longer watched as they should be", exc_info=error)
