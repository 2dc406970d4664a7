"""Activation checkpointing: a layer's backward pass computes again what its forward pass did not keep. Called by
engine/fsdp_engine.py. (Checkpoints on disk are checkpoint.py.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import varlen  # noqa: F401  (registers its operation)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Products of matrices, and attention on GPUs.
KEPT = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.torch_attn._varlen_attn.default}


def checkpoint_activations(model: Any, kind: str) -> None:
    """`kind`: "none" keeps everything; "full" keeps the input of each layer; "selective" also the results of matrix
    products with weights, and on GPUs those of attention, so that the rest alone is computed twice.

    The layers of a transformers model, whose randomness is off, are changed in place.
    """
    if kind == "none":
        return
    contexts = {} if kind == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, _keep)}
    for layer in model.modules():
        if type(layer).__name__ in model._no_split_modules:
            _checkpoint(layer, contexts)


def _checkpoint(layer: nn.Module, contexts: dict[str, Any]) -> None:
    # Its forward is replaced, not its call: FSDP's hooks stay outside and gather its weights once for both.
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **contexts)


def _keep(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
