"""Spreads one Hugging Face model over the ranks; every dimension is a function. Called by engine/fsdp_engine.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from arealite.api.errors import ConfigError
from arealite.api.types import Dims
from arealite.engine.mesh import RankMesh


def parallelize(root: nn.Module, model: Any, mesh: RankMesh, dtype: torch.dtype) -> list[FSDPModule]:
    """Spread `model`, a transformers model inside of `root`, over `mesh`, computing in `dtype`.

    Returns its sharded modules, `root` last. Raises ConfigError for a model or layout that is not supported.
    """
    check_supported(model.config, mesh.dims)
    return shard(root, set(model._no_split_modules), mesh, dtype)


def check_supported(config: Any, dims: Dims) -> None:
    """Raises ConfigError with what is supported. `config`: the transformers configuration of the model."""
    for letter, size in (("t", dims.t), ("c", dims.c), ("e", dims.e)):
        if size > 1:
            raise ConfigError(f"the trainer's layout {dims} has {letter}{size}, which is not supported yet: use d only")


def shard(root: nn.Module, layer_classes: set[str], mesh: RankMesh, dtype: torch.dtype) -> list[FSDPModule]:
    """FSDP2 over float32 `root`, computing in `dtype`; returns its sharded modules, root last.

    Layers of `layer_classes` are gathered one at a time. Gradients are summed over ranks in float32, not averaged:
    losses carry global denominators. One rank keeps its compute copy between the passes, which costs one copy of the
    weights in `dtype` and saves two passes over all of them.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded: list[FSDPModule] = []

    def apply(module: nn.Module, over: DeviceMesh, reshard_after_forward: bool) -> None:
        fully_shard(module, mesh=over, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        assert isinstance(module, FSDPModule)
        if over.size() > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        else:
            module.set_reshard_after_backward(False, recurse=False)
        sharded.append(module)

    for layer in [m for m in root.modules() if type(m).__name__ in layer_classes]:
        apply(layer, mesh.shards, reshard_after_forward=mesh.shards.size() > 1)
    apply(root, mesh.stage, reshard_after_forward=False)
    return sharded
