"""How much memory each process of a run will take, estimated from the model's files. Called by describe.py.

Rough on purpose (expect 25% either way); every part carries the assumption behind it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from arealite.api.cli_args import GRPOConfig, RunConfig

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PROGRAM_BYTES = 600 << 20  # Python with torch and transformers loaded
VLLM_PROGRAM_BYTES = 2400 << 20  # vLLM's three processes
KV_TOKENS_PER_SEQUENCE = 2048  # the native server's default for the size of its cache
# Values kept per token and layer for the backward pass of a Llama-like block.
HIDDEN_KEPT, INTERMEDIATE_KEPT = 12, 4


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory depends on."""

    num_parameters: int
    num_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_width: int  # KV heads x head size
    context_length: int

    @classmethod
    def read(cls, folder: str | Path) -> ModelShape | None:
        """The shape of a Hugging Face folder with safetensors; None when it is no such folder, or no plain decoder."""
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            config |= config.get("text_config", {})
            hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
            num_parameters = sum(map(_count_parameters, Path(folder).glob("*.safetensors")))
            if not num_parameters:
                return None
            return cls(
                num_parameters=num_parameters,
                num_layers=config["num_hidden_layers"],
                hidden=hidden,
                intermediate=config.get("intermediate_size", 4 * hidden),
                vocabulary=config["vocab_size"],
                kv_width=(config.get("num_key_value_heads") or num_heads)
                * (config.get("head_dim") or hidden // num_heads),
                context_length=config.get("max_position_embeddings", KV_TOKENS_PER_SEQUENCE),
            )
        except (OSError, ValueError, KeyError):
            return None


@dataclass(frozen=True)
class Part:
    """One share of a process's memory."""

    name: str
    num_bytes: float
    assumption: str


def _count_parameters(path: Path) -> int:
    """Parameters of a safetensors file, from its header alone."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


def kv_cache_bytes(config: GRPOConfig, shape: ModelShape) -> int:
    """The keys and values of `kv_cache_tokens`, or of as many as `max_running_requests` sequences may need."""
    server = config.server
    context = server.context_length or shape.context_length
    per_sequence = min(context, KV_TOKENS_PER_SEQUENCE)
    tokens = server.kv_cache_tokens or max(server.max_running_requests * per_sequence, context)
    return tokens * 2 * shape.num_layers * shape.kv_width * DTYPE_BYTES[server.dtype]


def server_parts(config: GRPOConfig, shape: ModelShape, num_shards: int, backend: str = "native") -> list[Part]:
    """One inference server of `num_shards` devices."""
    program = VLLM_PROGRAM_BYTES if backend == "vllm" else PROGRAM_BYTES
    server = config.server
    size = DTYPE_BYTES[server.dtype]
    kv_bytes = kv_cache_bytes(config, shape)
    per_token = 2 * shape.num_layers * shape.kv_width * size
    return [
        Part("weights", shape.num_parameters * size / num_shards, server.dtype),
        Part("KV cache", kv_bytes / num_shards, f"{kv_bytes // per_token} tokens of {per_token / 1024:.0f} KiB"),
        Part("logits", 2 * 4 * server.max_running_requests * shape.vocabulary, "two float32 copies of a decode step"),
        Part("program", program, "Python, torch, transformers"),
    ]


def trainer_parts(config: RunConfig, shape: ModelShape, world_size: int, ref: ModelShape | None) -> list[Part]:
    """One trainer rank of `world_size`; `ref` is the reference model's shape when there is one."""
    _, actor = config.trained
    size = DTYPE_BYTES[actor.dtype]
    count = shape.num_parameters / world_size
    source = config.train_dataset
    if isinstance(config, GRPOConfig):
        context = config.server.context_length or shape.context_length
        step_tokens = source.batch_size * config.gconfig.n_samples * context
    else:
        step_tokens = source.batch_size * (source.max_length or shape.context_length) * (1 + (config.kind == "rw"))
    tokens = min(actor.max_tokens_per_mb, -(-step_tokens // world_size))
    layer = tokens * size * (HIDDEN_KEPT * shape.hidden + INTERMEDIATE_KEPT * shape.intermediate)
    if actor.gradient_checkpointing != "none":
        activations, kept = tokens * size * shape.num_layers * shape.hidden + layer, "one layer, and the input of each"
    else:
        activations, kept = shape.num_layers * layer, "all layers"
    parts = [
        Part("weights", 4 * count, f"float32 masters, over {world_size} rank(s)"),
        Part("gradients", 4 * count, "float32"),
        Part("Adam", 8 * count, "two float32 moments"),
        Part("working copy", size * shape.num_parameters if size < 4 else 0, f"weights in {actor.dtype}"),
        Part("activations", activations, f"{tokens} tokens (max_tokens_per_mb={actor.max_tokens_per_mb}): {kept}"),
        Part(
            "logits",
            3 * 4 * actor.logprob_chunk_tokens * shape.vocabulary,
            f"logprob_chunk_tokens={actor.logprob_chunk_tokens} x {shape.vocabulary}, three float32 copies",
        ),
        Part("program", PROGRAM_BYTES, "Python, torch, transformers"),
    ]
    if isinstance(config, GRPOConfig):
        num_bytes = DTYPE_BYTES[config.server.dtype] * shape.num_parameters
        parts.append(Part("weights to send", num_bytes, "rank 0 only, host memory"))
        if config.critic is not None:
            parts.append(Part("critic", (16 + size) * count, "as large as the policy; weights, gradients, Adam, copy"))
    if ref is not None:
        parts.insert(3, Part("reference", 4 * ref.num_parameters / world_size, "float32, frozen"))
    return [part for part in parts if part.num_bytes]
