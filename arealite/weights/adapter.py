"""A LoRA adapter as a folder in PEFT's format. Called by link.py (for the servers) and engine/export.py (a result)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SERVED_NAME = "policy"  # what the trained adapter is called on the servers; one name: it is replaced in place


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Write `tensors` (PEFT's names) and adapter_config.json's `settings` into an existing folder. Raises OSError."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
