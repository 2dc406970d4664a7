"""Weight updates as they come in: read beside the live weights in a thread, swapped in by the engine between two steps.

Called by http/control.py. Reading may take as long as a broadcast does; generation goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import torch

from arealite.api.errors import ArealiteError, WeightSyncError
from arealite.inference.core import receiver
from arealite.inference.core.engine import CALL_LIMIT_S, Engine
from arealite.inference.core.receiver import NamedTensors
from arealite.inference.requests import UpdateOptions
from arealite.observe import waits
from arealite.weights.wire import checksum

READ_LIMIT_S = 600.0  # a folder on a slow file system; a broadcast has a limit of its own
SESSION_LIMIT_S = 900.0  # between two calls of a session: then its trainer is gone, and what it staged is dropped

Checksums = dict[str, int]


@dataclass
class _Session:
    """Between begin_weight_update and end_weight_update: tensors that came and are not live yet, by name."""

    staged: dict[str, torch.Tensor] = field(default_factory=dict)
    failure: str = ""

    def taken(self) -> dict[str, torch.Tensor]:
        """All that came. Raises WeightSyncError: something of it was refused."""
        if self.failure:
            raise WeightSyncError(
                f"a part of this update was refused ({self.failure}); nothing after it is loaded: begin again"
            )
        staged, self.staged = self.staged, {}
        return staged


class Updates:
    """One update at a time. Inside a session, tensors become live with the call that flushes the cache or brings a
    version, or else at the session's end; outside, each with its own call. What fails leaves weights and version as
    they were, or says that they are partially updated; the rest of its session is refused."""

    def __init__(self, engine: Engine, session_limit_s: float = SESSION_LIMIT_S) -> None:
        self._engine = engine
        self._session_limit_s = session_limit_s
        self._lock = asyncio.Lock()
        self._works: set[asyncio.Task[Checksums]] = set()
        self._session: _Session | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._num_loose = 0  # tensors made live outside of sessions since the last flush or version

    async def begin(self) -> None:
        """Open a session. What an unfinished one has staged is dropped: its trainer is gone, or starts again."""
        await self._see_through(self._begin())

    async def take(
        self, read: Callable[[], NamedTensors], options: UpdateOptions, castable: bool = True, needs_all: bool = False
    ) -> Checksums:
        """The tensors of one call, from `read`, which may block; checksums once they are live. `castable`, `needs_all`:
        see receiver.stage.

        Raises:
            WeightSyncError, RequestError: refused.
        """
        return await self._see_through(self._take(read, options, castable, needs_all))

    async def end(self, options: UpdateOptions) -> Checksums:
        """Close the session; what is staged becomes live. Raises as `take` does."""
        return await self._see_through(self._end(options))

    async def _see_through(self, work: Coroutine[Any, Any, Checksums]) -> Checksums:
        """It goes on when the client goes away: the trainer is sending already."""

        async def in_turn() -> Checksums:
            async with self._lock:
                return await work

        task = asyncio.ensure_future(in_turn())
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return await waits.bounded(asyncio.shield(task), "weight update", "trainer", READ_LIMIT_S + CALL_LIMIT_S)

    async def _begin(self) -> Checksums:
        self._set_session(_Session())
        return {}

    def _set_session(self, session: _Session | None) -> None:
        """The session as of now; what it may be idle is counted anew."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._session = session
        if session is not None:
            self._expiry = asyncio.get_running_loop().call_later(self._session_limit_s, self._expire, session)

    def _expire(self, session: _Session) -> None:
        if not self._lock.locked():  # else the call that goes on begins a new term
            session.staged = {}
            session.failure = session.failure or f"nothing more came for {self._session_limit_s:g} s"

    async def _take(
        self, read: Callable[[], NamedTensors], options: UpdateOptions, castable: bool, needs_all: bool
    ) -> Checksums:
        model, session = self._engine.batcher.model, self._session
        swaps = options.flush_cache or options.weight_version is not None
        if session is not None and needs_all and swaps:
            session = _Session()  # whole by itself: it takes the place of all that was staged or refused
        try:
            came = await waits.in_thread(
                lambda: receiver.stage(model, read, castable, needs_all), "weights", "trainer", READ_LIMIT_S
            )
            if session is None:
                return await self._swap(came, options, is_whole=swaps)
            session.staged = session.taken() | came
            return await self._swap(session.taken(), options) if swaps else {}
        except ArealiteError as error:
            if session is not None:
                session.failure = session.failure or str(error)
            if not self._num_loose:
                raise
            raise WeightSyncError(
                f"{error}. {self._num_loose} tensors of this update are live already: the weights are partially"
                " updated, send all of them again"
            ) from error
        finally:
            self._set_session(session)

    async def _end(self, options: UpdateOptions) -> Checksums:
        session = self._session
        self._set_session(None)
        if session is not None:
            return await self._swap(session.taken(), options)
        if options.weight_version is not None or options.checksum_names:
            raise WeightSyncError("no weight update session is open, so nothing was changed; begin one first")
        return {}

    async def _swap(self, staged: dict[str, torch.Tensor], options: UpdateOptions, is_whole: bool = True) -> Checksums:
        changed = await self._engine.ask("weight update", lambda: self._engine.update_weights(staged, options))
        self._num_loose = 0 if is_whole else self._num_loose + len(staged)
        unchanged = {name: staged[name] for name in options.checksum_names if name not in changed}
        if not unchanged:
            return changed
        return changed | await waits.in_thread(  # generation goes on meanwhile
            lambda: {name: checksum(tensor) for name, tensor in unchanged.items()}, "checksums", "model", READ_LIMIT_S
        )
