"""Routes that load and unload LoRA adapters, as SGLang words them. Added by routes.py."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiohttp import web

from arealite.api.errors import ArealiteError
from arealite.inference.bodies import field, of_type, read_object
from arealite.inference.core.adapters import Adapter, read_adapter
from arealite.inference.core.engine import Engine
from arealite.observe import waits

LOAD_LIMIT_S = 300.0
UNLOAD_LIMIT_S = 600.0  # for the requests that use it to end
POLL_S = 0.05


class AdapterRoutes:
    """`names` of the model's adapters belongs to them; what is served is changed by the engine thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._adapters = engine.batcher.model.adapters

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/load_lora_adapter", self.load), web.post("/unload_lora_adapter", self.unload)]

    async def load(self, request: web.Request) -> web.Response:
        """`load_inplace`: it becomes the adapter of this name between two tokens, also for the requests that run; the
        weights have `weight_version` then, and the answer has the adapter's checksums."""
        body = await read_object(request)
        name, path = (of_type(key, body.get(key), str) for key in ("lora_name", "lora_path"))
        in_place, version = field(body, "load_inplace", bool, False), field(body, "weight_version", str, None)

        def prepare() -> tuple[Adapter, dict[str, int]]:
            adapter = read_adapter(self._adapters.module, path)
            return adapter, adapter.checksums() if in_place else {}

        try:
            adapter, checksums = await waits.in_thread(prepare, f"adapter {name}", "client", LOAD_LIMIT_S)
            if in_place:
                await self._engine.ask("adapter update", lambda: self._engine.replace_adapter(name, adapter, version))
            else:
                await self._engine.ask("load adapter", lambda: self._adapters.add(name, adapter))
        except ArealiteError as error:
            return self._answer(str(error))
        self._adapters.names[name] = path
        return self._answer("", **({"checksums": checksums} if in_place else {}))

    async def unload(self, request: web.Request) -> web.Response:
        """New requests are refused at once; answered when those that use it have ended."""
        body = await read_object(request)
        name = of_type("lora_name", body.get("lora_name"), str)
        if self._adapters.names.pop(name, None) is None and self._adapters.lacks(name):
            return self._answer(f"lora_name: no adapter named {name!r} is loaded")
        deadline = time.monotonic() + UNLOAD_LIMIT_S
        while not await self._engine.ask("unload adapter", lambda: self._engine.remove_adapter(name)):
            if time.monotonic() > deadline:
                return self._answer(f"requests still use {name!r} after {UNLOAD_LIMIT_S:g} s")
            await asyncio.sleep(POLL_S)
        return self._answer("")

    def _answer(self, error: str, **more_fields: Any) -> web.Response:
        body = {"rid": None, "http_worker_ipc": None, "success": not error, "error_message": error}
        more = {"error": {"message": error}, "message": error} if error else {}
        return web.json_response(
            {**body, **more, **more_fields, "loaded_adapters": self._adapters.names}, status=400 if error else 200
        )
