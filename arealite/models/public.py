"""What config.json says of public models that are not on this machine: sizes, by which ranks are spread and counted.
Called by prove/dry_run.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

from arealite.api.errors import ConfigError
from arealite.models.fetch import resolve_model

# By name on the hub: type; vocabulary, hidden and intermediate size, layers, heads, key heads; whether embedding and
# head are one weight.
PUBLIC: dict[str, tuple[str, tuple[int, int, int, int, int, int], bool]] = {
    "Qwen/Qwen2.5-0.5B": ("qwen2", (151936, 896, 4864, 24, 14, 2), True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", (151936, 1536, 8960, 28, 12, 2), True),
    "Qwen/Qwen2.5-3B": ("qwen2", (151936, 2048, 11008, 36, 16, 2), True),
    "Qwen/Qwen2.5-7B": ("qwen2", (152064, 3584, 18944, 28, 28, 4), False),
    "Qwen/Qwen2.5-14B": ("qwen2", (152064, 5120, 13824, 48, 40, 8), False),
    "Qwen/Qwen2.5-32B": ("qwen2", (152064, 5120, 27648, 64, 40, 8), False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", (151936, 1536, 8960, 28, 12, 2), False),
    "Qwen/Qwen3-1.7B": ("qwen3", (151936, 2048, 6144, 28, 16, 8), True),
    "Qwen/Qwen3-8B": ("qwen3", (151936, 4096, 12288, 36, 32, 8), False),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", (151936, 2048, 6144, 48, 32, 4), False),
    "Qwen/Qwen3-32B": ("qwen3", (151936, 5120, 25600, 64, 64, 8), False),
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
HEAD_DIM = 128  # of all Qwen3
EXPERTS = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}


def folder_of(path: str, written: Path) -> str:
    """A folder with the model's config.json: its own, or one that is `written`. Raises ConfigError: nothing is known of
    the model here."""
    path = resolve_model(path, asks_hub=False)
    name = re.sub("-(Instruct|Base)$", "", path)
    if Path(path).is_dir():
        return path
    if name not in PUBLIC:
        raise ConfigError(
            f"{path} is not on this machine, and its sizes are not among those of {', '.join(PUBLIC)}: give a folder"
            " with its config.json, no weights are needed"
        )
    kind, sizes, is_tied = PUBLIC[name]
    config = {**dict(zip(SIZES, sizes, strict=True)), "model_type": kind, "tie_word_embeddings": is_tied}
    name = "".join(word.capitalize() for word in kind.split("_"))
    config |= {"architectures": [f"{name}ForCausalLM"], "max_position_embeddings": 32768}
    config |= {"head_dim": HEAD_DIM} if kind.startswith("qwen3") else {}
    config |= EXPERTS if kind == "qwen3_moe" else {}
    (written / "config.json").write_text(json.dumps(config))
    return str(written)
