"""Spreads one Hugging Face model over the ranks; every dimension is a function. Called by engine/sharded_model.py."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from arealite.api.errors import ConfigError
from arealite.api.types import Dims
from arealite.devices import is_gpu
from arealite.engine.parallel.layers import context_parallel, expert_parallel, tensor_parallel
from arealite.engine.parallel.ranks import RankMesh

# transformers' model types that can be spread by other dimensions than d
MODEL_TYPES = ("gemma3_text", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


def parallelize(
    root: nn.Module, model: Any, mesh: RankMesh, dtype: torch.dtype, offload: bool = False
) -> list[FSDPModule]:
    """Spread `model`, a transformers model inside of `root`, over `mesh`, computing in `dtype`; its shards and their
    gradients stay on the CPU if `offload`.

    Returns its sharded modules, `root` last. Raises ConfigError for a model or layout that is not supported.
    """
    check_supported(model.config, mesh.dims)
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    experts = [m for layer in layers for m in layer.modules() if any(p.ndim == 3 for p in m.parameters(recurse=False))]
    if mesh.dims.c > 1:
        context_parallel(model, layers, mesh.context)
    if mesh.dims.t > 1:
        tensor_parallel(layers, mesh.tensor, apart=experts)
    if mesh.dims.e > 1:
        expert_parallel(experts, mesh.experts[0])
    return _shard(root, layers, experts, mesh, dtype, offload)


def check_supported(config: Any, dims: Dims) -> None:
    """Raises ConfigError with what is supported. `config`: the transformers configuration of the model."""
    if max(dims.t, dims.c, dims.p, dims.e) > 1 and config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"a model of type {config.model_type} can be spread over the trainer's ranks by d only, and the layout is"
            f" {dims}; by t, c, p and e the types {', '.join(MODEL_TYPES)}"
        )
    if dims.p > config.num_hidden_layers:
        raise ConfigError(f"{config.num_hidden_layers} layers cannot be p{dims.p} stages: give p at most as many")
    if max(dims.t, dims.c) > 1:
        _check_heads(config, dims)
    if dims.e > 1:
        _check_experts(config, dims)


def _check_heads(config: Any, dims: Dims) -> None:
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % (dims.t * dims.c) or key_heads % dims.t:
        pairs = [(t, c) for t in _divisors(key_heads) for c in _divisors(heads // t)]
        raise ConfigError(
            f"{heads} attention heads and {key_heads} key heads cannot be spread by t = {dims.t} and c = {dims.c}: t"
            " must divide both numbers, and t x c the first. These work: "
            + ", ".join(f"t{t}" * (t > 1) + f"c{c}" * (c > 1) for t, c in pairs if t * c > 1)
        )
    settings = config.to_dict()
    biased = [key for key in ("attention_bias", "mlp_bias") if settings.get(key)]
    if dims.t > 1 and biased:
        raise ConfigError(f"{', '.join(biased)} of the model is set, which t = {dims.t} does not compute: use d, c, p")
    if config.intermediate_size % dims.t:
        sizes = _divisors(math.gcd(config.intermediate_size, key_heads))
        raise ConfigError(
            f"the model's intermediate size {config.intermediate_size} does not divide by t = {dims.t}; with its"
            f" {key_heads} key heads t may be {', '.join(map(str, sizes))}"
        )


def _check_experts(config: Any, dims: Dims) -> None:
    settings = config.to_dict()
    num_experts = settings.get("num_experts", settings.get("num_local_experts"))
    if not num_experts:
        raise ConfigError(f"a model of type {config.model_type} has no experts, and the layout is {dims}: leave e out")
    num_ranks = dims.d * dims.c * dims.t
    if num_experts % dims.e or num_ranks % dims.e:
        sizes = _divisors(math.gcd(num_experts, num_ranks))
        raise ConfigError(
            f"{num_experts} experts cannot be spread over e = {dims.e} of d x c x t = {num_ranks} ranks: e must divide"
            f" both numbers, so it may be {', '.join(map(str, sizes))}"
        )
    widths = (config.hidden_size, 2 * settings.get("moe_intermediate_size", config.intermediate_size))
    if any(width % (num_ranks // dims.e) for width in widths):
        raise ConfigError(
            f"each expert is cut over d x c x t / e = {num_ranks // dims.e} ranks, which must divide the hidden size"
            f" {widths[0]} and twice the experts' intermediate size, {widths[1]}: raise e"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _shard(
    root: nn.Module,
    layers: Collection[nn.Module],
    experts: Collection[nn.Module],
    mesh: RankMesh,
    dtype: torch.dtype,
    offload: bool,
) -> list[FSDPModule]:
    """FSDP2 over float32 `root`, computing in `dtype`; returns its sharded modules, root last.

    `layers` are gathered one at a time, and `experts` in them apart where other ranks have other tokens for them.
    Gradients are summed over ranks in float32, not averaged: losses carry global denominators. One rank keeps its
    compute copy between the passes, which costs one copy of the weights in `dtype` and saves two passes over all of
    them; frozen weights, which are in `dtype`, are their own copy there.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=is_gpu(mesh.device)) if offload else OffloadPolicy()
    sharded: list[FSDPModule] = []
    is_alone = mesh.stage.size() == 1 and not offload
    left_alone = {p for p in root.parameters() if is_alone and not p.requires_grad}

    def apply(module: nn.Module, over: DeviceMesh, reshard_after_forward: bool, dim: int = 0) -> None:
        fully_shard(
            module,
            mesh=over,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            offload_policy=place,
            shard_placement_fn=lambda _: Shard(dim),
            ignored_params=left_alone,
        )
        assert isinstance(module, FSDPModule)
        if over.size() > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        else:
            module.set_reshard_after_backward(False, recurse=False)
        sharded.append(module)

    if mesh.dims.e > 1:  # ranks have whole experts already, maybe fewer than there are ranks in expert_shards
        over = mesh.experts[1]
        for module in experts:
            apply(module, over, reshard_after_forward=over.size() > 1, dim=1)
    elif mesh.dims.t > 1:
        for module in experts:
            apply(module, mesh.stage, reshard_after_forward=True)
    for layer in layers:
        apply(layer, mesh.shards, reshard_after_forward=mesh.shards.size() > 1)
    apply(root, mesh.stage, reshard_after_forward=False)
    return sharded
