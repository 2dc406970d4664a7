"""Schedules point by point, and the global gradient norm."""

import math

import pytest
import torch

from arealite.api.cli_args import OptimizerConfig
from arealite.api.errors import ConfigError
from arealite.engine.optim import gradient_norm, learning_rate, make_optimizer, scale_down


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


def test_norm_and_clipping():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 2)]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((4,), -1.0)
    norm, grads = gradient_norm(parameters, lambda x, op: x)
    assert norm == pytest.approx(4.0)
    scale_down(grads, norm, 5.0)
    assert parameters[0].grad.tolist() == [2.0] * 3
    scale_down(grads, norm, 1.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.5] * 3)
    assert parameters[1].grad.tolist() == pytest.approx([-0.25] * 4)
    parameters[1].grad[2] = torch.inf
    assert not math.isfinite(gradient_norm(parameters, lambda x, op: x)[0])


def test_adamw_equals_its_formula():
    config = OptimizerConfig(lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-3)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer([parameter], config)
    x, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 4):
        grads = [0.5 * step, -3.0]
        parameter.grad = torch.tensor(grads)
        optimizer.step()
        for i, g in enumerate(grads):
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.9 * v[i] + 0.1 * g * g
            x[i] *= 1 - 0.1 * 0.2
            x[i] -= 0.1 * (m[i] / (1 - 0.8**step)) / (math.sqrt(v[i] / (1 - 0.9**step)) + 1e-3)
    assert parameter.tolist() == pytest.approx(x, rel=1e-5)
