"""Experts on several ranks: tokens that go unevenly, refusals. Whole training steps are in test_engine_layouts.py."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.layouts import on_ranks
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from arealite.api.errors import ConfigError
from arealite.api.types import Dims
from arealite.engine.parallel.layers import expert_parallel
from arealite.engine.parallel.spread import check_supported

NUM_EXPERTS, NUM_TOKENS = 4, 5
# By rank, the two experts of each of its tokens.
CHOICES = {
    "everywhere": [[[0, 1], [2, 3], [3, 0], [1, 2], [2, 0]], [[3, 1], [3, 2], [0, 3], [1, 0], [2, 1]]],
    "all to the first rank": [[[0, 1]] * NUM_TOKENS, [[1, 0]] * NUM_TOKENS],
    "all to one expert of the other": [[[3, 2]] * NUM_TOKENS, [[2, 3]] * NUM_TOKENS],
    "each rank keeps its own": [[[0, 1]] * NUM_TOKENS, [[2, 3]] * NUM_TOKENS],
}


def experts_module(implementation: str) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        num_experts=NUM_EXPERTS, hidden_size=8, moe_intermediate_size=16, experts_implementation=implementation
    )
    module = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


def inputs(rank: int, choice: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + rank)
    tokens = torch.randn(NUM_TOKENS, 8, generator=generator).requires_grad_()
    weights = torch.rand(NUM_TOKENS, 2, generator=generator).requires_grad_()
    return tokens, torch.tensor(CHOICES[choice][rank]), weights


def dispatch(rank: int, implementation: str) -> dict[str, list[np.ndarray]]:
    """Output, gradients of the inputs, gradients of this rank's experts."""
    module = experts_module(implementation)
    expert_parallel([module], DeviceMesh("cpu", torch.arange(dist.get_world_size()), mesh_dim_names=("e",)))
    found = {}
    for choice in CHOICES:
        tokens, chosen, weights = inputs(rank, choice)
        out = module(tokens, chosen, weights)
        out.square().sum().backward()
        gradients = [p.grad.to_local() for p in module.parameters()]
        found[choice] = [x.numpy() for x in (out.detach(), tokens.grad, weights.grad, *gradients)]
        module.zero_grad()
    return found


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_on_two_ranks_equal_those_of_one(implementation):
    ranks = on_ranks(2, dispatch, implementation)
    for choice in CHOICES:
        module = experts_module(implementation)
        for rank, found in enumerate(ranks):
            tokens, chosen, weights = inputs(rank, choice)
            out = module(tokens, chosen, weights)
            out.square().sum().backward()
            for own, wanted in zip(found[choice], (out, tokens.grad, weights.grad), strict=False):
                np.testing.assert_allclose(own, wanted.detach(), rtol=1e-5, atol=1e-4, err_msg=choice)
        for i, parameter in enumerate(module.parameters()):
            whole = np.concatenate([found[choice][3 + i] for found in ranks])  # zeros where no token came, never None
            np.testing.assert_allclose(whole, parameter.grad, rtol=1e-5, atol=1e-3, err_msg=choice)


SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
MOE = Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=32)


@pytest.mark.parametrize(
    "config, dims, told",
    [
        (Qwen3Config(**SIZES), Dims(d=2, e=2), "qwen3 has no experts"),
        (MOE, Dims(d=4, e=4), "6 experts .* it may be 1, 2"),
        (MOE, Dims(d=2, t=2, e=3), "d x c x t = 4 ranks"),
        (MOE, Dims(d=6, e=2), "which must divide the hidden size 64"),
        (MixtralConfig(**SIZES, num_local_experts=6), Dims(d=4, e=4), "6 experts"),
    ],
)
def test_what_is_not_supported_is_told(config, dims, told):
    with pytest.raises(ConfigError, match=told):
        check_supported(config, dims)
    check_supported(MOE, Dims(d=2, t=2, e=2))
