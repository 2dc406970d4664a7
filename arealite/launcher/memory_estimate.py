"""How much memory each process of a run will take, estimated from the model's sizes (models/rank_memory.py)
and the run's data. Called by check.py and servers.py; every part carries the assumption behind it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

from arealite.api.cli_args import GRPOConfig, RunConfig, TrainEngineConfig
from arealite.api.types import Dims
from arealite.dataset.rows import task_of
from arealite.dataset.sources import read_rows
from arealite.models.rank_memory import (
    DTYPE_BYTES,
    KEPT_FREE,
    MemoryPart,
    ModelShape,
    PassTokens,
    held_parameters,
    rank_parts,
    settled,
    working_copy,
)  # fmt: skip

PROGRAM_BYTES = 350 << 20  # Python with torch and transformers loaded
GPU_PROGRAM_BYTES = 600 << 20  # of a GPU, for each process: the driver's context and libraries
# Of a GPU's free memory: what a native server's KV cache takes when nobody says, alone and beside a trainer.
KV_SHARE, COLOCATED_KV_SHARE = 0.85, 0.38
VLLM_PROGRAM_BYTES = 2400 << 20  # vLLM's three processes
RUNNING_REQUESTS, GPU_RUNNING_REQUESTS = 64, 256  # of the native server
CARD_BYTES = 79.0 * 2**30  # of a GPU of 80 GB, where nothing else is known
KV_TOKENS_PER_SEQUENCE = 2048  # the native server's default for the size of its cache
TEMPLATE_TOKENS, CHARACTERS_PER_TOKEN = 16, 3
ROWS_READ = 1000


def kv_cache_bytes(config: GRPOConfig, shape: ModelShape) -> int:
    """The keys and values of `kv_cache_tokens`, or of as many as `max_running_requests` sequences may need."""
    server = config.server
    context = server.context_length or shape.context_length
    per_sequence = min(context, KV_TOKENS_PER_SEQUENCE)
    tokens = server.kv_cache_tokens or max((server.max_running_requests or RUNNING_REQUESTS) * per_sequence, context)
    return tokens * shape.kv_values * DTYPE_BYTES[server.dtype]


def server_parts(
    config: GRPOConfig, shape: ModelShape, num_shards: int, backend: str = "native", gpu_share: float = 0
) -> list[MemoryPart]:
    """One inference server of `num_shards` devices. `gpu_share`: bytes of a GPU that its KV cache may take; 0: it is on
    the CPU, or a GPU that nothing is known of."""
    server, size, kv_bytes = config.server, DTYPE_BYTES[config.server.dtype], kv_cache_bytes(config, shape)
    per_token = shape.kv_values * size
    running = server.max_running_requests or (GPU_RUNNING_REQUESTS if gpu_share else RUNNING_REQUESTS)
    if gpu_share and backend == "native" and server.kv_cache_tokens is None:
        most = running * (server.context_length or shape.context_length) * per_token
        kv_bytes = min(most, int(gpu_share))
    program = GPU_PROGRAM_BYTES if gpu_share else VLLM_PROGRAM_BYTES if backend == "vllm" else PROGRAM_BYTES
    return [
        MemoryPart("weights", shape.num_parameters * size / num_shards, server.dtype),
        MemoryPart("KV cache", kv_bytes / num_shards, f"{kv_bytes // per_token} tokens of {per_token / 1024:.0f} KiB"),
        MemoryPart("logits", 2 * 4 * running * shape.vocabulary, "two float32 copies of a decode step"),
        MemoryPart("program", program, "Python, torch, transformers"),
    ]


def models_parts(
    config: RunConfig, models: tuple[str, ...], shapes: dict[str, ModelShape], dims: Dims, on_gpu: bool, free: float
) -> list[MemoryPart]:
    """As `trainer_parts`, of a rank that has `models`, by their keys in `config`; `shapes` of these at least."""
    shape, ref = shapes[models[0]], shapes["ref"] if "ref" in models else None
    if not isinstance(config, GRPOConfig):
        return trainer_parts(config, shape, dims, ref, on_gpu, None, free)
    if "actor" in models:
        config = replace(config, critic=config.critic if "critic" in models else None)
        return trainer_parts(config, shape, dims, ref, on_gpu, None, free)
    parts = trainer_parts(replace(config, critic=None), shape, dims, ref, on_gpu, config.critic or config.ref, free)
    kept = (
        {part.name for part in parts} - {"weights to send"}
        if "critic" in models
        else {"reference", "logits", "program"}
    )
    return [part for part in parts if part.name in kept]


def trainer_parts(
    config: RunConfig,
    shape: ModelShape,
    dims: Dims,
    ref: ModelShape | None,
    on_gpu: bool = False,
    engine: TrainEngineConfig | None = None,
    free_bytes: float = CARD_BYTES,
) -> list[MemoryPart]:
    """One trainer rank of the layout `dims`, the fullest; `ref` is the reference model's shape when there is one.
    `engine`: of the model that it trains, if that is not the one that the run is for. `free_bytes`: what a rank has, by
    which gradient_checkpointing=auto is decided.

    Calibrated on CPUs (benchmarks/memory_estimate.py). `on_gpu`: what of it is a GPU's memory, assumed to be the same.
    """
    engine = settled(engine or config.trained[1], shape, dims, free_bytes, on_gpu)[0]
    size, lora = DTYPE_BYTES[engine.dtype], engine.lora
    num_trained = shape.num_parameters if lora is None else shape.num_in_adapters(lora)
    has_critic, held = isinstance(config, GRPOConfig) and config.critic is not None, held_parameters
    own = rank_parts(engine, shape, dims, pass_tokens(config, engine, shape, dims), on_gpu)
    parts = [
        *((part.name, part.num_bytes, part.assumption) for part in own),
        ("weights to send", 0 if on_gpu or config.kind != "grpo" else size * num_trained, "rank 0 only"),
        (
            "critic",
            16 * held(shape, dims, shape.num_parameters) + working_copy(shape, dims, size, True) if has_critic else 0,
            "as large as the policy, and so trained",
        ),
        ("reference", size * held(shape, dims, ref.num_parameters) if ref else 0, "in the compute type, frozen"),
    ]
    total = sum(num_bytes for _, num_bytes, _ in parts)
    parts.append(("allocator", KEPT_FREE * total, "what lies free between blocks of other sizes"))
    program = (GPU_PROGRAM_BYTES, "driver and libraries") if on_gpu else (PROGRAM_BYTES, "Python, torch, transformers")
    return [MemoryPart(*part) for part in [*parts, ("program", *program)] if part[1]]


def pass_tokens(config: RunConfig, engine: TrainEngineConfig, shape: ModelShape, dims: Dims) -> PassTokens:
    """Of a rank's share of a step, evenly cut."""
    total, longest = step_tokens(config, shape, engine.share_prompts)
    keys = step_tokens(config, shape, share_prompts=False)[0] / total
    total = math.ceil(total / dims.d)
    num_batches = max(1, math.ceil(total / engine.max_tokens_per_mb))
    return PassTokens(max(math.ceil(total / num_batches), min(longest, total)), num_batches, keys)


def step_tokens(config: RunConfig, shape: ModelShape, share_prompts: bool) -> tuple[int, int]:
    """Computed tokens of a step, over all ranks, and of its longest sequence, if every answer has its full length."""
    source = config.train_dataset
    if not isinstance(config, GRPOConfig):
        longest = source.max_length or shape.context_length
        return source.batch_size * longest * (1 + (config.kind == "rw")), longest
    g, context = config.gconfig, config.server.context_length or shape.context_length
    # The prompt: the longest of the first ones of a local data set, by its characters; else the limit.
    prompt = source.max_prompt_tokens or context
    local = [d for d in source.mixture.values() or [source] if d.path and Path(d.path).exists()]
    if local:
        rows = ((row, part) for part in local for row in islice(read_rows(part, config.seed), ROWS_READ))
        tasks = (task_of(row, part, chat=True) for row, part in rows)
        texts = [t.prompt or "".join(str(m["content"]) for m in t.messages or []) for t in tasks if t is not None]
        prompt = min(prompt, TEMPLATE_TOKENS + round(max(map(len, texts), default=0) / CHARACTERS_PER_TOKEN))
    prompt = min(prompt, max(context - g.max_new_tokens, 1))
    answer = g.max_new_tokens - 1  # nothing is predicted from the last token
    group = prompt + g.n_samples * answer if share_prompts else g.n_samples * (prompt + answer)
    return source.batch_size * group, prompt + answer
