"""How much memory a trainer's rank takes for its model, from the model's sizes; and how much of the activations it can
keep. Called by launcher/memory_estimate.py before a run, and by engine/memory.py in it.

Meant to be within 20% of what benchmarks/memory_estimate.py measures on CPUs, and of arealite check --dry-run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from arealite.api.cli_args import LoRAConfig, TrainEngineConfig
from arealite.api.types import Dims
from arealite.models.folder import read_config

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GPU_LOGITS_BYTES = (4 + 2) << 27  # as engine/logprobs.py holds of them on a GPU
GATHERED_LAYERS = 2  # at one time, where layers are sharded: the one that computes, and the next
KEPT_FREE = 0.08  # of what is allocated: lies free between blocks of other sizes; measured
UNKNOWN_LENGTH = 2048  # of the context, where a model does not say
ROUNDING = 1e-9
Kind = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Kind, ...] = ("none", "selective", "full")  # by what is computed twice, the least first


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory depends on."""

    num_parameters: int
    num_layers: int
    hidden: int
    intermediate: int  # of all experts that a token goes to
    vocabulary: int
    query_width: int  # heads x head size
    kv_width: int  # KV heads x head size
    context_length: int
    is_tied: bool  # embedding and head are one weight
    num_chosen: int = 0  # experts that a token goes to

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
        num_chosen = config.get("num_experts_per_tok") or 0
        return cls(
            num_parameters=num_parameters,
            num_layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=(config.get("moe_intermediate_size") or config.get("intermediate_size", 4 * hidden))
            * max(num_chosen, 1),
            vocabulary=config["vocab_size"],
            query_width=num_heads * head_size,
            kv_width=(config.get("num_key_value_heads") or num_heads) * head_size,
            context_length=config.get("max_position_embeddings", UNKNOWN_LENGTH),
            is_tied=is_tied,
            num_chosen=num_chosen,
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


@dataclass(frozen=True)
class PassTokens:
    """What a rank's micro-batch computes, and how many of them a step has for it."""

    tokens: int
    num_batches: int
    keys_per_token: float = 1.0  # that attention gathers on a GPU: more than one where prompts are shared


def rank_parts(
    engine: TrainEngineConfig, shape: ModelShape, dims: Dims, passes: PassTokens, on_gpu: bool
) -> list[MemoryPart]:
    """The parts of one rank of the layout `dims`, the fullest, which trains this model; the program apart. `on_gpu`:
    what of it is a GPU's memory."""
    size, lora, kind = DTYPE_BYTES[engine.dtype], engine.lora, engine.optimizer.kind
    held, working = held_parameters(shape, dims, shape.num_parameters), working_copy(shape, dims, size, lora is None)
    num_trained = shape.num_parameters if lora is None else shape.num_in_adapters(lora)
    trained, frozen = (held, 0.0) if lora is None else (held_parameters(shape, dims, num_trained), held)
    moments = 2 if kind == "adamw" else 2 / shape.hidden
    in_type = f"weights in {engine.dtype}, gathered or kept between the passes"
    # What the CPU holds instead of the GPU, when all is offloaded.
    resident = [
        ("weights", 4 * trained + size * frozen, f"float32 masters, {dims}; what is frozen in {engine.dtype}"),
        ("gradients", 4 * trained, "float32"),
        ("optimizer", 4 * moments * trained, kind),
    ]
    passing = (working or size * held) if lora is None else 0
    of_passes = [
        ("passing gradients", passing, f"{engine.dtype}, on their way to the float32 ones"),
        *_activations(engine, shape, dims, passes, on_gpu),
    ]
    if on_gpu and engine.offload == "optimizer":  # its moments come when the passes are over
        beyond = 4 * moments * trained - sum(num_bytes for _, num_bytes, _ in of_passes)
        resident[-1] = ("optimizer", max(0.0, beyond), f"{kind}, in the place of what the passes needed")
    parts = [
        *(resident if not (on_gpu and engine.offload == "all") else []),
        ("working copy", working, in_type),
        *of_passes,
    ]
    return [MemoryPart(*part) for part in parts]


def settled(
    engine: TrainEngineConfig, shape: ModelShape, dims: Dims, free_bytes: float, on_gpu: bool
) -> tuple[TrainEngineConfig, dict[str, float]]:
    """`engine` with `gradient_checkpointing: auto` decided for a rank that has so many bytes: the first kind with which
    it needs no more, else the last. And the bytes that it needs with each, if its micro-batches are full."""
    if engine.gradient_checkpointing != "auto":
        return engine, {}
    needed: dict[str, float] = {}
    passes, chosen = PassTokens(engine.max_tokens_per_mb, dims.p), engine
    for kind in CHECKPOINTING:
        if needed and min(needed.values()) <= free_bytes:
            break
        chosen = replace(engine, gradient_checkpointing=kind)
        parts = rank_parts(chosen, shape, dims, passes, on_gpu)
        needed[kind] = (1 + KEPT_FREE) * sum(part.num_bytes for part in parts)
    return chosen, needed


def _stage_layers(shape: ModelShape, dims: Dims) -> tuple[int, int]:
    """Layers of the fullest stage, the first, and of the last one: the head counts as its work, so that it has fewer
    (engine/parallel/pipeline.py)."""
    num, before = shape.num_layers, dims.p - 1
    if not before:
        return num, num
    head = shape.end / ((shape.num_parameters - shape.end * (1 if shape.is_tied else 2)) / num)  # in layers
    bounds = (most for n in range(1, num + 1) for most in (n, n + head))  # of a stage's work
    for most in sorted(bounds):
        first, last = math.floor(most + ROUNDING), math.floor(most - head + ROUNDING)
        if last >= 1 and first * before + last >= num:
            break
    first = min(first, num - before)
    return first, max(1, num - first * before)


def held_parameters(shape: ModelShape, dims: Dims, num_parameters: float) -> float:
    """Parameters that a rank of the fullest stage holds of so many. With p > 1 embedding and head are on different
    stages."""
    ends = shape.end * (1 if shape.is_tied or dims.p > 1 else 2)
    ends = ends if num_parameters > ends else 0
    copies = 1 if shape.is_tied or dims.p == 1 else 2
    of_layers = (num_parameters - ends * copies) * _stage_layers(shape, dims)[0] / shape.num_layers
    return (of_layers + ends) / (dims.d * dims.c * dims.t)


def working_copy(shape: ModelShape, dims: Dims, size: int, is_kept: bool) -> float:
    """Bytes of gathered weights in the compute type, `size` bytes a value. `is_kept`: whether one rank alone needs a
    copy too (not if its own weights are of that type)."""
    one_rank = dims.d * dims.c == 1
    needed = (is_kept and size < 4) or not one_rank
    layers = (shape.num_parameters - shape.end * (1 if shape.is_tied else 2)) / dims.t
    own = layers * _stage_layers(shape, dims)[0] / shape.num_layers
    gathered = own if one_rank else GATHERED_LAYERS * layers / shape.num_layers
    ends = shape.end * (1 if shape.is_tied or dims.p > 1 else 2)
    return size * (gathered * needed + ends * (needed or dims.t > 1))


def _activations(
    engine: TrainEngineConfig, shape: ModelShape, dims: Dims, passes: PassTokens, on_gpu: bool
) -> list[tuple[str, float, str]]:
    """What a micro-batch keeps for its backward pass, and the working memory of attention and the head."""
    size, checkpointing, tokens = DTYPE_BYTES[engine.dtype], engine.gradient_checkpointing, passes.tokens
    num_keys = passes.keys_per_token if on_gpu else 1.0
    # Kept per token: queries, keys, values and what attention makes of them, gate and up; the input of two norms.
    layer = 2 * size * (shape.hidden + shape.query_width + shape.kv_width * num_keys + shape.intermediate)
    selective = layer + size * shape.hidden
    layer += 2 * size * shape.hidden * (dims.t - 1)  # tokens of the other ranks, gathered for two products
    if shape.num_chosen:  # the token for each of its experts, what these make of it, and the parts of their activation
        layer += size * (3 * shape.num_chosen * shape.hidden + 2 * shape.intermediate)
    kept = {"none": layer, "full": size * shape.hidden, "selective": min(layer, selective)}[checkpointing]
    num_layers, last = _stage_layers(shape, dims)
    per_token = num_layers * kept * min(dims.p, passes.num_batches) + max(layer - kept, 0)
    rows = min(engine.logprob_chunk_tokens, tokens)
    logits = max(rows * shape.vocabulary * size, GPU_LOGITS_BYTES if on_gpu else 0)
    what = f"{tokens} tokens (max_tokens_per_mb={engine.max_tokens_per_mb}), checkpointing {checkpointing}"
    of_head = f"{rows} rows x {shape.vocabulary}, and the gradient of the head's weight"
    # FlashAttention writes those of keys and values for each query head, before they are added up in float32.
    expanded = 2 * size * shape.query_width * (shape.query_width != shape.kv_width) + (4 + 4 + size) * shape.kv_width
    here = tokens / (dims.c * dims.t)
    # The first stage has most micro-batches on their way, and the last one the head: the one that needs more counts.
    head, of_last = logits + 4 * shape.end, last * kept + max(layer - kept, 0)
    if dims.p > 1 and here * per_token >= here * of_last + head:
        head = 0
    elif dims.p > 1:
        per_token = of_last
    return [
        ("activations", here * per_token, what),
        ("attention's gradients", here * num_keys * expanded * on_gpu, "of one layer's keys and values"),
        ("logits", head, of_head),
    ]
