"""How much memory each process of a run will take, estimated from the model's files. Called by describe.py.

Meant to be within 20% of what benchmarks/memory_estimate.py measures; every part carries the assumption behind it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from arealite.api.cli_args import GRPOConfig, LoRAConfig, RunConfig
from arealite.api.types import Dims
from arealite.dataset.rows import task_of
from arealite.dataset.sources import read_rows

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PROGRAM_BYTES = 350 << 20  # Python with torch and transformers loaded
GPU_PROGRAM_BYTES = 600 << 20  # of a GPU, for each process: CUDA's context and libraries
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
        try:
            config = json.loads((Path(folder) / "config.json").read_text())
            config |= config.get("text_config", {})
            hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
            tensors = {name: size for path in Path(folder).glob("*.safetensors") for name, size in _sizes(path).items()}
            if not tensors:
                return None
            head_size = config.get("head_dim") or hidden // num_heads
            return cls(
                num_parameters=sum(tensors.values()),
                num_layers=config["num_hidden_layers"],
                hidden=hidden,
                intermediate=config.get("intermediate_size", 4 * hidden),
                vocabulary=config["vocab_size"],
                query_width=num_heads * head_size,
                kv_width=(config.get("num_key_value_heads") or num_heads) * head_size,
                context_length=config.get("max_position_embeddings", KV_TOKENS_PER_SEQUENCE),
                is_tied="lm_head.weight" not in tensors,
            )
        except (OSError, ValueError, KeyError):
            return None


@dataclass(frozen=True)
class Part:
    """One share of a process's memory."""

    name: str
    num_bytes: float
    assumption: str


def _sizes(path: Path) -> dict[str, int]:
    """Parameters of each tensor of a safetensors file, from its header alone."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__"}


def kv_cache_bytes(config: GRPOConfig, shape: ModelShape) -> int:
    """The keys and values of `kv_cache_tokens`, or of as many as `max_running_requests` sequences may need."""
    server = config.server
    context = server.context_length or shape.context_length
    per_sequence = min(context, KV_TOKENS_PER_SEQUENCE)
    tokens = server.kv_cache_tokens or max((server.max_running_requests or RUNNING_REQUESTS) * per_sequence, context)
    return tokens * 2 * shape.num_layers * shape.kv_width * DTYPE_BYTES[server.dtype]


def server_parts(
    config: GRPOConfig, shape: ModelShape, num_shards: int, backend: str = "native", gpu_share: float = 0
) -> list[Part]:
    """One inference server of `num_shards` devices. `gpu_share`: bytes of a GPU that its KV cache may take; 0: it is on
    the CPU, or a GPU that nothing is known of."""
    server, size, kv_bytes = config.server, DTYPE_BYTES[config.server.dtype], kv_cache_bytes(config, shape)
    per_token = 2 * shape.num_layers * shape.kv_width * size
    running = server.max_running_requests or (GPU_RUNNING_REQUESTS if gpu_share else RUNNING_REQUESTS)
    if gpu_share and backend == "native" and server.kv_cache_tokens is None:
        most = running * (server.context_length or shape.context_length) * per_token
        kv_bytes = min(most, int(gpu_share))
    program = GPU_PROGRAM_BYTES if gpu_share else VLLM_PROGRAM_BYTES if backend == "vllm" else PROGRAM_BYTES
    return [
        Part("weights", shape.num_parameters * size / num_shards, server.dtype),
        Part("KV cache", kv_bytes / num_shards, f"{kv_bytes // per_token} tokens of {per_token / 1024:.0f} KiB"),
        Part("logits", 2 * 4 * running * shape.vocabulary, "two float32 copies of a decode step"),
        Part("program", program, "Python, torch, transformers"),
    ]


def trainer_parts(
    config: RunConfig, shape: ModelShape, dims: Dims, ref: ModelShape | None, on_gpu: bool = False
) -> list[Part]:
    """One trainer rank of the layout `dims`, the fullest; `ref` is the reference model's shape when there is one.

    Calibrated on CPUs (benchmarks/memory_estimate.py). `on_gpu`: what of it is a GPU's memory, assumed to be the same.
    """
    _, engine = config.trained
    layout = _Layout(shape, dims, DTYPE_BYTES[engine.dtype])
    held, lora = layout.held(shape.num_parameters), engine.lora
    num_trained = shape.num_parameters if lora is None else _adapters(shape, lora)
    trained, frozen = (held, 0.0) if lora is None else (layout.held(num_trained), held)
    moments = 2 if engine.optimizer.kind == "adamw" else 2 / shape.hidden
    masters = f"float32 masters, {dims}; what is frozen in {engine.dtype}"
    copied = f"weights in {engine.dtype}, gathered or kept between the passes"
    parts = [
        Part("weights", 4 * trained + layout.size * frozen, masters),
        Part("gradients", 4 * trained, "float32"),
        Part("optimizer", 4 * moments * trained, engine.optimizer.kind),
        Part("working copy", layout.working_copy(is_kept=lora is None), copied),
        *_activations(config, shape, layout, on_gpu),
    ]
    if lora is None:
        passing = layout.working_copy(is_kept=True) or layout.size * held
        parts.insert(4, Part("passing gradients", passing, f"{engine.dtype}, on their way to the float32 ones"))
    if on_gpu and engine.offload == "all":
        parts = [part for part in parts if part.name not in ("weights", "gradients", "optimizer")]
    if isinstance(config, GRPOConfig) and not on_gpu:
        parts.append(Part("weights to send", layout.size * num_trained, "rank 0 only"))
    if isinstance(config, GRPOConfig) and config.critic is not None:
        critic = 16 * held + layout.working_copy(is_kept=True)
        parts.append(Part("critic", critic, "as large as the policy, and so trained"))
    if ref is not None:
        parts.append(Part("reference", layout.size * layout.held(ref.num_parameters), "in the compute type, frozen"))
    total = sum(part.num_bytes for part in parts)
    parts.append(Part("allocator", KEPT_FREE * total, "what lies free between blocks of other sizes"))
    program = (GPU_PROGRAM_BYTES, "CUDA") if on_gpu else (PROGRAM_BYTES, "Python, torch, transformers")
    parts.append(Part("program", *program))
    return [part for part in parts if part.num_bytes]


@dataclass(frozen=True)
class _Layout:
    """What of a model lies on one rank. `size`: bytes of a value in the compute type."""

    shape: ModelShape
    dims: Dims
    size: int

    @property
    def ends(self) -> int:
        """Parameters of embedding and head on one stage: with p > 1 they are on different ones."""
        return self.shape.vocabulary * self.shape.hidden * (1 if self.shape.is_tied or self.dims.p > 1 else 2)

    def held(self, num_parameters: float) -> float:
        """Parameters that a rank of the fullest stage holds of so many."""
        ends = self.ends if num_parameters > self.ends else 0
        copies = 1 if self.shape.is_tied or self.dims.p == 1 else 2
        layers = (num_parameters - ends * copies) / self.dims.p
        return (layers + ends) / (self.dims.d * self.dims.c * self.dims.t)

    def working_copy(self, is_kept: bool) -> float:
        """Bytes of gathered weights in the compute type. `is_kept`: whether one rank alone needs a copy too (not if its
        own weights are of that type)."""
        dims, shape = self.dims, self.shape
        layers = (shape.num_parameters - shape.vocabulary * shape.hidden * (1 if shape.is_tied else 2)) / dims.t
        one_rank = dims.d * dims.c == 1
        needed = (is_kept and self.size < 4) or not one_rank
        gathered = layers / dims.p if one_rank else GATHERED_LAYERS * layers / shape.num_layers
        ends = self.ends if needed or dims.t > 1 else 0
        return self.size * ((gathered if needed else 0) + ends)


def _adapters(shape: ModelShape, lora: LoRAConfig) -> float:
    """Parameters of all adapters."""
    widths = dict.fromkeys(("q_proj", "o_proj"), shape.query_width) | dict.fromkeys(
        ("k_proj", "v_proj"), shape.kv_width
    )
    widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.intermediate)
    ends = sum(shape.hidden + widths[name] for name in lora.target_modules if name in widths)
    return float(lora.rank * shape.num_layers * ends)


def _activations(config: RunConfig, shape: ModelShape, layout: _Layout, on_gpu: bool) -> list[Part]:
    """What a micro-batch keeps for its backward pass, and the head's working memory."""
    _, engine = config.trained
    dims, size = layout.dims, layout.size
    total, longest = _tokens(config, shape, engine.share_prompts)
    total = math.ceil(total / dims.d)
    num_batches = max(1, math.ceil(total / engine.max_tokens_per_mb))
    tokens = max(math.ceil(total / num_batches), min(longest, total))
    # Kept per token: queries, keys, values and what attention makes of them, gate and up; the input of two norms.
    layer = size * (2 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width + 2 * shape.intermediate)
    if dims.t > 1:
        layer += 2 * size * shape.hidden * (dims.t - 1)  # tokens of the other ranks, gathered for two products
    selective = size * (3 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width + 2 * shape.intermediate)
    kept_of = {"none": layer, "full": size * shape.hidden, "selective": min(layer, selective)}
    kept = kept_of[engine.gradient_checkpointing]
    per_token = shape.num_layers / dims.p * kept * min(dims.p, num_batches) + max(layer - kept, 0)
    rows = min(engine.logprob_chunk_tokens, tokens)
    logits = max(rows * shape.vocabulary * size, GPU_LOGITS_BYTES if on_gpu else 0)
    head = logits + 4 * shape.vocabulary * shape.hidden
    what = (
        f"{tokens} tokens (max_tokens_per_mb={engine.max_tokens_per_mb}), checkpointing {engine.gradient_checkpointing}"
    )
    return [
        Part("activations", tokens / (dims.c * dims.t) * per_token, what),
        Part("logits", head, f"{rows} rows x {shape.vocabulary}, and the gradient of the head's weight"),
    ]


def _tokens(config: RunConfig, shape: ModelShape, share_prompts: bool) -> tuple[int, int]:
    """Computed tokens of a step, over all ranks, and of its longest sequence, if every answer has its full length."""
    source = config.train_dataset
    if not isinstance(config, GRPOConfig):
        longest = source.max_length or shape.context_length
        return source.batch_size * longest * (1 + (config.kind == "rw")), longest
    g, context = config.gconfig, config.server.context_length or shape.context_length
    prompt = min(_prompt_tokens(config), max(context - g.max_new_tokens, 1))
    answer = g.max_new_tokens - 1  # nothing is predicted from the last token
    group = prompt + g.n_samples * answer if share_prompts else g.n_samples * (prompt + answer)
    return source.batch_size * group, prompt + answer


def _prompt_tokens(config: GRPOConfig) -> int:
    """Of the longest of the first prompts of a local data set, by its characters; else the limit."""
    source = config.train_dataset
    most = source.max_prompt_tokens or 1 << 30
    if not source.path or not Path(source.path).exists():
        return most
    tasks = (task_of(row, source, chat=True) for row in islice(read_rows(source, config.seed), ROWS_READ))
    texts = [
        task.prompt or "".join(str(m["content"]) for m in task.messages or []) for task in tasks if task is not None
    ]
    return min(most, TEMPLATE_TOKENS + round(max(map(len, texts), default=0) / CHARACTERS_PER_TOKEN))
