"""Routes that change what is served: weights, versions, caches (SGLang's control endpoints). Added by routes.py."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from arealite.api.errors import RequestError
from arealite.api.types import TensorSlot, WeightUpdateMeta
from arealite.inference import receiver
from arealite.inference.engine import Engine
from arealite.inference.http_errors import (
    failed_control,
    flag_field,
    names_field,
    read_object,
    string_field,
)


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
        path = string_field(body, "model_path")
        if not path:
            raise RequestError("model_path: expected the path of a Hugging Face folder")
        return await self._update(body, WeightUpdateMeta("disk", 0, path))

    async def update_from_shm(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        path = string_field(body, "path")
        if not path:
            raise RequestError("path: expected the path of the file to be mapped")
        return await self._update(body, WeightUpdateMeta("shm", 0, path, slots=_slots(body.get("slots"))))

    async def _update(self, body: dict[str, Any], meta: WeightUpdateMeta) -> web.Response:
        """Body keys of both kinds: weight_version, flush_cache, abort_all_requests, partial, checksum_names."""
        version = string_field(body, "weight_version")
        flush = flag_field(body, "flush_cache", True)
        abort_all = flag_field(body, "abort_all_requests", False)
        partial = flag_field(body, "partial", False)
        names = names_field(body, "checksum_names")
        update = self._engine.call(lambda: self._engine.update_weights(meta, version, flush, abort_all, partial, names))
        checksums = await asyncio.wrap_future(update)
        return web.json_response({"success": True, "message": "", "checksums": checksums})

    async def update_version(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        version = string_field(body, "new_version")
        if version is None:
            raise RequestError("new_version: expected a string, found nothing")
        abort_all = flag_field(body, "abort_all_requests", True)
        await asyncio.wrap_future(self._engine.call(lambda: self._engine.set_weight_version(version, abort_all)))
        return web.json_response({"success": True, "message": "", "new_version": version})

    async def accept(self, request: web.Request) -> web.Response:
        """Updates are taken inside and outside of a session, so its begin and end change nothing."""
        return web.json_response({"success": True, "message": ""})

    async def check_weights(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        if body.get("action") != "checksum":
            return failed_control(f"action: expected checksum, found {str(body.get('action'))[:60]!r}")
        names = names_field(body, "names")
        model = self._engine.batcher.model

        def compute() -> dict[str, int]:
            receiver.check_names(model, names)
            return receiver.checksums(model, names or list(model.live_tensors()))

        checksums = await asyncio.wrap_future(self._engine.call(compute))
        return web.json_response({"success": True, "message": "", "checksums": checksums})

    async def flush_cache(self, request: web.Request) -> web.Response:
        if await asyncio.wrap_future(self._engine.call(self._engine.flush_cache)):
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Not flushed: requests are running. Pause with mode retract or abort.\n", status=400)

    async def answer_null(self, request: web.Request) -> web.Response:
        return web.json_response(None)


def _slots(value: Any) -> tuple[TensorSlot, ...]:
    """The layout of a shared-memory update; dtypes, sizes and names are judged by the receiver."""
    if not isinstance(value, list) or not value:
        raise RequestError("slots: expected a list of {name, dtype, shape, offset, nbytes}")
    slots = []
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise RequestError(f"slots[{i}]: expected an object, found a {type(entry).__name__}")
        shape = entry.get("shape")
        strings = [entry.get("name"), entry.get("dtype")]
        numbers = [entry.get("offset"), entry.get("nbytes"), *(shape if isinstance(shape, list) else [None])]
        if not all(isinstance(s, str) for s in strings) or not all(type(n) is int for n in numbers):
            raise RequestError(f"slots[{i}]: expected name and dtype (strings), shape (integers), offset and nbytes")
        slots.append(TensorSlot(entry["name"], entry["dtype"], tuple(entry["shape"]), entry["offset"], entry["nbytes"]))
    return tuple(slots)
