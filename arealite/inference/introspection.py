"""Routes that tell what is served and how busy the server is: SGLang's model, server and load accounts, Prometheus
metrics, and the tokenizer. Added by routes.py.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from arealite.api.errors import RequestError
from arealite.inference import strict
from arealite.inference.bodies import field, integer, of_type, read_object, shown
from arealite.inference.core.engine import Engine
from arealite.inference.requests import ServedLimits
from arealite.inference.settings import SERVER_VERSION, ServerSettings
from arealite.inference.streaming import Submissions


def resident_bytes() -> int:
    """This process's memory now (its peak, where the system does not tell)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Introspection:
    """Reads the engine's counters from the event loop; nothing here waits for a step."""

    def __init__(
        self, engine: Engine, settings: ServerSettings, limits: ServedLimits, submissions: Submissions
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._limits = limits
        self._submissions = submissions
        self._started_at = time.time()
        self._version = strict.VERSION if settings.strict_sglang else SERVER_VERSION

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/model_info", self.model_info),
            web.get("/get_model_info", self.model_info),
            web.get("/server_info", self.server_info),
            web.get("/get_server_info", self.server_info),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
            web.get("/v1/loads", self.loads),
            web.get("/metrics", self.metrics),
            web.post("/tokenize", self.tokenize),
            web.post("/v1/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
            web.post("/v1/detokenize", self.detokenize),
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
                "version": self._version,
                "tp_size": 1,
                "pp_size": 1,
                "dp_size": 1,
                "ep_size": 1,
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
            "owned_by": "sglang" if self._settings.strict_sglang else "arealite",
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

    def _load(self) -> dict[str, Any]:
        scheduler, counters = self._engine.batcher.scheduler, self._engine.batcher.counters
        used, total = scheduler.num_used_tokens, self._limits.kv_cache_tokens
        seen = counters.num_cached_tokens + counters.num_prefill_tokens
        return {
            "dp_rank": 0,
            "num_running_reqs": len(scheduler.running),
            "num_waiting_reqs": len(scheduler.waiting),
            "num_used_tokens": used,
            "num_total_tokens": used + sum(len(s.tokens) for s in list(scheduler.waiting)),
            "max_total_num_tokens": total,
            "max_running_requests": scheduler.max_running,
            "token_usage": used / total,
            "gen_throughput": counters.tokens_per_s if scheduler.running else 0.0,
            "cache_hit_rate": counters.num_cached_tokens / seen if seen else 0.0,
            "utilization": len(scheduler.running) / scheduler.max_running,
            "num_nan_reqs": counters.num_nan_requests,
        }

    async def loads(self, request: web.Request) -> web.Response:
        return web.json_response({"timestamp": time.time(), "version": self._version, "loads": [self._load()]})

    async def metrics(self, request: web.Request) -> web.Response:
        """Gauges in Prometheus' text format."""
        load, scheduler = self._load(), self._engine.batcher.scheduler
        in_flight = load["num_running_reqs"] + load["num_waiting_reqs"]
        gauges = {
            "sglang:num_running_reqs": (load["num_running_reqs"], "Requests being decoded."),
            "sglang:num_queue_reqs": (load["num_waiting_reqs"], "Requests waiting for a place."),
            "sglang:num_used_tokens": (load["num_used_tokens"], "Tokens of the KV cache that are held."),
            "sglang:token_usage": (load["token_usage"], "Share of the KV cache that is held."),
            "sglang:gen_throughput": (load["gen_throughput"], "Generated tokens per second."),
            "sglang:cache_hit_rate": (load["cache_hit_rate"], "Share of prompt tokens found computed."),
            "sglang:num_paused_reqs": (
                self._submissions.num_held + (in_flight if self._engine.paused else 0),
                "Requests held or stopped by a pause.",
            ),
            "sglang:num_retracted_reqs": (scheduler.num_retractions, "Retractions since the start."),
            "arealite:kv_cache_bytes": (scheduler.pool.tensor.nbytes, "Size of the KV cache."),
            "process_resident_memory_bytes": (resident_bytes(), "Resident memory."),
        }
        quoted = self._settings.served_model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        lines = [
            f'# HELP {name} {text}\n# TYPE {name} gauge\n{name}{{model_name="{quoted}"}} {float(value)}\n'
            for name, (value, text) in gauges.items()
        ]
        return web.Response(text="".join(lines), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        if self._limits.encode is None:
            raise RequestError("prompt: the served model folder has no tokenizer")
        prompt = body.get("prompt")
        texts = prompt if isinstance(prompt, list) else [prompt]
        encode, special = self._limits.encode, field(body, "add_special_tokens", bool, True)
        tokens = [encode(of_type("prompt", text, str), special) for text in texts]
        counts = [len(ids) for ids in tokens]
        batched = isinstance(prompt, list)
        return web.json_response(
            {
                "tokens": tokens if batched else tokens[0],
                "count": counts if batched else counts[0],
                "max_model_len": self._limits.context_length,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        tokenizer = self._engine.batcher.model.tokenizer
        if tokenizer is None:
            raise RequestError("tokens: the served model folder has no tokenizer")
        tokens = field(body, "tokens", list, [])
        batched = bool(tokens) and isinstance(tokens[0], list)
        skip = field(body, "skip_special_tokens", bool, True)
        texts = []
        for ids in tokens if batched else [tokens]:
            for token in of_type("tokens", ids, list):
                integer("tokens", token, 0, self._limits.vocab_size - 1)
            texts.append(str(tokenizer.decode(ids, skip_special_tokens=skip)))
        return web.json_response({"text": texts if batched else texts[0]})
