"""What the trainer keeps, and where: weights and moments on the accelerator or out of its way on the CPU, activations
or what they are computed again from. Called by engine/sharded_model.py, engine/fsdp_engine.py and what they call.

From a GPU tensors go into pinned memory, which PyTorch keeps for the next time, and come back out of it: all copies are
under way at once, and waited for once.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn.attention import varlen  # noqa: F401  (registers its operation)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from arealite.api.cli_args import TrainEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Dims
from arealite.devices import CPU, free_bytes, give_back, is_gpu, sizes, wait_for
from arealite.engine.parallel.ranks import RankCollective
from arealite.models.rank_memory import ModelShape, settled

logger = logging.getLogger(__name__)

# What selective checkpointing keeps: products of matrices, and attention on GPUs.
KEPT = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.torch_attn._varlen_attn.default}


def on_device(x: np.ndarray, device: torch.device) -> torch.Tensor:
    """`x` on `device`; a GPU goes on with what it does meanwhile."""
    tensor = torch.from_numpy(x)
    return tensor.pin_memory().to(device, non_blocking=True) if is_gpu(device) else tensor


@contextmanager
def explained_shortage(what: str, device: torch.device) -> Iterator[None]:
    """Around work on a GPU; raises ConfigError when its memory does not suffice for it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = " GiB, ".join(f"{name} {number / 2**30:.1f}" for name, number in sizes(device).items())
        raise ConfigError(
            f"{device} has too little memory for {what} ({told} GiB): lower max_tokens_per_mb, or set"
            f" gradient_checkpointing=full (or selective), or offload=optimizer (or all). {error}"
        ) from error


class Placement:
    """Moves the shards of `model` and the state of `optimizer` between the CPU and `device`. What `offload` (of
    api.cli_args.TrainEngineConfig) keeps on the CPU stays there: with "all" by FSDP's own policy."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device, offload: str
    ) -> None:
        self.model, self.optimizer, self.device, self.offload = model, optimizer, device, offload
        if offload == "optimizer":
            self._move_moments(CPU)
            wait_for(device)

    def step(self) -> None:
        """The optimizer's; its state is where the weights are meanwhile."""
        assert self.optimizer is not None
        if self.offload == "optimizer":
            self._move_moments(self.device)
        self.optimizer.step()
        if self.offload == "optimizer":
            self._move_moments(CPU)
            wait_for(self.device)

    def sleep(self) -> None:
        self._move(CPU)
        give_back()

    def wake(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.offload != "all":
            # Parameters stay the same objects, which the optimizer knows; FSDP takes the new shards from them.
            before = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(True)
            try:
                self.model._apply(lambda tensor: moved(tensor, device))
            finally:
                torch.__future__.set_swap_module_params_on_conversion(before)
        if self.offload == "none":
            self._move_moments(device)
        wait_for(self.device)

    def _move_moments(self, device: torch.device) -> None:
        states: list[dict[str, Any]] = [] if self.optimizer is None else list(self.optimizer.state.values())
        for state in states:
            state.update({key: moved(x, device) for key, x in state.items() if isinstance(x, torch.Tensor)})


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` itself if it is there already; a copy of a GPU's tensor is there after `wait_for`."""
    return tensor.to(device, non_blocking=True)


def shape_of(model: Any) -> ModelShape:
    """Of a whole transformers model. Raises KeyError: it is no plain decoder."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    num_parameters = sum(p.numel() for p in model.parameters())
    is_tied = head is None or bool(model.config.tie_word_embeddings)
    return ModelShape.of(config.to_dict(), num_parameters, is_tied)


def settle_checkpointing(
    config: TrainEngineConfig, model: Any, dims: Dims, device: torch.device, ranks: RankCollective
) -> TrainEngineConfig:
    """`config` with `gradient_checkpointing: auto` decided for a model that is to be loaded: what is free where a rank
    has least of it decides for all. The ranks of a host share its memory evenly. Raises ConfigError: it is of a kind
    whose memory the estimate does not know. Collective."""
    if config.gradient_checkpointing != "auto":
        return config
    try:
        shape = shape_of(model)
    except KeyError as error:
        raise ConfigError(
            f"gradient_checkpointing is auto, and the configuration of {config.path} has no {error}, by which its"
            " memory would be estimated; set none, selective or full"
        ) from error
    each = ranks.gather((platform.node(), free_bytes(device) or psutil.virtual_memory().available))
    hosts = [host for host, _ in each]
    free = min(num_bytes / (1 if is_gpu(device) else hosts.count(host)) for host, num_bytes in each)
    chosen, needed = settled(config, shape, dims, free, is_gpu(device))
    told = ", ".join(f"{name} {num_bytes / 2**30:.2f}" for name, num_bytes in needed.items())
    if ranks.rank == 0:
        words = "gradient_checkpointing auto is %s: %.2f GiB are free for a rank, which needs with %s"
        logger.warning(words, chosen.gradient_checkpointing, free / 2**30, told)
    return chosen


def checkpoint_activations(model: Any, kind: str) -> None:
    """Let a layer's backward pass compute again what its forward pass did not keep. `kind`: "none" keeps everything;
    "full" keeps the input of each layer; "selective" also the results of matrix products with weights, and on GPUs
    those of attention, so that the rest alone is computed twice.

    The layers of a transformers model, whose randomness is off, are changed in place.
    """
    contexts: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
    for layer in model.modules():
        if kind != "none" and type(layer).__name__ in model._no_split_modules:
            # Its forward is replaced, not its call: FSDP's hooks stay outside and gather its weights once for both.
            layer.forward = partial(checkpoint, layer.forward, **contexts)


def _keep(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
