"""How one inference server is started: command and environment by backend. Pure; called by plan.py.

A server's own flags (`server.args`) come last and replace those chosen here; false takes a flag away.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ConfigError
from arealite.api.types import VLLM_WORKER_EXTENSION
from arealite.launcher.allocation import Component
from arealite.launcher.machine import Machine
from arealite.launcher.memory_estimate import RUNNING_REQUESTS, ModelShape, kv_cache_bytes
from arealite.models.fetch import resolve_model

PORT = "{port}"
HOST = "127.0.0.1"
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
UNKNOWN_KV_CACHE_BYTES = 2 << 30  # for a model that is not a folder on this machine
# How each backend calls what all of them are given.
MODULES = {
    "native": "arealite.inference.serve",
    "sglang": "sglang.launch_server",
    "vllm": "vllm.entrypoints.openai.api_server",
}
COMMON = ("model", "seed", "context_length", "max_running_requests", "tokenizer_path")
NAMES = {
    "native": COMMON,
    "sglang": ("model_path", "random_seed", *COMMON[2:]),
    "vllm": ("model", "seed", "max_model_len", "max_num_seqs", "tokenizer"),
}


def check_vllm(config: GRPOConfig, machine: Machine) -> None:
    """Raises ConfigError for what vLLM servers cannot do, or when there is no vLLM."""
    if not machine.vllm_python:
        raise ConfigError(
            "allocation_mode: no vLLM was found on this machine: `make vllm-cpu` builds one for CPUs; otherwise set"
            " AREALITE_VLLM_PYTHON to the Python interpreter of an environment that has vLLM"
        )
    g = config.gconfig
    if g.top_p < 1 or g.top_k > 0 or g.min_p > 0:
        raise ConfigError(
            "vLLM's logprobs are those after top_p, top_k and min_p, and the trainer's those of the full vocabulary:"
            " set gconfig.top_p=1 gconfig.top_k=-1 gconfig.min_p=0, or use another inference backend"
        )
    if config.server.deterministic and not machine.gpus:
        raise ConfigError("server.deterministic is true, which vLLM cannot do on CPUs: leave it out, or use native")


def server_command(config: GRPOConfig, rollout: Component, model: str, machine: Machine) -> tuple[str, ...]:
    """The words that start one server; PORT stands for its port."""
    server, dims, lora, backend = config.server, rollout.dims, config.actor.lora, rollout.backend
    running = server.max_running_requests or (None if machine.gpus else RUNNING_REQUESTS)  # on GPUs the server's own
    has_tokenizer = config.tokenizer_path not in (None, config.actor.path)
    tokenizer = resolve_model(str(config.tokenizer_path), asks_hub=False) if has_tokenizer else None
    values = (model, config.seed, server.context_length, running, tokenizer)
    options: dict[str, Any] = {"host": HOST, "port": PORT, "dtype": server.dtype}
    options |= dict(zip(NAMES[backend], values, strict=True))
    if backend == "native":
        options |= {"kv_cache_tokens": server.kv_cache_tokens}
        options |= {"weight_version": "0", "deterministic": server.deterministic}
    elif backend == "sglang":
        options |= {"max_total_tokens": server.kv_cache_tokens, "tp_size": dims.t, "pp_size": dims.p, "ep_size": dims.e}
        options |= {"enable_deterministic_inference": server.deterministic}
        if lora is not None:
            options |= {"enable_lora": True, "max_lora_rank": lora.rank, "lora_target_modules": lora.target_modules}
    else:
        options |= {"tensor_parallel_size": dims.t, "logprobs_mode": "processed_logprobs", "enable_scale_out": True}
        options |= {"worker_extension_cls": VLLM_WORKER_EXTENSION}
        options |= {"enforce_eager": not machine.gpus}  # compiling for the CPU takes a minute at each start
        if not machine.gpus or server.kv_cache_tokens:  # else it takes what is left of gpu_memory_utilization
            shape = ModelShape.read(model)
            num_bytes = UNKNOWN_KV_CACHE_BYTES if shape is None else kv_cache_bytes(config, shape)
            options |= {"kv_cache_memory_bytes": num_bytes}
        if lora is not None:
            max_rank = next((rank for rank in VLLM_LORA_RANKS if rank >= lora.rank), lora.rank)
            options |= {"enable_lora": True, "max_lora_rank": max_rank}
    python = machine.vllm_python if backend == "vllm" else sys.executable
    own = {key.lstrip("-").replace("-", "_"): value for key, value in server.args.items()}
    return (python, "-m", MODULES[backend], *flags({**options, **own}))


def server_env(config: GRPOConfig, rollout: Component, cores: tuple[int, ...], machine: Machine) -> dict[str, str]:
    """Environment variables of one server, beside those of every process of the run."""
    if rollout.backend == "sglang":
        # Its /health generates a token, which waits while generation is paused: the server would look dead then.
        return {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    if rollout.backend != "vllm":
        return {}
    env = {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause generation and update weights
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": HOST,
    }
    checkout = Path(__file__).parents[2]
    if machine.vllm_python != sys.executable and checkout.name != "site-packages":
        env["PYTHONPATH"] = str(checkout)  # its workers run arealite/weights/vllm_worker.py
    if machine.gpus:
        return env | ({"VLLM_BATCH_INVARIANT": "1"} if config.server.deterministic else {})
    pinned = ",".join(map(str, cores)) if config.launcher.pin_cores else "nobind"
    return {**env, "VLLM_CPU_OMP_THREADS_BIND": pinned}


def flags(args: Mapping[str, Any]) -> list[str]:
    """A server's own flags: `{mem_fraction_static: 0.8, trust_remote_code: true}` as --key value and --key."""
    words: list[str] = []
    for key, value in args.items():
        if value is None or value is False:
            continue
        words.append("--" + key.lstrip("-").replace("_", "-"))
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words
