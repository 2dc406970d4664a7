"""Every task of reasoning_gym loads, and its own answer is worth 1 after the way through JSON."""

from __future__ import annotations

import json

import pytest

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import DatasetError
from arealite.dataset.rows import task_of
from arealite.dataset.sources import generator, read_rows
from arealite.reward.named import named_reward

# The package gives these none (`answer` is null): many plans or formulas are right, and the verifier tries them.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
# Right ones that their entries hold beside that.
EXAMPLES = {
    "graph_color": "possible_answer", "propositional_logic": "example_answer", "rubiks_cube": "example_correct_answer"
}  # fmt: skip
PARTS = {"datasets": [{"name": "chain_sum", "weight": 2}, {"name": "countdown", "config": {"max_numbers": 4}}]}


def config_of(name: str) -> DatasetConfig:
    return DatasetConfig(path=f"reasoning_gym:{name}", num_rows=1, params=PARTS if name == "composite" else {})


def test_own_answers_of_all_tasks_score_1():
    from reasoning_gym.factory import DATASETS

    scores, open_tasks = {}, set()
    for name in DATASETS:
        (row,) = read_rows(config_of(name), 1)
        task = task_of(row, config_of(name), chat=True)
        extras = json.loads(json.dumps(task.extras))
        answer = task.answer
        if answer is None:
            open_tasks.add(name)
            recipe = {key: value for key, value in extras["reasoning_gym"].items() if key != "index"}
            example = generator(json.dumps(recipe, sort_keys=True))[0]["metadata"].get(EXAMPLES.get(name))
            if example is None:
                continue
            answer = example if isinstance(example, str) else json.dumps(example)
        scores[name] = named_reward("", answer, [], [], verifier=row.verifier, **extras)
    assert {name: score for name, score in scores.items() if score != 1} == {}
    assert open_tasks == WITHOUT_ANSWER
    assert len(scores) == len(DATASETS) - len(WITHOUT_ANSWER - set(EXAMPLES))


def test_wrong_parts_of_a_composite_are_told():
    config = config_of("composite")
    config.params = {"datasets": [{"named": "chain_sum"}]}
    with pytest.raises(DatasetError, match="cannot make task 'composite' with"):
        list(read_rows(config, 1))
