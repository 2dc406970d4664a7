"""Which server gets a request: a group's members together, groups where the fewest tokens are queued.

Called by generate.py and fleet.py, in the client's asyncio loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict

from arealite.api.errors import ServerUnreachable
from arealite.rollout.counters import Counters
from arealite.rollout.health import Member

MAX_REMEMBERED_GROUPS = 8192

logger = logging.getLogger(__name__)


class Router:
    """Sticky by group, so that members share the prompt's cache and a request that was interrupted finds its prefix;
    otherwise the least loaded server. `limit_s`: how long requests wait when there is no server to take them."""

    def __init__(self, members: list[Member], counters: Counters, limit_s: float) -> None:
        self.members = members
        self._counters = counters
        self._limit_s = limit_s
        self._home: OrderedDict[str, Member] = OrderedDict()
        self._changed = asyncio.Event()
        self._none_since: float | None = None

    async def acquire(self, group: str, num_tokens: int) -> Member:
        """The server for a request of about `num_tokens`; give it back with `release`. `group` "": any.

        Waits for: a server that takes requests, until there has been none for the limit. Unblocked by: a server that
        comes back or is added, or the limit.

        Raises:
            ServerUnreachable: names every server and its last failure.
        """
        while (member := self._pick(group)) is None:
            self._none_since = self._none_since or time.monotonic()
            if not await self.wait_change(self._none_since + self._limit_s - time.monotonic()):
                raise ServerUnreachable(
                    f"no server has taken requests for {self._limit_s:g} s (rollout.setup_timeout_s): {self.told()}"
                )
        self._none_since = None
        member.num_running += 1
        member.num_queued_tokens += num_tokens
        return member

    def release(self, member: Member, num_tokens: int) -> None:
        """The request has left the server."""
        member.num_running -= 1
        member.num_queued_tokens -= num_tokens
        if not member.is_listed:
            member.woken.set()

    def fail(self, member: Member, why: str, is_dead: bool = False) -> None:
        """Take the server out until it answers probes again; `is_dead`: what it was asked will not be answered."""
        if member.breaker.failed(why) and member.is_listed:
            self._counters.add("num_server_failures")
            logger.warning("%s (%s) is taken out: %s", member.id, member.server.url, why)
        member.holds_weights = False  # who knows who will answer there next
        if is_dead:
            member.end_calls()
        member.woken.set()
        self.notify()

    def succeeded(self, member: Member) -> None:
        """It answered a request, or sent a token."""
        member.heard_at = time.monotonic()
        if member.breaker.succeeded():
            self.notify()

    def changed(self) -> None:
        """Servers came or went: groups choose again, the idle ones first, when they next send a request."""
        self._home.clear()
        self._none_since = None
        self.notify()

    async def wait_change(self, limit_s: float) -> bool:
        """Whether a server came, went or answered within the limit."""
        try:
            async with asyncio.timeout(limit_s):
                return await self._changed.wait()
        except TimeoutError:
            return False

    def notify(self) -> None:
        """Those who wait for a server look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def told(self) -> str:
        """The servers that take no requests, and why."""
        return "; ".join(filter(None, (m.line() for m in self.members))) or "there are no servers"

    def _pick(self, group: str) -> Member | None:
        ready = [m for m in self.members if m.is_alive and m.is_listed]
        if not ready:
            return None
        home = self._home.get(group)
        if home is None or home not in ready:
            # A server that failed is tried by one group; by all when there is no other.
            ready = [m for m in ready if m.breaker.state == "closed" or not m.num_running] or ready
            home = min(ready, key=lambda m: m.num_queued_tokens)
        if group:
            self._home[group] = home
            self._home.move_to_end(group)
            if len(self._home) > MAX_REMEMBERED_GROUPS:
                self._home.popitem(last=False)
        return home
