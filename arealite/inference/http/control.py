"""Routes that change what is served: weights, versions, caches, adapters (SGLang's control endpoints), each change made
by the engine thread between two steps. Added by routes.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

from aiohttp import web
from pydantic import Field, NonNegativeInt

from arealite.api.errors import RequestError
from arealite.api.types import GroupPlace, TensorSlot, WeightUpdateMeta
from arealite.inference.core.adapters import Adapter, read_adapter
from arealite.inference.core.engine import Engine
from arealite.inference.core.requests import Body, UpdateOptions
from arealite.inference.core.weight_updates import Groups, NamedTensors, Updates, check_slots, layout
from arealite.inference.http.bodies import read_body
from arealite.observe import waits
from arealite.weights.wire import iterate_tensors

DEFAULT_GROUP = "weight_update_group"
MAX_RECEIVED = 4  # times the model's bytes: more in one call is a mistake, for which no memory is taken
LOAD_LIMIT_S = 300.0  # of an adapter's files
UNLOAD_LIMIT_S = 600.0  # for the requests that use an adapter to end
POLL_S = 0.05

B = TypeVar("B", bound=Body)
Size = Annotated[int, Field(ge=0, le=1 << 40)]  # what torch can take, whatever the others are
Port = Annotated[int, Field(strict=False, ge=0, le=65535)]  # which clients also send as a string


class DiskBody(UpdateOptions):
    model_path: str
    partial: bool = False


class SlotBody(Body):
    """One tensor of a shared-memory update; whether it fits the model is judged by `check_slots`."""

    name: str
    dtype: str
    shape: list[NonNegativeInt]
    offset: NonNegativeInt
    nbytes: NonNegativeInt

    def slot(self) -> TensorSlot:
        return TensorSlot(self.name, self.dtype, tuple(self.shape), self.offset, self.nbytes)


class ShmBody(UpdateOptions):
    path: str
    slots: list[SlotBody]
    partial: bool = False


class BroadcastBody(UpdateOptions):
    """`load_format`: how the tensors come; else one by one."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[Size]]
    group_name: str = DEFAULT_GROUP
    load_format: Literal["direct", "flattened_bucket"] = "direct"


class EndBody(UpdateOptions):
    flush_cache: bool = False


class VersionBody(Body):
    new_version: str
    abort_all_requests: bool = True


class GroupBody(Body):
    master_address: str
    master_port: Port
    rank_offset: Port
    world_size: Port
    group_name: str = DEFAULT_GROUP
    backend: str = "nccl"


class MemoryBody(Body):
    tags: list[str] = Field(default=["kv_cache"])


class UnloadBody(Body):
    lora_name: str


class LoadBody(UnloadBody):
    """In place: it becomes the adapter of this name between two tokens, also for the requests that run, and the weights
    have `weight_version` then; the answer has the adapter's checksums."""

    lora_path: str
    load_inplace: bool = False
    weight_version: str | None = None


class ControlRoutes:
    """Handlers over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._model = engine.batcher.model
        self._max_bytes = MAX_RECEIVED * sum(self._model.tensors[name].nbytes for name in self._model.tensor_names)
        self._updates = Updates(engine)
        self._groups = Groups(self._model.device)

    def routes(self) -> list[web.RouteDef]:
        return [
            _post("/update_weights_from_disk", DiskBody, self.update_from_disk),
            _post("/update_weights_from_shm", ShmBody, self.update_from_shm),
            _post("/init_weights_update_group", GroupBody, self.join_group),
            _post("/update_weights_from_distributed", BroadcastBody, self.update_from_group),
            _post("/begin_weight_update", Body, self.begin),
            _post("/end_weight_update", EndBody, self.end),
            _post("/update_weight_version", VersionBody, self.update_version),
            _post("/release_memory_occupation", MemoryBody, self.release_memory),
            _post("/resume_memory_occupation", MemoryBody, self.resume_memory),
            _post("/load_lora_adapter", LoadBody, self.load_adapter),
            _post("/unload_lora_adapter", UnloadBody, self.unload_adapter),
            web.get("/flush_cache", self.flush_cache),
            web.post("/flush_cache", self.flush_cache),
        ]

    async def update_from_disk(self, body: DiskBody) -> dict[str, Any]:
        folder = WeightUpdateMeta("disk", 0, body.model_path)
        return await self._take(lambda: iterate_tensors(folder), body, needs_all=not body.partial)

    async def update_from_shm(self, body: ShmBody) -> dict[str, Any]:
        slots = tuple(slot.slot() for slot in body.slots)
        segment = WeightUpdateMeta("shm", 0, body.path, slots)
        check_slots(self._model, slots)
        return await self._take(lambda: iterate_tensors(segment), body, castable=False, needs_all=not body.partial)

    async def join_group(self, body: GroupBody) -> dict[str, Any]:
        """Answered once all members have joined."""
        address = body.master_address.strip("[]")
        place = GroupPlace(address, body.master_port, body.world_size, body.group_name, body.backend)
        await self._groups.join(place, body.rank_offset)
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    async def update_from_group(self, body: BroadcastBody) -> dict[str, Any]:
        slots = layout(body.names, body.dtypes, body.shapes, self._max_bytes)
        is_flat = body.load_format == "flattened_bucket"
        return await self._take(lambda: self._groups.receive(body.group_name, slots, is_flat), body)

    async def _take(self, read: Callable[[], NamedTensors], body: UpdateOptions, **how: bool) -> dict[str, Any]:
        return {"success": True, "message": "", "checksums": await self._updates.take(read, body, **how)}

    async def begin(self, _: Body) -> dict[str, Any]:
        await self._updates.begin()
        return {"success": True, "message": ""}

    async def end(self, body: EndBody) -> dict[str, Any]:
        return {"success": True, "message": "", "checksums": await self._updates.end(body)}

    async def update_version(self, body: VersionBody) -> dict[str, Any]:
        def change() -> None:
            self._engine.set_weight_version(body.new_version, body.abort_all_requests)

        await self._engine.ask("update_weight_version", change)
        return {"success": True, "message": "", "new_version": body.new_version}

    async def release_memory(self, body: MemoryBody) -> None:
        """Of the KV cache, the one part that can do without; SGLang's `tags` name parts, and none of them all."""
        if "kv_cache" in body.tags:
            await self._engine.ask("KV cache memory", self._engine.release_memory)

    async def resume_memory(self, body: MemoryBody) -> None:
        if "kv_cache" in body.tags:
            await self._engine.ask("KV cache memory", self._engine.resume_memory)

    async def flush_cache(self, request: web.Request) -> web.Response:
        if await self._engine.ask("flush_cache", self._engine.flush_cache):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Not flushed: requests are running. Pause with mode retract or abort.\n", status=400)

    async def load_adapter(self, body: LoadBody) -> dict[str, Any]:
        adapters, name = self._model.adapters, body.lora_name

        def prepare() -> tuple[Adapter, dict[str, int]]:
            adapter = read_adapter(adapters.module, body.lora_path)
            return adapter, adapter.checksums() if body.load_inplace else {}

        adapter, checksums = await waits.in_thread(prepare, f"adapter {name}", "client", LOAD_LIMIT_S)
        if body.load_inplace:
            version = body.weight_version
            await self._engine.ask("adapter update", lambda: self._engine.replace_adapter(name, adapter, version))
        else:
            await self._engine.ask("load adapter", lambda: adapters.add(name, adapter))
        adapters.names[name] = body.lora_path
        return {**self._adapters_now(), **({"checksums": checksums} if body.load_inplace else {})}

    async def unload_adapter(self, body: UnloadBody) -> dict[str, Any]:
        """New requests are refused at once; answered when those that use it have ended."""
        adapters, name = self._model.adapters, body.lora_name
        if adapters.names.pop(name, None) is None and adapters.lacks(name):
            raise RequestError(f"lora_name: no adapter named {name!r} is loaded")

        deadline = time.monotonic() + UNLOAD_LIMIT_S
        while not await self._engine.ask("unload adapter", lambda: self._engine.remove_adapter(name)):
            if time.monotonic() > deadline:
                raise RequestError(f"requests still use {name!r} after {UNLOAD_LIMIT_S:g} s")
            await asyncio.sleep(POLL_S)
        return self._adapters_now()

    def _adapters_now(self) -> dict[str, Any]:
        return {"success": True, "error_message": "", "loaded_adapters": self._model.adapters.names}


def _post(path: str, kind: type[B], change: Callable[[B], Awaitable[Any]]) -> web.RouteDef:
    """A route that hands over its checked body, and answers with what comes back, as JSON."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(await change(await read_body(request, kind)))

    return web.post(path, answer)
