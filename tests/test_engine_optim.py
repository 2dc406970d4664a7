"""Schedules point by point, and AdamW against its formula."""

import math

import pytest
import torch
import transformers
from support.batches import make, random_batch, train_one_step

from arealite.api.cli_args import OptimizerConfig
from arealite.api.errors import ConfigError
from arealite.engine.optim import learning_rate, make_optimizer


def rates(n, **changes):
    config = OptimizerConfig(lr=2.0, **changes)
    return [learning_rate(config, i, n) for i in range(n)]


def test_schedules():
    assert rates(4) == [2.0] * 4
    assert rates(4, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0]
    assert rates(5, lr_scheduler="linear") == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    assert rates(5, lr_scheduler="cosine", min_lr_ratio=0.5) == pytest.approx(
        [1 + 0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    )
    assert rates(6, lr_scheduler="linear", warmup_steps=2) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    config = OptimizerConfig(lr=1.0, lr_scheduler="linear", min_lr_ratio=0.1)
    assert learning_rate(config, 99, 5) == pytest.approx(0.1)
    with pytest.raises(ConfigError):
        learning_rate(config, 0, None)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps, warmup, per_step", [(1, 0, 1), (2, 0, 1), (6, 5, 1), (3, 2, 4), (1000, 10, 2)])
def test_every_update_of_a_run_learns(kind, num_steps, warmup, per_step):
    """Warm-up ends with the last update of its last step, and the end comes after the last update."""
    config = OptimizerConfig(lr=2.0, lr_scheduler=kind, warmup_steps=warmup)
    found = [learning_rate(config, i, num_steps, per_step) for i in range(num_steps * per_step)]
    assert min(found) > 0 and learning_rate(config, num_steps * per_step, num_steps, per_step) == pytest.approx(0)
    assert found.index(2.0) == max(warmup * per_step - 1, 0)


@pytest.mark.parametrize("num_updates, warmup", [(6, 0), (6, 2), (6, 5), (6, 6), (6, 9), (2, 0)])
@pytest.mark.parametrize("kind, floor", [("linear", 0.0), ("linear", 0.1), ("cosine", 0.0), ("cosine", 0.1)])
def test_schedules_equal_those_of_transformers(kind, floor, num_updates, warmup):
    """Which begin warm-up at 0, one update earlier. Warm-up may be as long as the run or longer; after the end the rate
    stays."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rising = transformers.get_scheduler("constant_with_warmup", optimizer, warmup).lr_lambdas[0]
    falling = transformers.get_scheduler(kind, optimizer, warmup, num_updates).lr_lambdas[0]
    config = OptimizerConfig(lr=2.0, lr_scheduler=kind, warmup_steps=warmup, min_lr_ratio=floor)
    for update in range(num_updates):
        share = rising(update + 1) if update < warmup else floor + (1 - floor) * falling(update)
        assert learning_rate(config, update, num_updates) == pytest.approx(2.0 * share), update
    if warmup < num_updates:
        assert learning_rate(config, num_updates + 7, num_updates) == pytest.approx(2.0 * floor)


@pytest.mark.usefixtures("one_process")
def test_schedules_count_steps_whatever_the_updates_in_each(tiny_llama):
    """Two updates per step: warm-up is the first of two steps, and the last of four updates has half the rate."""
    optimizer = OptimizerConfig(lr=2e-3, lr_scheduler="linear", warmup_steps=1)
    actor = make(tiny_llama, optimizer=optimizer, ppo_n_minibatches=2)
    actor.plan_steps(2)
    assert [train_one_step(actor, random_batch())["lr"] for _ in range(2)] == pytest.approx([2e-3, 1e-3])


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_matrices_decay_and_vectors_do_not(kind):
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,)))
    optimizer = make_optimizer([matrix, vector], OptimizerConfig(kind=kind, lr=0.1, weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros_like(matrix), torch.zeros_like(vector)
    optimizer.step()
    assert matrix.tolist() == [[pytest.approx(1 - 0.1 * 0.5)] * 3] * 2
    assert vector.tolist() == [1.0] * 3


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
