"""Routes that tell what is served and how busy the server is: SGLang's model and server accounts, OpenAI's models, and
Prometheus metrics. Added by routes.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import psutil
from aiohttp import web

from arealite.inference.core.engine import Engine
from arealite.inference.http.bodies import shown
from arealite.inference.http.streaming import Submissions
from arealite.inference.requests import ServedLimits
from arealite.inference.settings import SERVER_VERSION, ServerSettings


def resident_bytes() -> int:
    """This process's memory now."""
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True)
class Introspection:
    """Reads the engine's counters from the event loop; nothing here waits for a step."""

    _engine: Engine
    _settings: ServerSettings
    _limits: ServedLimits
    _submissions: Submissions
    _started_at: float = field(default_factory=time.time)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/model_info", self.model_info),
            web.get("/server_info", self.server_info),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
            web.get("/metrics", self.metrics),
        ]

    async def model_info(self, request: web.Request) -> web.Response:
        model = self._engine.batcher.model
        return web.json_response(
            {
                "model_path": model.path,
                "served_model_name": self._settings.served_model_name,
                "tokenizer_path": model.path if model.tokenizer is None else model.tokenizer.name_or_path,
                "is_generation": True,
                "weight_version": self._engine.batcher.weight_version,
                "model_type": model.config.model_type,
                "architectures": [type(model.module).__name__],
                "dtype": str(model.dtype).removeprefix("torch."),
                "vocab_size": model.vocab_size,
                "context_length": model.context_length,
            }
        )

    async def server_info(self, request: web.Request) -> web.Response:
        batcher = self._engine.batcher
        state = {**vars(batcher.counters), "last_gen_throughput": batcher.counters.tokens_per_s}
        return web.json_response(
            {
                **self._settings.flags,
                "version": SERVER_VERSION,
                **dict.fromkeys(("tp_size", "pp_size", "dp_size", "ep_size"), 1),
                "context_length": self._limits.context_length,
                "max_total_num_tokens": self._limits.kv_cache_tokens,
                "max_req_input_len": self._limits.max_tokens - 1,
                "startup_time": self._started_at,
                "weight_version": batcher.weight_version,
                "paused": self._engine.paused,
                "resident_bytes": resident_bytes(),
                "kv_cache_bytes": batcher.scheduler.pool.tensor.nbytes,
                "internal_states": [{**state, "num_retractions": batcher.scheduler.num_retractions}],
            }
        )

    def _cards(self) -> list[dict[str, Any]]:
        """The model, and its adapters below it."""
        name = self._settings.served_model_name
        card = {
            "id": name,
            "object": "model",
            "created": int(self._started_at),
            "owned_by": "arealite",
            "root": self._engine.batcher.model.path,
            "parent": None,
            "max_model_len": self._limits.context_length,
        }
        adapters = [{**card, "id": adapter, "root": adapter, "parent": name} for adapter in self._limits.adapters]
        return [card, *adapters]

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self._cards()})

    async def model(self, request: web.Request) -> web.Response:
        name, cards = request.match_info["name"], {card["id"]: card for card in self._cards()}
        if name not in cards:
            raise web.HTTPNotFound(reason=f"no model {shown(name)} here; served are {', '.join(cards)}")
        return web.json_response(cards[name])

    async def metrics(self, request: web.Request) -> web.Response:
        """Gauges in Prometheus' text format."""
        batcher = self._engine.batcher
        scheduler, counters = batcher.scheduler, batcher.counters
        num_running, num_waiting, num_used = len(scheduler.running), len(scheduler.waiting), scheduler.num_used_tokens
        num_prompt_tokens = counters.num_cached_tokens + counters.num_prefill_tokens
        num_paused = self._submissions.num_held + (num_running + num_waiting if self._engine.paused else 0)
        gauges = {
            "sglang:num_running_reqs": (num_running, "Requests being decoded."),
            "sglang:num_queue_reqs": (num_waiting, "Requests waiting for a place."),
            "sglang:num_used_tokens": (num_used, "Tokens of the KV cache that are held."),
            "sglang:token_usage": (num_used / self._limits.kv_cache_tokens, "Share of the KV cache that is held."),
            "sglang:gen_throughput": (counters.tokens_per_s if num_running else 0.0, "Generated tokens per second."),
            "sglang:cache_hit_rate": (
                counters.num_cached_tokens / max(1, num_prompt_tokens),
                "Share of prompt tokens found computed.",
            ),
            "sglang:num_paused_reqs": (num_paused, "Requests held or stopped by a pause."),
            "sglang:num_retracted_reqs": (scheduler.num_retractions, "Retractions since the start."),
            "arealite:num_nan_reqs": (counters.num_nan_requests, "Requests ended by logits that were not finite."),
            "arealite:kv_cache_bytes": (scheduler.pool.tensor.nbytes, "Size of the KV cache."),
            "process_resident_memory_bytes": (resident_bytes(), "Resident memory."),
        }
        quoted = self._settings.served_model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        lines = [
            f'# HELP {name} {text}\n# TYPE {name} gauge\n{name}{{model_name="{quoted}"}} {float(value)}\n'
            for name, (value, text) in gauges.items()
        ]
        return web.Response(text="".join(lines), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
