"""A Hugging Face model spread over the trainer ranks, built whole by one function; its weights by name and as a
folder.

Called by engine/fsdp_engine.py, which trains and scores with it, and by engine/upload.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from arealite.api.cli_args import TrainEngineConfig
from arealite.devices import CPU
from arealite.engine import export
from arealite.engine.flops import ModelFlops
from arealite.engine.loading import Checkpoint, materialize
from arealite.engine.lora import add_adapters, base_name, file_name, freeze
from arealite.engine.memory import Placement, checkpoint_activations, settle_checkpointing
from arealite.engine.optim import RoundingWatch, make_optimizer
from arealite.engine.packed_model import LANGUAGE, Head, PackedModel, load_model, zero_new_head
from arealite.engine.parallel.pipeline import Runner, over_stages, split_stages
from arealite.engine.parallel.ranks import RankCollective, RankMesh
from arealite.engine.parallel.spread import parallelize
from arealite.models.fetch import resolve_model
from arealite.models.naming import hub_tensors
from arealite.weights.wire import SHARD_BYTES

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ShardedModel:
    """What a rank has of one model. All methods are collective calls."""

    folder: str  # or hub id
    dtype: torch.dtype  # that it computes in, and is served and saved in
    mesh: RankMesh
    collective: RankCollective  # of the ranks that have the model
    hf_model: Any  # transformers' model of this rank's pipeline stage
    model: PackedModel  # around it
    runner: Runner
    checkpoint: Checkpoint
    adapter: dict[str, Any] | None  # LoRA: what PEFT's adapter_config.json says
    parameters: dict[str, nn.Parameter]  # float32 shards of those that are trained; of all, where none is
    tied: str | None  # the parameter that the first and the last pipeline stage have a copy of
    modules: list[FSDPModule]  # the root last
    optimizer: torch.optim.Optimizer | None
    placement: Placement
    rounding: RoundingWatch
    flops: ModelFlops
    num_embeddings: int

    def reshard(self) -> None:
        """Drop the compute copies that were gathered for a pass: the weights are others now, or memory is wanted."""
        for module in self.modules:
            module.reshard()

    def file_name(self, name: str) -> str | None:
        """What files and servers call the parameter `name`; None: they do not get it."""
        return name if self.adapter is None else file_name(name)

    def named_full_tensors(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, whole tensor in `dtype` on `device`); tied weights once. By default the compute dtype, on
        the CPU. With LoRA: those of the adapter, by PEFT's names. Every rank must iterate to the end."""
        own = export.full_tensors(self.hf_model, dtype or self.dtype, self.mesh.device, self.file_name)
        return ((name, t.to(device or CPU)) for name, t in over_stages(own, self.mesh, self.collective))

    def hub_tensors(self, device: torch.device | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The same by the hub's names, with experts one by one: SGLang and vLLM know no others."""
        return hub_tensors(self.named_full_tensors(device=device), self.checkpoint.hub_parts)

    def save(self, path: str, tokenizer: PreTrainedTokenizerBase | None = None, shard_bytes: int = SHARD_BYTES) -> None:
        """Write a Hugging Face folder in the compute dtype, atomically; with LoRA the adapter in float32, in PEFT's
        format. `tokenizer` comes along, that of the model's own folder if not given. OSError on rank 0 when it cannot
        be written."""
        source = self.folder if tokenizer is None else tokenizer.name_or_path
        is_writer = self.collective.rank == 0
        if self.adapter is not None:
            adapter = {name: tensor for name, tensor in self.named_full_tensors(torch.float32) if is_writer}
            if is_writer:
                export.write_adapter_folder(path, adapter, self.adapter, source)
            return
        tensors = self.hub_tensors()
        if is_writer:
            end_token = None if tokenizer is None else tokenizer.eos_token_id
            export.write_folder(path, tensors, self.hf_model, self.dtype, source, end_token, shard_bytes)
        for _ in tensors:  # the writer is through already
            pass


def build_sharded(
    config: TrainEngineConfig, mesh: RankMesh, collective: RankCollective, head: Head, trainable: bool
) -> ShardedModel:
    """Load the model of `config.path` onto the ranks of `mesh`, its weights each to the rank that has them, and make
    the optimizer. Collective. Raises ConfigError: it cannot be spread so."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(config.seed + collective.rank)
    folder = resolve_model(config.path)
    hf_model = load_model(folder, head)
    if trainable:
        config = settle_checkpointing(config, hf_model, mesh.dims, mesh.device, collective)
    return spread_model(
        config, hf_model, Checkpoint(folder, hf_model, head.may_lack), mesh, collective, head, trainable
    )


def spread_model(
    config: TrainEngineConfig,
    hf_model: Any,
    checkpoint: Checkpoint,
    mesh: RankMesh,
    collective: RankCollective,
    head: Head,
    trainable: bool,
    placing: AbstractContextManager[Any] | None = None,
) -> ShardedModel:
    """As `build_sharded`, of a whole model whose parameters have no memory yet; those of `checkpoint` come into it.
    `placing`: around what gives them memory."""
    device, dtype, adapter = mesh.device, DTYPES[config.dtype], None
    if not trainable or config.lora is not None:
        freeze(hf_model, dtype)
    if trainable and config.lora is not None:
        adapter = add_adapters(hf_model, config.lora, config.seed)
    flops, num_embeddings = ModelFlops.of(hf_model), int(hf_model.get_input_embeddings().weight.shape[0])
    tied = split_stages(hf_model, mesh)
    checkpoint_activations(hf_model, config.gradient_checkpointing if trainable else "none")
    model = PackedModel(hf_model, head, config.logprob_chunk_tokens, mesh)
    is_offloaded = config.offload == "all"
    with placing or nullcontext():
        model._apply(lambda t: t if t.is_meta else t.to(device))  # buffers, adapters
        modules = parallelize(model, hf_model, mesh, dtype, is_offloaded)
        materialize(model, CPU if is_offloaded else device)
        checkpoint.load({base_name(name): t for name, t in hf_model.state_dict(keep_vars=True).items()})
        if head is not LANGUAGE:
            zero_new_head(hf_model, checkpoint)
        # Taken here, because modules hold the gathered compute copies instead between the passes.
        parameters = {name: p for name, p in hf_model.named_parameters() if p.requires_grad == trainable}
        optimizer = make_optimizer(parameters.values(), config.optimizer) if trainable else None
    return ShardedModel(
        folder=str(checkpoint.folder),
        dtype=dtype,
        mesh=mesh,
        collective=collective,
        hf_model=hf_model,
        model=model,
        runner=Runner(model, mesh, collective, dtype),
        checkpoint=checkpoint,
        adapter=adapter,
        parameters=parameters,
        tied=tied,
        modules=modules,
        optimizer=optimizer,
        placement=Placement(model, optimizer, device, config.offload),
        rounding=RoundingWatch(parameters.values(), dtype),
        flops=flops,
        num_embeddings=num_embeddings,
    )
