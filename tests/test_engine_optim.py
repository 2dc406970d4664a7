"""Schedules point by point, and AdamW against its formula."""

import math

import pytest
import torch

from arealite.api.cli_args import OptimizerConfig
from arealite.api.errors import ConfigError
from arealite.engine.optim import learning_rate, make_optimizer


def rates(n, **changes):
    config = OptimizerConfig(lr=2.0, **changes)
    return [learning_rate(config, i, n) for i in range(n)]


def test_schedules():
    assert rates(4) == [2.0] * 4
    assert rates(4, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0]
    assert rates(5, lr_scheduler="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert rates(5, lr_scheduler="cosine", min_lr_ratio=0.5) == pytest.approx(
        [1 + 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    )
    assert rates(6, lr_scheduler="linear", warmup_steps=2) == pytest.approx([1.0, 2.0, 2.0, 4 / 3, 2 / 3, 0.0])
    config = OptimizerConfig(lr=1.0, lr_scheduler="linear", min_lr_ratio=0.1)
    assert learning_rate(config, 99, 5) == pytest.approx(0.1)
    with pytest.raises(ConfigError):
        learning_rate(config, 0, None)


def test_adamw_equals_its_formula():
    config = OptimizerConfig(lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-3)
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = make_optimizer([parameter], config)
    x, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 4):
        grads = [0.5 * step, -3.0]
        parameter.grad = torch.tensor([grads])
        optimizer.step()
        for i, g in enumerate(grads):
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.9 * v[i] + 0.1 * g * g
            x[i] *= 1 - 0.1 * 0.2
            x[i] -= 0.1 * (m[i] / (1 - 0.8**step)) / (math.sqrt(v[i] / (1 - 0.9**step)) + 1e-3)
    assert parameter.tolist()[0] == pytest.approx(x, rel=1e-5)
