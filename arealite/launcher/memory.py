"""How much memory each process of a run will take, estimated from the model's files. Called by describe.py.

Rough on purpose (expect 25% either way); every part carries the assumption behind it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arealite.api.cli_args import GRPOConfig, TrainEngineConfig

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PROGRAM_BYTES = 600 << 20  # Python with torch and transformers loaded
KV_TOKENS_PER_SEQUENCE = 2048  # the native server's default for the size of its cache
# Values kept per token and layer for the backward pass of a Llama-like block.
HIDDEN_KEPT, INTERMEDIATE_KEPT = 12, 4


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory depends on. `where` says what the parameter count comes from."""

    num_parameters: int
    num_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_width: int  # KV heads x head size
    context_length: int
    where: str

    @classmethod
    def read(cls, folder: str | Path) -> ModelShape | None:
        """The shape of a Hugging Face folder; None when it is not one on this machine, or not a plain decoder."""
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
        except (OSError, ValueError):
            return None
        config = {**config, **config.get("text_config", {})}
        needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if any(key not in config for key in needed):
            return None
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_size = config.get("head_dim") or hidden // heads
        counted = _count_in_files(Path(folder))
        return cls(
            num_parameters=counted or _count_by_formula(config, head_size),
            num_layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config.get("intermediate_size", 4 * hidden),
            vocabulary=config["vocab_size"],
            kv_width=(config.get("num_key_value_heads") or heads) * head_size,
            context_length=config.get("max_position_embeddings", KV_TOKENS_PER_SEQUENCE),
            where="counted in its safetensors" if counted else "by formula from config.json",
        )


@dataclass(frozen=True)
class Part:
    """One share of a process's memory."""

    name: str
    num_bytes: float
    assumption: str


def _count_in_files(folder: Path) -> int:
    """Parameters in the headers of all safetensors files; 0 when there are none or one cannot be read."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError):
            return 0
        total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return total


def _count_by_formula(config: dict[str, Any], head_size: int) -> int:
    """Parameters of a decoder with gated feed-forward layers; with experts when it names them."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * head_size * (heads + kv_heads)
    feed_forward = 3 * hidden * config.get("intermediate_size", 4 * hidden)
    num_experts = config.get("num_experts") or config.get("num_local_experts")
    if num_experts:
        width = config.get("moe_intermediate_size") or config.get("intermediate_size", 4 * hidden)
        feed_forward = num_experts * (3 * hidden * width + hidden)
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return int(config["num_hidden_layers"] * (attention + feed_forward + 2 * hidden) + embeddings + hidden)


def server_parts(config: GRPOConfig, shape: ModelShape, num_shards: int) -> list[Part]:
    """One inference server of `num_shards` devices."""
    server = config.server
    size = DTYPE_BYTES[server.dtype]
    context = context_of(config, shape)
    per_sequence = min(context, KV_TOKENS_PER_SEQUENCE)
    tokens = server.kv_cache_tokens or max(server.max_running_requests * per_sequence, context)
    return [
        Part("weights", shape.num_parameters * size / num_shards, server.dtype),
        Part(
            "KV cache",
            2 * shape.num_layers * shape.kv_width * size * tokens / num_shards,
            f"{tokens} tokens of {2 * shape.num_layers * shape.kv_width * size / 1024:.0f} KiB",
        ),
        Part("logits", 2 * 4 * server.max_running_requests * shape.vocabulary, "two float32 copies of a decode step"),
        Part("program", PROGRAM_BYTES, "Python, torch, transformers"),
    ]


def trainer_parts(config: GRPOConfig, shape: ModelShape, world_size: int, ref: ModelShape | None) -> list[Part]:
    """One trainer rank of `world_size`; `ref` is the reference model's shape when there is one."""
    actor = config.actor
    size = DTYPE_BYTES[actor.dtype]
    count = shape.num_parameters / world_size
    step_tokens = config.train_dataset.batch_size * config.gconfig.n_samples * context_of(config, shape)
    tokens = min(actor.max_tokens_per_mb, -(-step_tokens // world_size))
    parts = [
        Part("weights", 4 * count, f"float32 masters, over {world_size} rank(s)"),
        Part("gradients", 4 * count, "float32"),
        Part("Adam", 8 * count, "two float32 moments"),
        Part("working copy", size * shape.num_parameters if size < 4 else 0, f"weights in {actor.dtype}"),
        Part("activations", _activation_bytes(actor, shape, size, tokens), _activation_words(actor, tokens)),
        Part(
            "logits",
            3 * 4 * actor.logprob_chunk_tokens * shape.vocabulary,
            f"logprob_chunk_tokens={actor.logprob_chunk_tokens} x {shape.vocabulary}, three float32 copies",
        ),
        Part("weights to send", DTYPE_BYTES[config.server.dtype] * shape.num_parameters, "rank 0 only, host memory"),
        Part("program", PROGRAM_BYTES, "Python, torch, transformers"),
    ]
    if ref is not None:
        parts.insert(3, Part("reference", 4 * ref.num_parameters / world_size, "float32, frozen"))
    return [part for part in parts if part.num_bytes]


def context_of(config: GRPOConfig, shape: ModelShape) -> int:
    """Tokens of prompt and answer at most."""
    return config.server.context_length or shape.context_length


def _activation_bytes(actor: TrainEngineConfig, shape: ModelShape, size: int, tokens: int) -> float:
    layer = size * (HIDDEN_KEPT * shape.hidden + INTERMEDIATE_KEPT * shape.intermediate)
    if actor.gradient_checkpointing:
        return tokens * (shape.num_layers * shape.hidden * size + layer)
    return tokens * shape.num_layers * layer


def _activation_words(actor: TrainEngineConfig, tokens: int) -> str:
    kept = "one layer, and the input of each" if actor.gradient_checkpointing else "all layers"
    return f"{tokens} tokens in a micro-batch (max_tokens_per_mb={actor.max_tokens_per_mb}): {kept}"
