"""What the files of a model folder say about it, without loading anything. Called by the launcher before a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# What the tests train. Other models run as far as nothing refuses them.
TESTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "mistral", "mixtral")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty when there is none, or it holds something else than a mapping."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def model_fault(path: str) -> str:
    """Why no model can be trained from the folder `path`; empty where no reason can be seen from outside."""
    folder = Path(path)
    config = read_config(folder)
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return f"is {'an empty folder' if folder.is_dir() else 'a file'}, expected a Hugging Face folder"
    if "adapter_config.json" in names and "config.json" not in names:
        return "holds an adapter without its model: merge it into the model, or give the model's folder"
    if "model_type" not in config:
        return f"has no config.json with a model_type, found {', '.join(names[:5])}: give a Hugging Face folder"
    if config.get("quantization_config") is not None:
        return "is quantised, and training needs its full weights: take the model it was made from"
    if INDEX in names:
        weights = sorted(set(re.findall(r"[\w.-]+[.]safetensors", (folder / INDEX).read_text())))
    elif SINGLE in names:
        weights = [SINGLE]
    else:
        return (
            f"has neither {SINGLE} nor {INDEX}: load it with transformers once and write it anew with save_pretrained"
        )
    for name in weights:
        if not _is_whole(folder / name):
            return f"has no whole file {name}: fetch it again, `git lfs pull` where the folder was cloned"
    return ""


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < path.stat().st_size else {}
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return path.stat().st_size == 8 + size + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def tokenizer_fault(path: str) -> str:
    """Why the folder `path` holds no tokenizer; empty when it seems to."""
    folder = Path(path)
    return "" if any((folder / name).is_file() for name in TOKENIZERS) else f"has none of {', '.join(TOKENIZERS)}"


def has_chat_template(path: str) -> bool:
    """Whether the tokenizer in the folder `path` has a chat template; True where there is no such folder."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*chat_template*")):
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text()
    except OSError:
        return True
