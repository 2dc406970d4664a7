"""Routes that change what is served: weights, versions, caches (SGLang's control endpoints). Added by routes.py."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from arealite.api.errors import RequestError
from arealite.api.types import TensorSlot, WeightUpdateMeta
from arealite.inference import receiver
from arealite.inference.bodies import field, integer, of_type, read_object, shown, strings
from arealite.inference.engine import Engine, UpdateOptions


class ControlRoutes:
    """Handlers over one engine; every change runs on the engine thread between two steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/update_weights_from_disk", self.update_from_disk),
            web.post("/update_weights_from_shm", self.update_from_shm),
            web.post("/update_weight_version", self.update_version),
            web.post("/begin_weight_update", self.accept),
            web.post("/end_weight_update", self.accept),
            web.post("/weights_checker", self.check_weights),
            web.get("/flush_cache", self.flush_cache),
            web.post("/flush_cache", self.flush_cache),
            web.post("/release_memory_occupation", self.answer_null),
            web.post("/resume_memory_occupation", self.answer_null),
        ]

    async def update_from_disk(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        path = of_type("model_path", body.get("model_path"), str)
        return await self._update(body, WeightUpdateMeta("disk", 0, path))

    async def update_from_shm(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        path = of_type("path", body.get("path"), str)
        return await self._update(body, WeightUpdateMeta("shm", 0, path, _slots(body.get("slots"))))

    async def _update(self, body: dict[str, Any], meta: WeightUpdateMeta) -> web.Response:
        options = UpdateOptions(
            weight_version=field(body, "weight_version", str, None),
            flush_cache=field(body, "flush_cache", bool, True),
            abort_all_requests=field(body, "abort_all_requests", bool, False),
            partial=field(body, "partial", bool, False),
            checksum_names=strings("checksum_names", field(body, "checksum_names", list, [])),
        )
        checksums = await self._engine.ask("weight update", lambda: self._engine.update_weights(meta, options))
        return web.json_response({"success": True, "message": "", "checksums": checksums})

    async def update_version(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        version = of_type("new_version", body.get("new_version"), str)
        abort_all = field(body, "abort_all_requests", bool, True)
        await self._engine.ask("update_weight_version", lambda: self._engine.set_weight_version(version, abort_all))
        return web.json_response({"success": True, "message": "", "new_version": version})

    async def accept(self, request: web.Request) -> web.Response:
        """Updates are taken inside and outside of a session, so its begin and end change nothing."""
        return web.json_response({"success": True, "message": ""})

    async def check_weights(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        if body.get("action") != "checksum":
            raise RequestError(f"action: expected checksum, found {shown(body.get('action'))}")
        model = self._engine.batcher.model
        names = strings("names", field(body, "names", list, [])) or model.tensor_names
        checksums = await self._engine.ask("weights_checker", lambda: receiver.checksums(model, names))
        return web.json_response({"success": True, "message": "", "checksums": checksums})

    async def flush_cache(self, request: web.Request) -> web.Response:
        if await self._engine.ask("flush_cache", self._engine.flush_cache):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Not flushed: requests are running. Pause with mode retract or abort.\n", status=400)

    async def answer_null(self, request: web.Request) -> web.Response:
        return web.json_response(None)


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
