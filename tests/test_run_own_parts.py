"""Workflows and losses of a user's own: what they say is logged, whatever it is, and what is wrong is a sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.batches import actor_config, random_batch, started, train_one_step
from support.own_parts import reinforce
from support.rollout import Episodes, trajectory
from support.runs import Run

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ConfigError, DatasetError
from arealite.api.types import Group, Task
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.observe.records import rollout_rows, rollout_stats
from arealite.trainer import PPOTrainer


@pytest.fixture
def make(tiny_llama, one_process):
    def made(loss_fn, **changes):
        return started(FSDPPPOActor(actor_config(tiny_llama, **changes), loss_fn=loss_fn))

    return made


def test_a_run_with_both(tmp_path, tiny_llama):
    run = Run(tmp_path, tiny_llama, "total_train_steps=2")
    run.command[4] = str(Path(__file__).with_name("support") / "own_parts.py")
    with run:
        summary = run.succeed()
    steps = [line for line in run.metrics() if "step_s" in line]
    assert summary["steps"] == len(steps) == 2 and summary["accuracy_after"] is not None
    for line in steps:
        assert (line["workflow_num_asked"], line["workflow_half"], line["ones"]) == (4, 1, 1)
        assert line["surprise"] > 0 and "advantage_max" in line and "entropy" not in line


def test_own_statistics_are_means_over_tokens_or_the_largest(make):
    """Over micro-batches and updates; one that only some of them know has nothing to add in the others."""
    seen = []

    def loss_fn(logp, entropy, columns, config, over):
        loss, found = reinforce(logp, entropy, columns, config, over)
        seen.append((len(logp), float(columns.advantages.max())))
        return loss, found | ({"first": len(logp), "nothing": float("nan")} if len(seen) == 1 else {})

    stats = train_one_step(make(loss_fn, ppo_n_minibatches=2, max_tokens_per_mb=40), random_batch())
    num_tokens = sum(n for n, _ in seen)
    assert len(seen) > 2 and stats["num_tokens"] == num_tokens and stats["ones"] == pytest.approx(1)
    assert stats["advantage_max"] == pytest.approx(max(largest for _, largest in seen))
    assert stats["first"] == pytest.approx(seen[0][0] / num_tokens) and stats["nothing"] != stats["nothing"]
    assert "entropy" not in stats and stats["skipped"] == 0


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (lambda loss: loss, "returned Tensor; expected .loss, "),
        (lambda loss: (loss, {}, 1), "returned tuple"),
        (lambda loss: (float(loss.detach()), {}), "returned the loss .*scalar tensor with gradient"),
        (lambda loss: (loss.detach(), {}), "scalar tensor with gradient"),
        (lambda loss: (loss[None], {}), "scalar tensor with gradient"),
        (lambda loss: (loss, {"x": torch.ones(2)}), "the statistic x = tensor.*sums over the tokens"),
        (lambda loss: (loss, {"x": "much"}), "the statistic x = 'much'"),
        (lambda loss: (loss, {"loss": 1.0, "lr": 2.0}), "statistics loss, lr, which others are called"),
    ],
)
def test_what_a_loss_returns_is_checked(make, returned, told):
    def loss_fn(logp, *others):
        return returned(reinforce(logp, *others)[0])

    with pytest.raises(ConfigError, match=told):
        train_one_step(make(loss_fn), random_batch())


def test_statistics_of_a_workflow_are_logged_and_checked(head):
    task = Task(id="r0", prompt="")
    ok = [replace(trajectory(task, i), statistics={"num_turns": i, "odd": float("nan")}) for i in range(2)]
    group = Group(task, 0, [*ok, trajectory(task, 2)])
    stats = rollout_stats([group])
    assert stats["workflow_num_turns"] == 0.5 and stats["workflow_odd"] != stats["workflow_odd"]
    assert [row["statistics"] for row in rollout_rows([group])][1]["num_turns"] == 1

    engine = head()
    for found, told in (({"x": torch.tensor(3)}, None), ({"x": "many"}, "the statistics {'x': 'many'}: could not")):
        workflow = Episodes(lambda task, tries, found=found: [replace(trajectory(task), statistics=found)])
        (group,) = engine.run_groups([task], workflow)
        (t,) = group.trajectories
        assert (t.statistics == {"x": 3.0} and type(t.statistics["x"]) is float) if told is None else told in t.error


def test_a_trainer_needs_a_reward_or_a_workflow(tiny_llama, tmp_path):
    config = GRPOConfig()
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "1"}')
    config.train_dataset.path = str(tmp_path / "rows.jsonl")
    config.actor.path = tiny_llama
    with pytest.raises(DatasetError, match="nothing says how to grade answers: give the script a reward function"):
        PPOTrainer(config).train()
    with pytest.raises(ConfigError, match="workflow is a int; expected arun_episode and close"):
        PPOTrainer(config, workflow=3)
