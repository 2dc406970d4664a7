"""LoRA (arXiv:2106.09685) by peft: trained adapters beside the frozen linear layers of a model. For
engine/sharded_model.py."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arealite.api.cli_args import LoRAConfig
from arealite.api.errors import ConfigError

ADAPTER = "default"  # what peft calls the one adapter that a model has
FILE_PREFIX = "base_model.model."  # of every tensor in an adapter's file


def freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold parameters that nobody trains in the dtype that they are computed in; buffers stay as they are."""
    model.requires_grad_(False)
    model._apply(lambda t: t.to(dtype) if isinstance(t, nn.Parameter) else t)


def add_adapters(model: Any, config: LoRAConfig, seed: int) -> dict[str, Any]:
    """Put adapters into `model`, a frozen transformers model on any device (also on the meta device), in place.

    Of an adapter, A [rank, in] is uniform as in peft and follows from `seed` and its name alone, B [out, rank] is 0,
    so that the model computes what it did; both are float32, on the CPU. Their names are peft's, such as
    "model.layers.0.self_attn.q_proj.lora_A.default.weight".

    Returns the content of PEFT's adapter_config.json.

    Raises:
        ConfigError: there is no peft, or a target is no linear layer of the model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"actor.lora needs peft ({error}): pip install 'arealite[lora]'") from error
    _check_targets(model, config.target_modules)
    base = model.config.name_or_path  # read from other working directories too
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=sorted(config.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
    )
    inject_adapter_in_model(settings, model, ADAPTER)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" in name:
            module.to_empty(device="cpu").float().requires_grad_(True)
            _initialise(name, module.weight.detach(), seed)
    return _as_json(settings.to_dict())


def file_name(name: str) -> str | None:
    """The name in PEFT's files of the parameter that is called `name` in the model; None: it is not of an adapter."""
    return FILE_PREFIX + name.replace(f".{ADAPTER}.", ".") if ".lora_" in name else None


def base_name(name: str) -> str:
    """What a parameter of the frozen model was called before it got adapters."""
    return name.replace(".base_layer.", ".")


def _check_targets(model: Any, targets: list[str]) -> None:
    layers = [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules)]
    found = {n.rpartition(".")[2] for layer in layers for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    if absent := [target for target in targets if target not in found]:
        experts = any(p.dim() == 3 for layer in layers for p in layer.parameters())
        raise ConfigError(
            f"actor.lora.target_modules names {', '.join(absent)}, but the linear layers of {type(model).__name__} are"
            f" {', '.join(sorted(found))}: choose among these"
            + (" (its experts are no linear layers, and cannot have adapters)" if experts else "")
        )


def _initialise(name: str, weight: torch.Tensor, seed: int) -> None:
    """peft's distributions, from a stream of random numbers of the layer's own: the same in every layout."""
    if ".lora_B." in name:
        weight.zero_()
    else:
        key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        bound = weight.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        weight.uniform_(-bound, bound, generator=generator)


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
