"""How much memory each process of a run will take, estimated from the model's files. Called by check.py and servers.py.

Meant to be within 20% of what benchmarks/memory_estimate.py measures; every part carries the assumption behind it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from arealite.api.cli_args import GRPOConfig, LoRAConfig, RunConfig, TrainEngineConfig
from arealite.api.types import Dims
from arealite.dataset.rows import task_of
from arealite.dataset.sources import read_rows
from arealite.models.folder import read_config

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PROGRAM_BYTES = 350 << 20  # Python with torch and transformers loaded
GPU_PROGRAM_BYTES = 600 << 20  # of a GPU, for each process: the driver's context and libraries
# Of a GPU's free memory: what a native server's KV cache takes when nobody says, alone and beside a trainer.
KV_SHARE, COLOCATED_KV_SHARE = 0.85, 0.38
GPU_LOGITS_BYTES = (4 + 2) << 27  # as engine/logprobs.py holds of them on a GPU
VLLM_PROGRAM_BYTES = 2400 << 20  # vLLM's three processes
RUNNING_REQUESTS, GPU_RUNNING_REQUESTS = 64, 256  # of the native server
KV_TOKENS_PER_SEQUENCE = 2048  # the native server's default for the size of its cache
GATHERED_LAYERS = 2  # at one time, where layers are sharded: the one that computes, and the next
KEPT_FREE = 0.08  # of what is allocated: lies free between blocks of other sizes; measured
TEMPLATE_TOKENS, CHARACTERS_PER_TOKEN = 16, 3
ROWS_READ = 1000


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory depends on."""

    num_parameters: int
    num_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    query_width: int  # heads x head size
    kv_width: int  # KV heads x head size
    context_length: int
    is_tied: bool  # embedding and head are one weight

    @classmethod
    def read(cls, folder: str | Path) -> ModelShape | None:
        """The shape of a Hugging Face folder with safetensors; None when it is no such folder, or no plain decoder."""
        config = read_config(Path(folder))
        config |= config.get("text_config", {})
        try:
            tensors: dict[str, int] = {}
            for path in Path(folder).glob("*.safetensors"):
                with open(path, "rb") as file:
                    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                header.pop("__metadata__", None)
                tensors |= {name: math.prod(tensor["shape"]) for name, tensor in header.items()}
            if not tensors:
                return None
            return cls.of(config, sum(tensors.values()), is_tied="lm_head.weight" not in tensors)
        except (OSError, ValueError, KeyError):
            return None

    @classmethod
    def of(cls, config: Mapping[str, Any], num_parameters: int, is_tied: bool) -> ModelShape:
        """That of a model's config.json. Raises KeyError: it is no plain decoder's."""
        hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
        head_size = config.get("head_dim") or hidden // num_heads
        return cls(
            num_parameters=num_parameters,
            num_layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config.get("intermediate_size", 4 * hidden),
            vocabulary=config["vocab_size"],
            query_width=num_heads * head_size,
            kv_width=(config.get("num_key_value_heads") or num_heads) * head_size,
            context_length=config.get("max_position_embeddings", KV_TOKENS_PER_SEQUENCE),
            is_tied=is_tied,
        )

    @property
    def end(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def kv_values(self) -> int:
        """Keys and values of a token."""
        return 2 * self.num_layers * self.kv_width

    def num_in_adapters(self, lora: LoRAConfig) -> int:
        """Parameters of all adapters."""
        query, kv, inner = self.query_width, self.kv_width, self.intermediate
        outer = {"q_proj": query, "o_proj": query, "k_proj": kv, "v_proj": kv}
        outer |= {"gate_proj": inner, "up_proj": inner, "down_proj": inner}
        widths = sum(self.hidden + outer[name] for name in lora.target_modules if name in outer)
        return lora.rank * self.num_layers * widths


@dataclass(frozen=True)
class MemoryPart:
    """One share of a process's memory."""

    name: str
    num_bytes: float
    assumption: str


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


def rank_parts(
    config: RunConfig, models: tuple[str, ...], shapes: dict[str, ModelShape], dims: Dims, on_gpu: bool = False
) -> list[MemoryPart]:
    """As `trainer_parts`, of a rank that has `models`, by their keys in `config`; `shapes` of these at least."""
    shape, ref = shapes[models[0]], shapes["ref"] if "ref" in models else None
    if not isinstance(config, GRPOConfig):
        return trainer_parts(config, shape, dims, ref, on_gpu)
    if "actor" in models:
        config = replace(config, critic=config.critic if "critic" in models else None)
        return trainer_parts(config, shape, dims, ref, on_gpu)
    parts = trainer_parts(replace(config, critic=None), shape, dims, ref, on_gpu, config.critic or config.ref)
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
) -> list[MemoryPart]:
    """One trainer rank of the layout `dims`, the fullest; `ref` is the reference model's shape when there is one.
    `engine`: of the model that it trains, if that is not the one that the run is for.

    Calibrated on CPUs (benchmarks/memory_estimate.py). `on_gpu`: what of it is a GPU's memory, assumed to be the same.
    """
    engine = engine or config.trained[1]
    size, lora, kind = DTYPE_BYTES[engine.dtype], engine.lora, engine.optimizer.kind
    held, working = _held(shape, dims, shape.num_parameters), _working_copy(shape, dims, size, lora is None)
    num_trained = shape.num_parameters if lora is None else shape.num_in_adapters(lora)
    trained, frozen = (held, 0.0) if lora is None else (_held(shape, dims, num_trained), held)
    moments = 2 if kind == "adamw" else 2 / shape.hidden
    has_critic = isinstance(config, GRPOConfig) and config.critic is not None
    in_type = f"weights in {engine.dtype}, gathered or kept between the passes"
    # What the CPU holds instead of the GPU, when all is offloaded.
    resident = [
        ("weights", 4 * trained + size * frozen, f"float32 masters, {dims}; what is frozen in {engine.dtype}"),
        ("gradients", 4 * trained, "float32"),
        ("optimizer", 4 * moments * trained, kind),
    ]
    passing = (working or size * held) if lora is None else 0
    parts = [
        *(resident if not (on_gpu and engine.offload == "all") else []),
        ("working copy", working, in_type),
        ("passing gradients", passing, f"{engine.dtype}, on their way to the float32 ones"),
        *_activations(config, engine, shape, dims, on_gpu),
        ("weights to send", 0 if on_gpu or config.kind != "grpo" else size * num_trained, "rank 0 only"),
        (
            "critic",
            16 * held + _working_copy(shape, dims, size, True) if has_critic else 0,
            "as large as the policy, and so trained",
        ),
        ("reference", size * _held(shape, dims, ref.num_parameters) if ref else 0, "in the compute type, frozen"),
    ]
    total = sum(num_bytes for _, num_bytes, _ in parts)
    parts.append(("allocator", KEPT_FREE * total, "what lies free between blocks of other sizes"))
    program = (GPU_PROGRAM_BYTES, "driver and libraries") if on_gpu else (PROGRAM_BYTES, "Python, torch, transformers")
    return [MemoryPart(*part) for part in [*parts, ("program", *program)] if part[1]]


def _held(shape: ModelShape, dims: Dims, num_parameters: float) -> float:
    """Parameters that a rank of the fullest stage holds of so many. With p > 1 embedding and head are on different
    stages."""
    ends = shape.end * (1 if shape.is_tied or dims.p > 1 else 2)
    ends = ends if num_parameters > ends else 0
    copies = 1 if shape.is_tied or dims.p == 1 else 2
    return ((num_parameters - ends * copies) / dims.p + ends) / (dims.d * dims.c * dims.t)


def _working_copy(shape: ModelShape, dims: Dims, size: int, is_kept: bool) -> float:
    """Bytes of gathered weights in the compute type, `size` bytes a value. `is_kept`: whether one rank alone needs a
    copy too (not if its own weights are of that type)."""
    one_rank = dims.d * dims.c == 1
    needed = (is_kept and size < 4) or not one_rank
    layers = (shape.num_parameters - shape.end * (1 if shape.is_tied else 2)) / dims.t
    gathered = layers / dims.p if one_rank else GATHERED_LAYERS * layers / shape.num_layers
    ends = shape.end * (1 if shape.is_tied or dims.p > 1 else 2)
    return size * (gathered * needed + ends * (needed or dims.t > 1))


def _activations(
    config: RunConfig, engine: TrainEngineConfig, shape: ModelShape, dims: Dims, on_gpu: bool
) -> list[tuple[str, float, str]]:
    """What a micro-batch keeps for its backward pass, and the head's working memory."""
    size, checkpointing = DTYPE_BYTES[engine.dtype], engine.gradient_checkpointing
    total, longest = step_tokens(config, shape, engine.share_prompts)
    total = math.ceil(total / dims.d)
    num_batches = max(1, math.ceil(total / engine.max_tokens_per_mb))
    tokens = max(math.ceil(total / num_batches), min(longest, total))
    # Kept per token: queries, keys, values and what attention makes of them, gate and up; the input of two norms.
    layer = 2 * size * (shape.hidden + shape.query_width + shape.kv_width + shape.intermediate)
    selective = layer + size * shape.hidden
    layer += 2 * size * shape.hidden * (dims.t - 1)  # tokens of the other ranks, gathered for two products
    kept = {"none": layer, "full": size * shape.hidden, "selective": min(layer, selective)}[checkpointing]
    per_token = shape.num_layers / dims.p * kept * min(dims.p, num_batches) + max(layer - kept, 0)
    rows = min(engine.logprob_chunk_tokens, tokens)
    logits = max(rows * shape.vocabulary * size, GPU_LOGITS_BYTES if on_gpu else 0)
    what = f"{tokens} tokens (max_tokens_per_mb={engine.max_tokens_per_mb}), checkpointing {checkpointing}"
    of_head = f"{rows} rows x {shape.vocabulary}, and the gradient of the head's weight"
    return [
        ("activations", tokens / (dims.c * dims.t) * per_token, what),
        ("logits", logits + 4 * shape.end, of_head),
    ]


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
