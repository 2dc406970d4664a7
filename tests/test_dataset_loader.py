"""The stream of tasks: complete epochs, an order that follows from the seed, exact resumption at any position."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.api.cli_args import DatasetConfig, GRPOConfig, OptimizerConfig, PPOCriticConfig
from arealite.api.errors import ConfigError, DatasetError, RecoveryError
from arealite.api.types import Task
from arealite.dataset.loader import StatefulDataLoader, load_tasks
from arealite.dataset.sources import reasoning_gym_reward


def config_of(seed=1, batch_size=4, shuffle=True) -> GRPOConfig:
    return GRPOConfig(seed=seed, train_dataset=DatasetConfig(batch_size=batch_size, shuffle=shuffle))


def tasks_of(count: int) -> list[Task]:
    return [Task(id=f"r{i}", prompt=f"question {i}", answer=str(i)) for i in range(count)]


def take(loader, count: int) -> list[str]:
    return [task.id for task in itertools.islice(loader, count)]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 12), drawn=st.integers(0, 60), ahead=st.integers(0, 30), seed=st.integers(0, 5))
def test_a_loader_resumes_exactly_at_any_position(count, drawn, ahead, seed):
    straight = StatefulDataLoader(tasks_of(count), config_of(seed))
    take(straight, drawn)
    saved = json.loads(json.dumps(straight.state_dict()))
    resumed = StatefulDataLoader(tasks_of(count), config_of(seed))
    take(resumed, ahead)  # whatever it drew before is forgotten
    resumed.load_state_dict(saved)
    assert take(resumed, 2 * count + 1) == take(straight, 2 * count + 1)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 20), seed=st.integers(0, 5), shuffle=st.booleans())
def test_every_epoch_draws_every_row_once_under_its_own_name(count, seed, shuffle):
    loader = StatefulDataLoader(tasks_of(count), config_of(seed, shuffle=shuffle))
    ids = take(loader, 3 * count)
    for epoch in range(3):
        assert sorted(ids[epoch * count : (epoch + 1) * count]) == sorted(f"e{epoch}-r{i}" for i in range(count))
    if not shuffle:
        assert ids == [f"e{e}-r{i}" for e in range(3) for i in range(count)]


def test_orders_differ_by_epoch_and_by_seed():
    def rows(seed):
        return [task_id.split("-")[1] for task_id in take(StatefulDataLoader(tasks_of(30), config_of(seed)), 60)]

    assert rows(1) == rows(1)
    assert rows(1)[:30] != rows(1)[30:]
    assert rows(1) != rows(2)


def test_steps_per_epoch_covers_every_row():
    assert StatefulDataLoader(tasks_of(8), config_of(batch_size=4)).steps_per_epoch == 2
    assert StatefulDataLoader(tasks_of(9), config_of(batch_size=4)).steps_per_epoch == 3
    assert StatefulDataLoader(tasks_of(1), config_of(batch_size=4)).steps_per_epoch == 1


@pytest.mark.parametrize("length", [{"total_train_steps": 6}, {"total_train_epochs": 2}])
def test_warm_up_is_checked_by_steps_as_by_epochs(length):
    """12 rows in batches of 4: an epoch has 3 steps."""
    config = config_of()
    vars(config).update(length)
    config.actor.ppo_n_minibatches = 2  # updates are no steps
    config.actor.optimizer.warmup_steps = 5
    assert StatefulDataLoader(tasks_of(12), config).total_steps == 6
    config.actor.optimizer.warmup_steps = 6
    with pytest.raises(ConfigError, match=r"actor.optimizer.warmup_steps \(6\) leaves nothing of the run's 6 steps"):
        _ = StatefulDataLoader(tasks_of(12), config).total_steps
    config.actor.optimizer.warmup_steps, config.critic = 0, PPOCriticConfig(optimizer=OptimizerConfig(warmup_steps=9))
    with pytest.raises(ConfigError, match=r"critic.optimizer.warmup_steps \(9\)"):
        _ = StatefulDataLoader(tasks_of(12), config).total_steps


def test_a_changed_stream_is_not_resumed():
    saved = StatefulDataLoader(tasks_of(5), config_of()).state_dict()
    changed = tasks_of(5)
    changed[3] = Task(id="r3", prompt="another question", answer="3")
    for loader, name in (
        (StatefulDataLoader(tasks_of(6), config_of()), "num_tasks was 5 and is 6"),
        (StatefulDataLoader(tasks_of(5), config_of(seed=2)), "seed was 1 and is 2"),
        (StatefulDataLoader(changed, config_of()), "fingerprint was"),
    ):
        with pytest.raises(RecoveryError, match=name):
            loader.load_state_dict(saved)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def test_long_prompts_are_left_out_counted_and_reported_once(tokenizer, tmp_path, caplog):
    rows = [{"question": "short", "answer": "0"}, {"question": "long " * 50, "answer": "1"}]
    rows += [{"text": "x", "answer": "2"}, {"question": "also short", "answer": "3"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = [{"role": "user", "content": "also short"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    limit = len(tokenizer(text)["input_ids"])
    with caplog.at_level(logging.WARNING):
        dataset = load_tasks(DatasetConfig(path=str(path), max_prompt_tokens=limit), tokenizer, seed=1)
    assert [task.id for task in dataset] == ["r0", "r2", "r3"], "a prompt of exactly the limit stays"
    assert len(caplog.records) == 1
    assert f"1 of 4 rows are left out: 1 exceed max_prompt_tokens ({limit}), the first is" in caplog.text
    with pytest.raises(DatasetError, match=r"4 exceed max_prompt_tokens \(0\), .* the shortest has 1 tokens"):
        load_tasks(DatasetConfig(path=str(path), max_prompt_tokens=0), tokenizer, seed=1)
    path.write_text("")
    with pytest.raises(DatasetError, match="has no rows"):
        load_tasks(DatasetConfig(path=str(path)), tokenizer, seed=1)


def sums(seed=1, **changes):
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return DatasetConfig(**{"path": "reasoning_gym:chain_sum", "num_rows": 20, "params": params} | changes)


def reward_of(task: Task, completion: str) -> float:
    extras = json.loads(json.dumps(task.extras))
    return reasoning_gym_reward("", completion, [], [], **extras, answer=task.answer)


def test_reasoning_gym_tasks_carry_their_own_verifier(tokenizer):
    dataset = load_tasks(sums(system_prompt="Be brief."), tokenizer, seed=1)
    assert len(dataset) == 20
    task = dataset[3]
    assert [m["role"] for m in task.messages] == ["system", "user"]
    assert reward_of(task, task.answer) == reward_of(task, f"I think <answer>{task.answer}</answer>, yes.") == 1.0
    assert reward_of(task, "no idea") < 0.1
    assert reward_of(task, f"<answer>{int(task.answer) + 1}</answer>") < 0.1


@pytest.mark.parametrize("name", ["basic_arithmetic", "letter_counting", "countdown", "knights_knaves", "leg_counting"])
def test_verifiers_survive_the_way_through_json(tokenizer, name):
    task = load_tasks(DatasetConfig(path=f"reasoning_gym:{name}", num_rows=2), tokenizer, seed=1)[1]
    assert reward_of(task, task.answer) == 1.0


def test_generated_splits_share_no_run_of_tasks(tokenizer):
    def questions(seed, split):
        return [t.messages[0]["content"] for t in load_tasks(sums(split=split), tokenizer, seed)]

    train = questions(1, "train")
    assert train == questions(1, "train")
    for other in (questions(1, "test"), questions(2, "train")):
        assert not any(train[i : i + 5] == other[j : j + 5] for i in range(16) for j in range(16))


def test_reasoning_gym_errors(tokenizer):
    with pytest.raises(DatasetError, match="cannot make task 'no_such_task'"):
        load_tasks(sums(path="reasoning_gym:no_such_task", params={}), tokenizer, 1)
    with pytest.raises(DatasetError, match="unexpected keyword argument 'terms'"):
        load_tasks(sums(params={"terms": 2}), tokenizer, 1)
    with pytest.raises(DatasetError, match="set num_rows"):
        load_tasks(sums(num_rows=None), tokenizer, 1)
