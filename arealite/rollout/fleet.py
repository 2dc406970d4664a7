"""Control of all servers together: health, pause, resume, weight update, scoring.

Called by client.py; runs in the client's asyncio loop. Requests themselves are sent by generate.py.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import RequestError, ServerUnreachable, WeightSyncError
from arealite.api.types import WeightUpdateMeta
from arealite.rollout.backend import Backend, Call
from arealite.rollout.transport import Server, Transport

HEALTH_POLL_S = 0.2
HEALTH_LIMIT_S = 30.0  # of one probe: SGLang generates a token for it

T = TypeVar("T")


class Fleet:
    """The run's servers as one."""

    def __init__(
        self, servers: list[Server], backends: dict[str, Backend], transport: Transport, config: InferenceEngineConfig
    ) -> None:
        self.servers = servers
        self.backends = backends  # by server id; `wait_healthy` puts that of the server's version
        self.transport = transport
        self.config = config
        self._unanswered: dict[object, tuple[str, str]] = {}  # key -> server id and its line, oldest first

    def pending(self) -> list[str]:
        """Lines about servers that have not answered. Any thread may call."""
        return [f"{server_id}: {line}" for server_id, line in list(self._unanswered.values())]

    def owner(self) -> str:
        """The server that has not answered for longest; empty when nothing was asked. Any thread may call."""
        return next((server_id for server_id, _ in list(self._unanswered.values())), "")

    async def wait_healthy(self) -> None:
        """Consumes: answers of /health. Produces: nothing. Waits for: 200 from every server, at most
        `setup_timeout_s`. Unblocked by: the servers, or the limit.

        Raises:
            ServerUnreachable: names the servers that did not come up and what was wrong last.
        """
        deadline = time.monotonic() + self.config.setup_timeout_s
        for server in self.servers:
            self._unanswered[server] = (server.id, f"{server.url}/health not asked yet")

        async def come_up(server: Server) -> None:
            path = self.backends[server.id].health_path
            while wrong := await self.transport.wrong_with(server, path, HEALTH_LIMIT_S):
                self._unanswered[server] = (server.id, f"{server.url}{path}: {wrong}")
                if time.monotonic() > deadline:
                    return
                await asyncio.sleep(HEALTH_POLL_S)
            await self.detect(server)
            del self._unanswered[server]

        await asyncio.gather(*map(come_up, self.servers))
        if self._unanswered:
            raise ServerUnreachable(
                f"not healthy after {self.config.setup_timeout_s} s: {'; '.join(self.pending())}. Look into the"
                " servers' logs, or raise rollout.setup_timeout_s"
            )

    async def detect(self, server: Server) -> None:
        """Put the backend for the server's version. Raises ConfigError when the server cannot be used as it runs."""
        backend, facts = self.backends[server.id], {}
        for path in backend.facts_paths:
            try:
                facts[path] = await self.transport.send(server, Call(path, method="GET"), HEALTH_LIMIT_S)
            except RequestError:
                continue  # this version has no such route
        self.backends[server.id] = backend.detect(facts, server.id)

    async def pause(self) -> None:
        """Stop generation everywhere, as `pause_mode` says."""
        mode = self.config.pause_mode
        await self._everywhere(lambda server: self._ask(server, self.backends[server.id].pause_call(mode)))

    async def resume(self) -> None:
        """Let all servers generate again."""
        await self._everywhere(lambda server: self._ask(server, self.backends[server.id].resume_call()))

    async def update_weights(self, meta: WeightUpdateMeta) -> dict[str, dict[str, int]]:
        """All servers load `meta` at the same time; receipts of those that give one.

        Raises:
            WeightSyncError: names the server that did not take the weights, and its message.
        """

        async def load(server: Server) -> dict[str, int] | None:
            backend = self.backends[server.id]
            plan = backend.update_plan(meta, self.config.pause_mode)
            try:
                answers = [await self._ask(server, call) for call in (*plan.before, *plan.after)]
            except (RequestError, ServerUnreachable) as error:
                raise WeightSyncError(f"version {meta.version} did not reach {server.id}: {error}") from error
            return backend.parse_receipt(answers, meta, server.id)

        receipts = await self._everywhere(load)
        return {server_id: receipt for server_id, receipt in receipts.items() if receipt is not None}

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Logprobs of each sequence's own tokens, the sequences dealt out to the servers in turn."""

        async def one(index: int, tokens: list[int]) -> list[float]:
            server = self.servers[index % len(self.servers)]
            backend = self.backends[server.id]
            call = backend.score_call(tokens, uuid.uuid4().hex)
            answer = await self._ask(server, call, self.config.request_timeout_s)
            return backend.parse_scores(answer, len(tokens), server.id)

        return list(await asyncio.gather(*(one(i, tokens) for i, tokens in enumerate(sequences))))

    async def _ask(self, server: Server, call: Call, limit_s: float | None = None) -> Any:
        key = object()
        self._unanswered[key] = (server.id, f"{server.url}{call.path} not answered yet")
        try:
            return await self.transport.send(server, call, limit_s or self.config.setup_timeout_s)
        finally:
            del self._unanswered[key]

    async def _everywhere(self, act: Callable[[Server], Awaitable[T]]) -> dict[str, T]:
        """`act` on all servers at once. All are waited for before the first error is raised, so that none is still
        loading weights when the caller reacts."""
        results = await asyncio.gather(*map(act, self.servers), return_exceptions=True)
        outcomes: dict[str, T] = {}
        for server, result in zip(self.servers, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            outcomes[server.id] = result
        return outcomes
