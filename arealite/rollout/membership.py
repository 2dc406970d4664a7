"""The loops that keep the list of servers true: they probe, take out, bring back, add and drain servers.

Made by client.py; everything runs in the client's asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from arealite.api.atomic import write_json
from arealite.api.errors import ArealiteError, ConfigError, RequestError, ServerUnreachable, WaitTimeout
from arealite.observe import waits
from arealite.observe.run_folder import RunFolder
from arealite.rollout.backends.protocol import MODELS_PATH, Backend, Call, context_length_of
from arealite.rollout.fleet import Fleet
from arealite.rollout.roster import FRESH_S, Asked, read_asked, roster_of
from arealite.rollout.router import Address, ConnectionLost, Limits, Server, State, addresses_of

FIRST_PROBE_LIMIT_S = 30.0  # SGLang generates a token for it, and may have to compile first
FOLDER_LIMIT_S = 60.0  # for the run folder's files

logger = logging.getLogger(__name__)


class Watch:
    """One loop per server, and one for the run folder's lists (None: there is no folder): `servers`, the launcher's, an
    address a line, and what a person asked for (roster.py). `backend`: of servers whose version is not known yet."""

    def __init__(self, fleet: Fleet, backend: Backend, limits: Limits, folder: RunFolder | None) -> None:
        self._fleet, self._router, self._backend, self._limits = fleet, fleet.router, backend, limits
        self._silence_s = fleet.config.server_silence_s
        self._folder = folder
        self._given: list[str] = []  # addresses, as they were listed last
        self._listed: set[str] = set()  # URLs of those that are to serve, or cannot leave yet
        self._left: dict[str, str] = {}  # URLs of those that were drained, and how they ended
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
        self._given = [address.url for address in addresses]
        if self._folder is not None:  # a server may be replaced before it was reached
            self._spawn(self._follow(self._folder))
        while any(s.state != "serving" and s in self._router.servers for s in first):
            if refusal := next((s.refusal for s in first if s.refusal), None):
                raise refusal
            if not await self._router.wait_change(deadline - time.monotonic()):
                raise ServerUnreachable(
                    f"not healthy after {limit_s} s: {'; '.join(self._fleet.pending())}. Look into the servers'"
                    " logs, or raise rollout.setup_timeout_s"
                )

    def add(self, address: Address, is_guest: bool = False) -> Server:
        """A server that takes requests as soon as it answers and holds the weights. One of the same name is replaced,
        unless it is in use: then the new one gets a name of its own."""
        servers = self._router.servers
        if same := next((s for s in servers if s.url == address.url), None):
            if same.state == "draining":
                state: State = "serving" if same.is_reachable else "joining"
                same.leave_by = None
                self._router.move(same, state, "it is in the list of servers again")
            return same
        names = {s.id: s for s in servers}
        name, old = address.id, names.get(address.id)
        if old is not None and old.state == "draining" and not old.is_reachable:
            self._drop(old, "replaced by another server")
        elif old is not None:
            name = next(f"server-{i}" for i in range(len(names) + 1) if f"server-{i}" not in names)
        server = Server(name, address.url, self._backend, is_guest=is_guest)
        self._left.pop(server.url, None)
        server.woken.set()
        servers.append(server)
        self._spawn(self._watch(server))
        return server

    def follow(self, listed: list[str], asked: list[Asked]) -> None:
        """New addresses are added. Servers that were listed before and are no more, or that are asked to leave, are
        drained: they get no new requests, and are forgotten when their last one has ended. Raises ConfigError, before
        anything is changed: one of the texts is no address."""
        limits = {each.url: each.limit_s for each in asked if each.act == "drain"}
        guests = {each.url for each in asked if each.act == "add"}
        places = [a for a in addresses_of([*(listed or self._given), *sorted(guests)]) if a.url not in limits]
        self._given = listed or self._given
        urls = {address.url for address in places}
        staying: set[str] = set()
        for server in list(self._router.servers):
            if server.url in (self._listed - urls) | limits.keys() and server.state != "draining":
                staying |= self._drain(server, limits.get(server.url, self._limits.drain_s))
        for address in places:
            if address.url not in self._listed:
                self.add(address, is_guest=address.url in guests)
        self._listed = urls | staying

    def _drain(self, server: Server, limit_s: float) -> set[str]:
        """Let it leave; its URL when it has to stay, because no other would do its work."""
        if server.state == "serving":
            if not any(s.state == "serving" for s in self._router.servers if s is not server):
                server.why = "it is to leave, and takes requests until another one does"
                return {server.url}
            server.leave_by = time.monotonic() + limit_s
        server.num_failures = int(server.state != "serving")  # only one that serves has something to end
        self._router.move(server, "draining", "it is asked to leave, or no longer in the list of servers")
        return set()

    def _drop(self, server: Server, why: str) -> None:
        if server.leave_by is not None:
            self._router.counters.add("num_servers_drained")
            self._left[server.url] = why
            logger.info("%s (%s) has left; %s", server.id, server.url, why)
        self._router.servers.remove(server)
        self._router.fail(server, why, is_dead=True)

    async def _follow(self, folder: RunFolder) -> None:
        """Consumes: the launcher's list, and what was asked for. Produces: servers, and the roster. Waits for: the
        folder, and the next look. Unblocked by: time; ends when it is cancelled."""

        def read() -> tuple[list[str], list[Asked]]:
            asked = read_asked(folder)
            with suppress(FileNotFoundError):  # nobody writes one
                return folder.servers.read_text().split(), asked
            return [], asked

        said, told, told_at = "", dict[str, Any](), 0.0
        while True:
            with suppress(OSError):  # the file system is gone for a moment
                try:
                    listed, asked = await waits.in_thread(read, "lists of servers", "run folder", FOLDER_LIMIT_S)
                    self.follow(listed, asked)
                    roster = roster_of(self._router.servers, asked, self._left)
                    if roster != told or time.monotonic() - told_at > FRESH_S:
                        write = partial(write_json, folder.servers_json, roster)
                        await waits.in_thread(write, "roster of servers", "run folder", FOLDER_LIMIT_S)
                        told, told_at = roster, time.monotonic()
                except (ConfigError, WaitTimeout) as error:
                    if str(error) != said:
                        logger.error("the servers stay as they are: %s", error)
                    said = str(error)
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
            if server.state == "draining" and (end := _end_of(server)):
                self._drop(server, end)
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
            for path in (*server.backend.facts_paths, MODELS_PATH):
                with suppress(RequestError):  # this version has no such route
                    facts[path] = await self._router.transport.send(server, Call(path, method="GET"), limit_s)
            server.context_length = context_length_of(facts.pop(MODELS_PATH, None))
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


def _end_of(server: Server) -> str:
    """Why a server that is drained is to be forgotten now; empty: it is not yet."""
    if not server.is_reachable:
        return server.why
    if not server.num_running:
        return "drained: it has ended its last request"
    is_late = server.leave_by is not None and time.monotonic() > server.leave_by
    return f"drained: its time is over, and {server.num_running} requests go on elsewhere" if is_late else ""
