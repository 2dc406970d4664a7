"""A weight update on the server: received from the trainer's group or read beside the live weights, checked whole, and
swapped in between two steps.

Called by http/control.py. Reading is done in threads and may take as long as a broadcast does; generation goes on
meanwhile, and stops for `make_live` alone, which the engine's thread runs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from arealite.api.errors import ArealiteError, RequestError, WeightSyncError, listed
from arealite.api.types import GroupPlace, TensorSlot
from arealite.devices import beside, collective_backend, wait_for_stream
from arealite.inference.core.engine import CALL_LIMIT_S, Engine
from arealite.inference.core.requests import UpdateOptions
from arealite.inference.core.served_model import ServedModel
from arealite.models.naming import HubPart
from arealite.observe import waits
from arealite.weights.wire import GROUP_LIMIT_S, broadcast, checksum, cut, join_group, leave_group, raw_bytes

READ_LIMIT_S = 600.0  # a folder on a slow file system; a broadcast has a limit of its own
SESSION_LIMIT_S = 900.0  # between two calls of a session: then its trainer is gone, and what it staged is dropped
JOIN_SLACK_S = 10.0
MAX_GROUPS = 4  # a trainer makes a new group when it has lost a server; the oldest is left then

NamedTensors = Iterable[tuple[str, torch.Tensor]]
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
        see `stage`.

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
                lambda: stage(model, read, castable, needs_all), "weights", "trainer", READ_LIMIT_S
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
        changed = await self._engine.ask("weight update", lambda: make_live(self._engine, staged, options))
        self._num_loose = 0 if is_whole else self._num_loose + len(staged)
        unchanged = {name: staged[name] for name in options.checksum_names if name not in changed}
        if not unchanged:
            return changed
        return changed | await waits.in_thread(  # generation goes on meanwhile
            lambda: {name: checksum(tensor) for name, tensor in unchanged.items()}, "checksums", "model", READ_LIMIT_S
        )


class Groups:
    """The process groups that the server is a member of, by name; the trainer is rank 0 of each. `device`: of the
    served model."""

    def __init__(self, device: torch.device, limit_s: float = GROUP_LIMIT_S) -> None:
        """`limit_s`: to reach the store, and again for all to be there."""
        self._device = device
        self._limit_s = limit_s
        self._groups: dict[str, tuple[dist.ProcessGroup, torch.device]] = {}

    async def join(self, place: GroupPlace, rank: int) -> None:
        """Raises WeightSyncError: not all members came, or it cannot be made here."""
        expected = dict.fromkeys(["gloo", collective_backend(self._device)])
        if place.backend not in expected:
            raise WeightSyncError(
                f"backend: expected {' or '.join(expected)} on {self._device}, found {place.backend!r}"
            )
        if not 0 < rank < place.world_size:
            raise WeightSyncError(
                f"rank_offset {rank} is no server's in a world of {place.world_size}; 0 is the trainer"
            )
        self.leave(place.name)

        def meet() -> dist.ProcessGroup:
            where = place.address, place.port, rank, place.world_size, place.name, place.backend
            return join_group(*where, limit_s=self._limit_s)

        limit_s = 2 * self._limit_s + JOIN_SLACK_S
        group = await waits.in_thread(meet, f"weight group {place.name}", "trainer", limit_s)
        self._groups[place.name] = (group, torch.device("cpu") if place.backend == "gloo" else self._device)
        for name in list(self._groups)[:-MAX_GROUPS]:
            self.leave(name)

    def leave(self, name: str) -> None:
        if name in self._groups:
            leave_group(self._groups.pop(name)[0])

    def receive(self, name: str, slots: list[TensorSlot], is_flat: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """What the trainer is about to broadcast: tensors one by one, or (`is_flat`) as one run of their bytes. Blocks
        until it has come.

        Raises:
            WeightSyncError: no such group, or the broadcast failed: then the group is of no use any more, and left.
        """
        if name not in self._groups:
            known = ", ".join(self._groups) or "none"
            raise WeightSyncError(f"group_name: this server is in no group {name!r} (in: {known})")
        group, device = self._groups[name]
        if is_flat:
            tensors = [torch.empty(sum(slot.nbytes for slot in slots), dtype=torch.uint8, device=device)]
        else:
            tensors = [torch.empty(slot.shape, dtype=getattr(torch, slot.dtype), device=device) for slot in slots]
        try:
            broadcast(group, tensors)
        except WeightSyncError:
            self.leave(name)
            raise
        whole = [cut(tensors[0], slot) for slot in slots] if is_flat else tensors
        yield from zip((slot.name for slot in slots), whole, strict=True)


def layout(names: list[str], dtypes: list[str], shapes: list[list[int]], max_bytes: int) -> list[TensorSlot]:
    """The tensors end to end, in this order.

    Raises:
        RequestError: the lists do not fit each other, torch has no such dtype, or it is more than `max_bytes`.
    """
    if not len(names) == len(dtypes) == len(shapes):
        raise RequestError(f"names, dtypes and shapes: {len(names)}, {len(dtypes)} and {len(shapes)} of them")
    slots: list[TensorSlot] = []
    offset = 0
    for name, dtype_name, shape in zip(names, dtypes, shapes, strict=True):
        dtype = torch.__dict__.get(dtype_name)
        if not isinstance(dtype, torch.dtype):
            raise RequestError(f"dtypes: torch has no dtype {dtype_name!r}")
        nbytes = math.prod(shape) * dtype.itemsize
        slots.append(TensorSlot(name, dtype_name, tuple(shape), offset, nbytes))
        offset += nbytes
        if offset > max_bytes:
            raise RequestError(f"shapes: more than {max_bytes} bytes, which is several times the served model")
    return slots


def check_names(model: ServedModel, names: Iterable[str]) -> None:
    """Raises WeightSyncError when the model has no tensor of one of the names."""
    if unknown := [name for name in names if name not in model.tensors]:
        raise WeightSyncError(f"the served model has no tensor named {listed(unknown)}")


def check_slots(model: ServedModel, slots: Iterable[TensorSlot]) -> None:
    """Before bytes are read by these descriptions. Raises WeightSyncError: one does not fit the served tensor."""
    for slot in slots:
        _check(model, slot.name, slot.shape, slot.dtype)
        wanted = model.tensors[slot.name].nbytes
        if slot.nbytes != wanted:
            raise WeightSyncError(
                f"{slot.name}: {slot.nbytes} bytes in the update; {slot.dtype} {list(slot.shape)} takes {wanted}"
            )


def _check(
    model: ServedModel, name: str, shape: tuple[int, ...], dtype: torch.dtype | str, castable: bool = False
) -> None:
    """A tensor of an update must fit the served one; where `castable`, one float dtype fits another."""
    check_names(model, [name])
    live = model.tensors[name]
    if shape != tuple(live.shape):
        raise WeightSyncError(f"{name}: shape {list(shape)} in the update, {list(live.shape)} in the served model")
    castable = castable and isinstance(dtype, torch.dtype) and dtype.is_floating_point and live.is_floating_point()
    if str(dtype).removeprefix("torch.") != str(live.dtype).removeprefix("torch.") and not castable:
        raise WeightSyncError(
            f"{name}: {dtype} in the update, {live.dtype} in the served model; publish in the dtype that the server was"
            " started with"
        )


def stage(
    model: ServedModel, read: Callable[[], NamedTensors], castable: bool, needs_all: bool
) -> dict[str, torch.Tensor]:
    """The new values that `read` gives, by `model.tensor_names`, where and as what the model is served: loading them is
    a copy there. Nothing is changed yet; another thread than the engine's may call.

    `castable`: any float dtype is taken, and cast as at load; else the served one. `needs_all`: of the model's tensors.

    Raises:
        WeightSyncError: unreadable, or a name, shape or dtype is wrong, or a tensor is missing.
    """
    staged: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in list(read()):  # all of a broadcast, before any is refused: the trainer is sending
            _check(model, name, tuple(tensor.shape), tensor.dtype, castable)
            for part in model.hub_parts.get(name, (HubPart(name),)):
                if part.name in staged:
                    raise WeightSyncError(f"the update has {part.name!r} twice")
                staged[part.name] = tensor[part.index]
        if model.device.type == "cpu":
            staged = {name: tensor.to(model.tensors[name].dtype) for name, tensor in staged.items()}
        else:  # beside the GPU's other work; what it has no room for now stays on the host until it is loaded
            with beside(model.device), suppress(torch.OutOfMemoryError):
                for name, tensor in staged.items():
                    staged[name] = tensor.to(model.device, model.tensors[name].dtype)
    except (OSError, ValueError, RuntimeError) as error:  # a file that vanished, a path that is none, no memory left
        raise WeightSyncError(f"cannot read the weights: {error}") from error
    missing = [name for name in model.tensor_names if name not in staged]
    if missing and needs_all:
        raise WeightSyncError(
            f"{len(missing)} of the model's {len(model.tensor_names)} tensors are missing from the update:"
            f' {listed(missing)}; send all of them, or "partial": true'
        )
    return {name: staged[name] for name in model.tensor_names if name in staged}


def make_live(engine: Engine, staged: dict[str, torch.Tensor], options: UpdateOptions) -> Checksums:
    """Load what was staged, on the engine's thread; returns the CRC-32 of those live tensors in `checksum_names` that
    are not, byte for byte, what was staged.

    Running requests are aborted (`abort_all_requests`) or retracted, unless paused in place, where they keep the keys
    and values of the old weights. Computed prompts are forgotten in any case.

    Raises:
        WeightSyncError: the update was refused; weights and version are as before.
    """
    model, scheduler = engine.batcher.model, engine.batcher.scheduler
    keep_running = engine.paused == "in_place" and not options.abort_all_requests
    if keep_running and options.flush_cache and scheduler.running:
        raise WeightSyncError(
            "paused in_place with requests running: their cache cannot be flushed; send flush_cache: false, or"
            " pause with mode retract"
        )
    check_names(model, options.checksum_names)
    engine.forget_computed(options.abort_all_requests)
    load(model, staged)
    same = confirmed(model, staged, options.checksum_names)
    if options.weight_version is not None:
        engine.batcher.weight_version = options.weight_version
    return {name: checksum(model.tensors[name]) for name in options.checksum_names if name not in same}


def load(model: ServedModel, staged: dict[str, torch.Tensor]) -> None:
    """Copy the staged values into the live tensors."""
    with torch.no_grad():
        for name, tensor in staged.items():
            model.tensors[name].copy_(tensor)
    model.refresh()
    wait_for_stream(model.device)  # what was staged may be let go of now


def confirmed(model: ServedModel, staged: dict[str, torch.Tensor], names: list[str]) -> set[str]:
    """Those of `names` whose live tensors are byte for byte what was staged; on a GPU without a copy to the host."""
    equal = {
        name: torch.eq(raw_bytes(model.tensors[name]), raw_bytes(staged[name])).all()
        for name in names
        if name in staged and staged[name].device == model.device
    }
    is_equal = torch.stack(list(equal.values())).tolist() if equal else []  # a GPU is waited for once
    return {name for name, is_same in zip(equal, is_equal, strict=True) if is_same}
