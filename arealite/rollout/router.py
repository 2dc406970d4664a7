"""Which server gets a request: a group's members together, groups where the fewest tokens are queued.

Called by generate.py, in the client's asyncio loop only.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from arealite.rollout.transport import Server

MAX_REMEMBERED_GROUPS = 8192
AVOIDED_S = 10.0  # how long a server that failed is used only when no other is left


class Router:
    """Sticky by group, so that members share the prompt's cache; otherwise the least loaded server."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.num_queued_tokens = {server.id: 0 for server in servers}
        self._home: OrderedDict[str, Server] = OrderedDict()
        self._avoided_until = {server.id: 0.0 for server in servers}

    def acquire(self, group_id: str, num_tokens: int) -> Server:
        """The server for a request of about `num_tokens`; give it back with `release`."""
        server = self._home.get(group_id) if group_id else None
        if server is None or (self._avoided(server) and not all(map(self._avoided, self.servers))):
            server = min(self.servers, key=lambda s: (self._avoided(s), self.num_queued_tokens[s.id]))
        if group_id:
            self._home[group_id] = server
            self._home.move_to_end(group_id)
            if len(self._home) > MAX_REMEMBERED_GROUPS:
                self._home.popitem(last=False)
        self.num_queued_tokens[server.id] += num_tokens
        return server

    def release(self, server: Server, num_tokens: int, failed: bool = False) -> None:
        """The request has left the server; `failed`: it could not be reached, so others go first for a while."""
        self.num_queued_tokens[server.id] -= num_tokens
        self._avoided_until[server.id] = time.monotonic() + AVOIDED_S if failed else 0.0

    def _avoided(self, server: Server) -> bool:
        return self._avoided_until[server.id] > time.monotonic()
