"""Several data sets drawn as one: shares, levels, rows that rest, and exact resumption with all of them on."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rollout import trajectory

from arealite.api.cli_args import DatasetConfig, GRPOConfig
from arealite.api.errors import ConfigError, DatasetError, RecoveryError
from arealite.api.load_config import load_config_file
from arealite.api.types import Group, Task
from arealite.dataset import sources
from arealite.dataset.examples import load_answers
from arealite.dataset.loader import StatefulDataLoader, load_tasks

SETS = {"a": 7, "b": 3, "c": 12}  # name -> rows


def parts(weights=(None, None, None), **more) -> DatasetConfig:
    mixture = {name: DatasetConfig(path=name, weight=w) for name, w in zip(SETS, weights, strict=True)}
    return DatasetConfig(mixture=mixture, **more)


def loader(dataset: DatasetConfig, ids: list[str] | None = None, seed=1) -> StatefulDataLoader[Task]:
    ids = ids or [f"s{s}-r{i}" for s, count in enumerate(SETS.values()) for i in range(count)]
    return StatefulDataLoader(
        [Task(id, prompt=f"question {id}") for id in ids], GRPOConfig(seed=seed, train_dataset=dataset)
    )


def take(stream, count: int) -> list[str]:
    return [task.id for task in itertools.islice(stream, count)]


def group(id: str, *rewards: float) -> Group:
    task = Task(id, prompt="question")
    return Group(task, 0, [trajectory(task, member, reward=reward) for member, reward in enumerate(rewards)])


@settings(max_examples=50, deadline=None)
@given(weights=st.tuples(*[st.sampled_from([0.1, 1.0, 2.5, 7.0])] * 3), count=st.integers(1, 300))
def test_any_number_of_draws_has_every_share_right_to_within_two(weights, count):
    found = Counter(id.split("-")[1] for id in take(loader(parts(weights)), count))
    for number, weight in enumerate(weights):
        assert abs(found[f"s{number}"] - count * weight / sum(weights)) < 2


def test_without_weights_each_row_is_drawn_once_an_epoch():
    ids = take(loader(parts()), sum(SETS.values()))
    assert sorted(ids) == sorted(f"e0-s{s}-r{i}" for s, count in enumerate(SETS.values()) for i in range(count))


def test_data_sets_of_one_size_have_orders_of_their_own():
    ids = take(loader(parts(), [f"s{s}-r{i}" for s in range(3) for i in range(20)]), 60)
    orders = [[id.split("-")[2] for id in ids if f"-s{s}-" in id] for s in range(3)]
    assert orders[0] != orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[1])


def test_a_prompt_without_a_signal_rests_and_comes_back():
    stream = loader(DatasetConfig(path="rows", rest_epochs=2, shuffle=False), [f"r{i}" for i in range(4)])
    assert take(stream, 4) == ["e0-r0", "e0-r1", "e0-r2", "e0-r3"]
    stream.note(group("e0-r1", 1, 1))  # solved always
    stream.note(group("e0-r2", 0, 0))  # never
    stream.note(group("e0-r0", 0, 1))  # worth training on
    stream.note(group("e0-r3", 1))  # one answer tells nothing
    stream.note(group("e0-r3"))  # and none less
    stream.note(group("another's task", 0, 0))
    assert stream.stats() == {"num_rows_resting": 2.0}
    assert take(stream, 4) == ["e1-r0", "e1-r3", "e2-r0", "e2-r3"]
    stream.note(group("e1-r0", 1, 1))
    assert take(stream, 5) == ["e3-r1", "e3-r2", "e3-r3", "e4-r0", "e4-r1"]


def test_prompts_rest_only_where_asked_for():
    stream = loader(DatasetConfig(path="rows", shuffle=False), ["r0", "r1"])
    for id in take(stream, 2):
        stream.note(group(id, 0, 0))
    assert take(stream, 2) == ["e1-r0", "e1-r1"] and stream.stats() == {}


def test_when_all_rest_the_first_epoch_after_is_drawn():
    stream = loader(DatasetConfig(path="rows", rest_epochs=30), ["r0", "r1"])
    for id in take(stream, 2):
        stream.note(group(id, 1, 1))
    assert sorted(take(stream, 2)) == ["e31-r0", "e31-r1"]


def levels(monkeypatch, wanted=0.75, count=3):
    def made(config):
        return [DatasetConfig(path=config.path, curriculum=wanted) for _ in range(count)]

    monkeypatch.setattr(sources, "curriculum_levels", made)
    dataset = DatasetConfig(path="reasoning_gym:x", curriculum=wanted, batch_size=2, rest_epochs=1)
    return loader(dataset, [f"l{level}-r{i}" for level in range(count) for i in range(4)])


def test_a_curriculum_goes_on_when_a_steps_groups_are_good_enough(monkeypatch):
    stream = levels(monkeypatch)
    first, second = take(stream, 2)
    assert first.startswith("e0-l0-r")
    stream.note(group(first, 1, 1))
    assert take(stream, 1)[0].startswith("e0-l0"), "half a step says nothing"
    stream.note(group(second, 0, 0))
    stream.note(group("e0-l0-r0", 1, 0.5))
    assert take(stream, 1)[0].startswith("e0-l0"), "the last two have .375"
    stream.note(group("e0-l0-r1", 1, 0.5))
    assert take(stream, 1)[0].startswith("e0-l1") and stream.stats()["level_of/reasoning_gym:x"] == 1
    for _ in range(3):
        stream.note(group("e0-l0-r2", 1, 1))  # of the level before
    assert take(stream, 1)[0].startswith("e0-l1")
    for _ in range(9):
        stream.note(group("e0-l1-r0", 1, 0.9))
    assert take(stream, 1)[0].startswith("e0-l2")
    for _ in range(9):
        stream.note(group("e0-l2-r0", 1, 0.9))
    assert take(stream, 1)[0].startswith("e0-l2"), "the last level stays"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), drawn=st.integers(0, 60), after=st.integers(0, 60), seed=st.integers(0, 3))
def test_a_stream_resumes_exactly_with_everything_on(data, drawn, after, seed):
    """Of two that were told the same, one is saved and loaded half way, after it had drawn something else."""
    rewards = st.sampled_from([(0, 0), (1, 1), (0, 1), (1,)])

    def made() -> StatefulDataLoader[Task]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "curriculum_levels", lambda config: [config, config])
            dataset = parts((2, None, 1), rest_epochs=2, batch_size=3)
            dataset.mixture["c"].curriculum = 0.6
            ids = [f"s0-r{i}" for i in range(5)] + [f"s1-r{i}" for i in range(3)]
            return loader(dataset, ids + [f"s2l{level}-r{i}" for level in range(2) for i in range(4)], seed)

    def answered(streams, count):
        for _ in range(count):
            ids = {next(stream).id for stream in streams}
            assert len(ids) == 1
            told = data.draw(rewards)
            for stream in streams:
                stream.note(group(*ids, *told))

    straight, resumed = made(), made()
    answered([straight], drawn)
    for id in take(resumed, after):
        resumed.note(group(id, 0, 0))
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert resumed.state_dict() == straight.state_dict()
    answered([straight, resumed], after)


def test_other_weights_are_another_stream():
    saved = loader(parts((1, 1, 1))).state_dict()
    with pytest.raises(RecoveryError, match="weights was"):
        loader(parts((1, 1, 2))).load_state_dict(saved)


def test_tasks_of_no_data_set_are_refused():
    with pytest.raises(DatasetError, match="none of 1 tasks is of b: their ids would begin 's1-'"):
        loader(parts(), ["s0-r1"])


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def written(folder, name: str, *rows: dict) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def configured(tmp_path, *lines: str) -> GRPOConfig:
    path = tmp_path / "run.yaml"
    path.write_text("actor: {path: model}\ntrain_dataset:\n" + "".join(f"  {line}\n" for line in lines))
    return load_config_file(path, [], GRPOConfig)


def test_a_mixture_is_loaded_set_by_set_with_what_the_section_around_says(tokenizer, tmp_path, caplog):
    one = written(tmp_path, "one", {"question": "1 + 1", "answer": 2}, {"question": "", "answer": 3})
    two = written(tmp_path, "two", {"task": "spell cat", "reply": "c a t"})
    dataset = configured(
        tmp_path,
        'prompt_template: "Briefly: {prompt}"',
        "mixture:",
        f"  sums: {{path: {one}, weight: 3}}",
        f'  letters: {{path: {two}, columns: {{question: task, answer: reply}}, prompt_template: "Please {{prompt}}"}}',
        "  gym: {path: reasoning_gym:letter_counting, num_rows: 2}",
    ).train_dataset
    with caplog.at_level(logging.WARNING):
        tasks = load_tasks(dataset, tokenizer, seed=1)
    assert [task.id for task in tasks] == ["s0-r0", "s1-r0", "s2-r0", "s2-r1"]
    assert [task.messages[0]["content"] for task in tasks[:2]] == ["Briefly: 1 + 1", "Please spell cat"]
    assert "Briefly: How many times" in tasks[2].messages[0]["content"]
    assert caplog.text.count("1 of 2 rows are left out") == 1 and "one.jsonl" in caplog.text
    stream = StatefulDataLoader(tasks, GRPOConfig(train_dataset=dataset))
    found = Counter(id.split("-")[1] for id in take(stream, 60))
    assert found == {"s0": 30, "s1": 10, "s2": 20}


def test_supervised_rows_can_be_mixed_as_well(tokenizer, tmp_path):
    one = written(tmp_path, "one", {"question": "1 + 1", "answer": 2})
    two = written(tmp_path, "two", {"text": "Once upon a time."})
    dataset = DatasetConfig(mixture={"one": DatasetConfig(path=one), "two": DatasetConfig(path=two)})
    assert [example.id for example in load_answers(dataset, tokenizer, seed=1)] == ["s0-r0", "s1-r0"]


def test_a_curriculum_has_the_tasks_of_its_levels(tokenizer):
    dataset = DatasetConfig(path="reasoning_gym:letter_counting", num_rows=3, curriculum=0.5, params={"min_words": 3})
    tasks = load_tasks(dataset, tokenizer, seed=1)
    counts = Counter(task.id.split("-")[0] for task in tasks)
    assert set(counts.values()) == {3} and list(counts) == [f"l{level}" for level in range(len(counts))]
    recipes = [task.extras["reasoning_gym"] for task in tasks[::3]]
    assert len({json.dumps(recipe) for recipe in recipes}) > 1
    assert all(recipe["min_words"] == 3 for recipe in recipes), "what params say stays"
    with pytest.raises(DatasetError, match="reasoning_gym:composite has no curriculum"):
        load_tasks(DatasetConfig(path="reasoning_gym:composite", num_rows=3, curriculum=0.5), tokenizer, seed=1)


def test_levels_that_a_task_refuses_are_left_out_and_told(caplog):
    def levels_of(name, **params):
        return sources.curriculum_levels(
            DatasetConfig(path=f"reasoning_gym:{name}", num_rows=1, curriculum=0.5, params=params)
        )

    found = levels_of("caesar_cipher")  # its last level wants rotations by more letters than there are
    assert [level.params["max_rotation"] for level in found] == [15, 25]
    assert "level 2 of the curriculum of reasoning_gym:caesar_cipher is left out" in caplog.text
    for level in found:
        assert len(list(sources.read_rows(level, 1))) == 1
    with pytest.raises(DatasetError, match="no level of the curriculum of reasoning_gym:knight_swap can be made"):
        levels_of("knight_swap")
    assert len(levels_of("knight_swap", min_nodes=6)) > 1


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["path: x", "mixture: {a: {path: b}}"], "train_dataset has a path (x) and a mixture"),
        (["mixture: {a: {weight: 2}}"], "train_dataset.mixture.a.path is missing"),
        (["mixture: {a: {path: b, weight: 0}}"], "train_dataset.mixture.a.weight is 0, expected at least 1e-06"),
        (["mixture: {a: {path: b, weigth: 2}}"], "unknown key 'train_dataset.mixture.a.weigth'"),
        (["mixture: {a: {path: b, batch_size: 2}}"], "a.batch_size is of the whole mixture: set train_dataset.batch"),
        (["mixture: {a: {mixture: {b: {path: c}}}}"], "a mixture holds data sets, no mixtures"),
        (["mixture: {a.b: {path: c}}"], "has the name 'a.b'"),
        (["path: x", "weight: 2"], "train_dataset.weight is for the data sets of a mixture"),
        (
            ["num_rows: 9", "mixture: {a: {path: b}}"],
            "num_rows is of one data set of the mixture: set train_d",
        ),
        (["path: x", "curriculum: 0.5"], "train_dataset.curriculum is for reasoning_gym tasks"),
        (["mixture: {a: {path: 'reasoning_gym:x'}}"], "train_dataset.mixture.a.num_rows is missing"),
    ],
)
def test_what_a_mixture_cannot_be(tmp_path, lines, complaint):
    with pytest.raises(ConfigError) as told:
        configured(tmp_path, *lines)
    assert complaint in str(told.value)
