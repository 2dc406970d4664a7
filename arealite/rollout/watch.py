"""The loops that keep the list of servers true: they probe, take out, bring back, add and drain servers.

Made by connection.py; everything runs in the client's asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from arealite.api.errors import ArealiteError, ConfigError
from arealite.rollout.backend import Backend, Call
from arealite.rollout.fleet import Fleet
from arealite.rollout.health import Member
from arealite.rollout.router import Router
from arealite.rollout.transport import ConnectionLost, Server, servers_at

PROBE_S = 1.0  # a server that has said nothing for so long is asked whether it is there
FILE_S = 1.0  # how often the servers file is looked at

logger = logging.getLogger(__name__)


class Watch:
    """One loop per server, and one for the servers file (None: there is none). `backend` is that of servers to come."""

    def __init__(self, fleet: Fleet, backend: Backend, silence_s: float, servers_file: Path | None) -> None:
        self._fleet = fleet
        self._router: Router = fleet.router
        self._members = fleet.router.members
        self._backend = backend
        self._silence_s = silence_s
        self._file = servers_file
        self._listed = {member.server.url for member in self._members}
        self._loops: set[asyncio.Task[None]] = set()
        self._first = list(self._members)

    def follow(self) -> None:
        """Keep to the servers file from now on. Call once, in the loop; destroy cancels what this and `start` start."""
        if self._file is not None:
            self._spawn(self._follow(self._file))

    def start(self) -> None:
        """Watch the first servers, once they have come up; those added later are watched from the beginning."""
        for member in self._first:
            self._spawn(self._watch(member))

    def add(self, server: Server) -> Member:
        """A server that takes requests as soon as it answers and holds the weights. One of the same name is replaced,
        unless it is in use: then the new one gets a name of its own."""
        same = next((m for m in self._members if m.server.url == server.url), None)
        if same is not None:
            same.is_listed = True
            return same
        old = next((m for m in self._members if m.id == server.id), None)
        if old is not None and not old.is_listed:
            self._drop(old, "replaced by another server")
        elif old is not None:
            names = {m.id for m in self._members}
            free = next(f"server-{i}" for i in range(len(names) + 1) if f"server-{i}" not in names)
            server = replace(server, id=free)
        member = Member(server, self._backend, holds_weights=False)
        member.breaker.state = "open"
        member.woken.set()
        self._members.append(member)
        self._spawn(self._watch(member))
        return member

    def set_listed(self, addresses: list[str]) -> None:
        """New addresses are added; servers that were in the list before and are no more are drained: they get no new
        requests, and are forgotten when their last one has ended."""
        servers = servers_at(addresses)
        urls = {server.url for server in servers}
        for member in self._members:
            if member.server.url in self._listed - urls:
                member.is_listed = False
                member.woken.set()
        for server in servers:
            if server.url not in self._listed:
                self.add(server)
        self._listed = urls
        self._router.changed()

    async def _follow(self, path: Path) -> None:
        """Consumes: the servers file, one address a line. Produces: members. Waits for: the next look, FILE_S.
        Unblocked by: time; ends when it is cancelled."""
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
            await asyncio.sleep(FILE_S)

    async def _watch(self, member: Member) -> None:
        """One server, as long as it is a member.

        Consumes: answers to probes. Produces: a server taken out, or back with the current weights. Waits for: PROBE_S
        of silence, or the end of a back-off. Unblocked by: time, `woken` (a request failed); ends when it is dropped.
        """
        num_misses = 0
        while member in self._members:
            with suppress(TimeoutError):
                async with asyncio.timeout(member.breaker.wait_s or PROBE_S):
                    await member.woken.wait()
            member.woken.clear()
            if member not in self._members:
                return
            if not member.is_listed and (member.num_running == 0 or member.breaker.state == "open"):
                self._drop(member, "no longer in the list of servers")
            elif member.breaker.wait_s:
                continue
            elif not member.is_alive:
                await self._bring_back(member)
            elif self._fleet.is_paused and not member.backend.is_healthy_paused:
                member.heard_at = time.monotonic()
            elif time.monotonic() - member.heard_at >= PROBE_S:
                num_misses = 0 if await self._answers(member) else num_misses + 1
                self._judge(member, num_misses)

    async def _answers(self, member: Member) -> bool:
        try:
            await self._probe(member)
        except ConnectionLost as error:
            self._router.fail(member, str(error), is_dead=True)
        except ArealiteError:
            return False  # it lives, or is frozen: its silence decides
        return True

    def _judge(self, member: Member, num_misses: int) -> None:
        """Take out a server that neither sent a token nor answered two probes: one may be our own fault, when this
        process was frozen. The last one stays: it may only be slow, and nobody would do its work."""
        silent_s = time.monotonic() - member.heard_at
        others = any(m.is_alive and m.is_listed for m in self._members if m is not member)
        if num_misses >= 2 and silent_s >= self._silence_s and others:
            self._router.fail(member, f"it has answered nothing for {silent_s:.1f} s", is_dead=True)

    async def _bring_back(self, member: Member) -> None:
        try:
            await self._probe(member)
            member.breaker.answers()
            self._router.notify()
            if not await self._joined(member):
                return  # the next update brings the weights
        except ArealiteError as error:
            self._router.fail(member, str(error), is_dead=isinstance(error, ConnectionLost))
            return
        logger.warning("%s (%s) takes requests", member.id, member.server.url)
        self._router.changed()

    async def _joined(self, member: Member) -> bool:
        """Fleet.join, watched: the others wait for it, so a server that freezes in it is taken out."""
        joining = asyncio.ensure_future(self._fleet.join(member))
        num_misses = 0
        try:
            while not (await asyncio.wait({joining}, timeout=PROBE_S))[0]:
                num_misses = 0 if await self._answers(member) else num_misses + 1
                self._judge(member, num_misses)
            return joining.result() and member.is_alive
        finally:
            joining.cancel()

    async def _probe(self, member: Member) -> None:
        """Where /health samples a token, a server that is out is asked for less: it may be paused still."""
        backend = member.backend
        path = backend.health_path if member.is_alive or backend.is_healthy_paused else backend.version_path
        call = Call(path, method="GET")
        await member.ask(self._fleet.transport.send(member.server, call, self._silence_s / 2))

    def _drop(self, member: Member, why: str) -> None:
        self._members.remove(member)
        member.is_listed = False
        self._router.fail(member, why, is_dead=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        loop = asyncio.ensure_future(work)
        self._loops.add(loop)
        loop.add_done_callback(self._ended)

    def _ended(self, loop: asyncio.Task[None]) -> None:
        self._loops.discard(loop)
        if not loop.cancelled() and (error := loop.exception()) is not None:
            logger.error("servers are no longer watched as they should be", exc_info=error)
