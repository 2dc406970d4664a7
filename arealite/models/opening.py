"""Configuration and tokenizer of a model folder or hub id, or a sentence that says why there is none.

No code that a folder brings along is ever run, and nobody is asked whether it should be.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from arealite.api.errors import ConfigError

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
)  # what transformers raises of a file


def open_config(path: str, **changes: Any) -> Any:
    """Raises ConfigError."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
    except UNREADABLE as error:
        raise ConfigError(f"no causal language model can be loaded from {_named(path)}: {_why(path, error)}") from error


def open_tokenizer(path: str) -> Any:
    """Raises ConfigError."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise ConfigError(
            f"no tokenizer can be read from {_named(path)}: {_why(path, error)[:500]}; set tokenizer_path to a folder"
            " or hub id that has one"
        ) from error


def _named(path: str) -> str:
    return path if Path(path).exists() else f"{path} (not a local folder, so a hub id)"


def _why(path: str, error: Exception) -> str:
    folder = Path(path)
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = re.search(r'"base_model_name_or_path": *"([^"]*)"', adapter.read_text())
        return (
            f"it is a LoRA adapter for {base[1] if base else 'some model'}, and no model: merge it into that model"
            " first (peft's merge_and_unload, then save_pretrained), or give the path of that model"
        )
    if "trust_remote_code" in str(error):
        return (
            "its code comes with it (auto_map in its json files) and not with transformers, and no such code is run"
            " here: choose a model whose architecture transformers has, or a conversion to one"
        )
    return " ".join(str(error).split()) or type(error).__name__
