"""Routes that change what is served: weights, versions, caches (SGLang's control endpoints). Added by routes.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from arealite.api.errors import RequestError, WeightSyncError
from arealite.api.types import GroupPlace, TensorSlot, WeightUpdateMeta
from arealite.inference.bodies import field, integer, of_type, read_object, shown, strings
from arealite.inference.core import receiver
from arealite.inference.core.engine import Engine, UpdateOptions
from arealite.inference.core.receiver import Groups, NamedTensors, layout
from arealite.inference.core.weight_updates import Updates
from arealite.inference.pickles import load_format, tensor_reader
from arealite.weights.receive import iterate_tensors

DEFAULT_GROUP = "weight_update_group"
MAX_RECEIVED = 4  # times the model's bytes: more in one call is a mistake, for which no memory is taken
MAX_SHOWN = 100  # rows of a tensor that /get_weights_by_name gives when not told


class ControlRoutes:
    """Handlers over one engine; every change is made by the engine thread between two steps."""

    def __init__(self, engine: Engine, needs_session: bool = False) -> None:
        """`needs_session`: tensors are taken between begin_weight_update and end_weight_update only, as SGLang does."""
        self._engine = engine
        self._needs_session = needs_session
        model = engine.batcher.model
        self._max_bytes = MAX_RECEIVED * sum(model.tensors[name].nbytes for name in model.tensor_names)
        self._updates = Updates(engine)
        self._groups = Groups(model.device)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/update_weights_from_disk", self.update_from_disk),
            web.post("/update_weights_from_shm", self.update_from_shm),
            web.post("/init_weights_update_group", self.join_group),
            web.post("/destroy_weights_update_group", self.leave_group),
            web.post("/update_weights_from_distributed", self.update_from_group),
            web.post("/update_weights_from_tensor", self.update_from_tensor),
            web.post("/update_weight_version", self.update_version),
            web.post("/begin_weight_update", self.begin),
            web.post("/end_weight_update", self.end),
            web.post("/weights_checker", self.check_weights),
            web.get("/get_weights_by_name", self.weights_by_name),
            web.post("/get_weights_by_name", self.weights_by_name),
            web.get("/flush_cache", self.flush_cache),
            web.post("/flush_cache", self.flush_cache),
            web.post("/release_memory_occupation", self.release_memory),
            web.post("/resume_memory_occupation", self.resume_memory),
        ]

    # -- weights -------------------------------------------------------------------------------------------------

    async def update_from_disk(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        folder = WeightUpdateMeta("disk", 0, of_type("model_path", body.get("model_path"), str))
        needs_all = not field(body, "partial", bool, False)
        return await self._take(body, lambda: iterate_tensors(folder), needs_all=needs_all)

    async def update_from_shm(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        slots = _slots(body.get("slots"))
        segment = WeightUpdateMeta("shm", 0, of_type("path", body.get("path"), str), slots)
        receiver.check_slots(self._engine.batcher.model, slots)
        needs_all = not field(body, "partial", bool, False)
        return await self._take(body, lambda: iterate_tensors(segment), castable=False, needs_all=needs_all)

    async def join_group(self, request: web.Request) -> web.Response:
        """Answered once all members have joined."""
        body = await read_object(request)
        port, world_size = (_number(key, body.get(key)) for key in ("master_port", "world_size"))
        address = of_type("master_address", body.get("master_address"), str).strip("[]")
        name, backend = field(body, "group_name", str, DEFAULT_GROUP), field(body, "backend", str, "nccl")
        rank = _number("rank_offset", body.get("rank_offset"))
        await self._groups.join(GroupPlace(address, port, world_size, name, backend), rank)
        return web.json_response({"success": True, "message": "Succeeded to initialize custom process group."})

    async def leave_group(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        if not self._groups.leave(field(body, "group_name", str, DEFAULT_GROUP)):
            raise WeightSyncError("The group to be destroyed does not exist.")
        return web.json_response({"success": True, "message": "Succeeded to destroy custom process group."})

    async def update_from_group(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        self._check_session()
        names, dtypes = (strings(key, body.get(key)) for key in ("names", "dtypes"))
        shapes = [
            [integer(f"shapes[{i}]", size, 0, self._max_bytes) for size in of_type(f"shapes[{i}]", shape, list)]
            for i, shape in enumerate(of_type("shapes", body.get("shapes"), list))
        ]
        group, is_flat = field(body, "group_name", str, DEFAULT_GROUP), load_format(body) == "flattened_bucket"
        slots = layout(names, dtypes, shapes, self._max_bytes)
        return await self._take(body, lambda: self._groups.receive(group, slots, is_flat))

    async def update_from_tensor(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        self._check_session()
        return await self._take(body, tensor_reader(body))

    async def _take(
        self, body: dict[str, Any], read: Callable[[], NamedTensors], castable: bool = True, needs_all: bool = False
    ) -> web.Response:
        checksums = await self._updates.take(read, _options(body), castable, needs_all)
        return web.json_response({"success": True, "message": "", "checksums": checksums})

    async def begin(self, request: web.Request) -> web.Response:
        await read_object(request)
        if self._needs_session and self._updates.in_session:
            raise WeightSyncError("a weight update session is open already; call /end_weight_update first")
        await self._updates.begin()
        return web.json_response({"success": True, "message": ""})

    async def end(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        self._check_session()
        checksums = await self._updates.end(_options(body, flushes=False))
        return web.json_response({"success": True, "message": "", "checksums": checksums})

    def _check_session(self) -> None:
        if self._needs_session and not self._updates.in_session:
            raise WeightSyncError("No weight update session is open; call /begin_weight_update first")

    async def update_version(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        version = of_type("new_version", body.get("new_version"), str)
        abort_all = field(body, "abort_all_requests", bool, True)
        await self._engine.ask("update_weight_version", lambda: self._engine.set_weight_version(version, abort_all))
        return web.json_response({"success": True, "message": "", "new_version": version})

    async def check_weights(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        if body.get("action") != "checksum":
            raise RequestError(f"action: expected checksum, found {shown(body.get('action'))}")
        model = self._engine.batcher.model
        names = strings("names", field(body, "names", list, [])) or model.tensor_names
        checksums = await self._engine.ask("weights_checker", lambda: receiver.checksums(model, names))
        return web.json_response({"success": True, "message": "", "checksums": checksums})

    async def weights_by_name(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        name = of_type("name", body.get("name"), str)
        count = integer("truncate_size", body.get("truncate_size", MAX_SHOWN), 0)
        model = self._engine.batcher.model

        def read() -> Any:
            receiver.check_names(model, [name])
            tensor = model.tensors[name]
            return (tensor[:count] if tensor.dim() else tensor).float().tolist()

        return web.json_response(await self._engine.ask("get_weights_by_name", read))

    async def flush_cache(self, request: web.Request) -> web.Response:
        if await self._engine.ask("flush_cache", self._engine.flush_cache):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Not flushed: requests are running. Pause with mode retract or abort.\n", status=400)

    async def release_memory(self, request: web.Request) -> web.Response:
        return await self._change_memory(request, self._engine.release_memory)

    async def resume_memory(self, request: web.Request) -> web.Response:
        return await self._change_memory(request, self._engine.resume_memory)

    async def _change_memory(self, request: web.Request, change: Callable[[], None]) -> web.Response:
        """Of the KV cache, the one part that can do without; SGLang's `tags` name parts, and none of them all."""
        tags = field(await read_object(request), "tags", list, None)
        if tags is None or "kv_cache" in strings("tags", tags):
            await self._engine.ask("KV cache memory", change)
        return web.json_response(None)


def _options(body: dict[str, Any], flushes: bool = True) -> UpdateOptions:
    return UpdateOptions(
        weight_version=field(body, "weight_version", str, None),
        flush_cache=field(body, "flush_cache", bool, flushes),
        abort_all_requests=field(body, "abort_all_requests", bool, False),
        checksum_names=strings("checksum_names", field(body, "checksum_names", list, [])),
    )


def _number(name: str, value: Any) -> int:
    """An integer, which clients also send as a string."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    return integer(name, value, 0, 65535)


def _slots(value: Any) -> tuple[TensorSlot, ...]:
    """The layout of a shared-memory update; whether it fits the model is judged by the receiver."""
    slots = []
    for i, entry in enumerate(of_type("slots", value, list)):
        slot = of_type(f"slots[{i}]", entry, dict)
        name, dtype = (of_type(f"slots[{i}].{key}", slot.get(key), str) for key in ("name", "dtype"))
        shape = [
            integer(f"slots[{i}].shape", size, 0) for size in of_type(f"slots[{i}].shape", slot.get("shape"), list)
        ]
        offset, nbytes = (integer(f"slots[{i}].{key}", slot.get(key), 0) for key in ("offset", "nbytes"))
        slots.append(TensorSlot(name, dtype, tuple(shape), offset, nbytes))
    return tuple(slots)
