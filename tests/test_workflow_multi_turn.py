"""MultiTurnWorkflow: another try after a wrong answer, what it is told, and what each try is worth."""

import pytest
from support.episodes import ScriptedEngine, episode, sampling
from support.rewards import by_word
from transformers import AutoTokenizer

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import ConfigError
from arealite.dataset.loader import load_tasks
from arealite.reward.named import named_reward
from arealite.reward.number import number_reward
from arealite.workflow.multi_turn import MultiTurnWorkflow


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def ask(tokenizer):
    """ask(*members, **options of the workflow) -> (trajectories, engine)"""
    made = []

    def ask(*members, reward_fn=number_reward, **options):
        workflow = MultiTurnWorkflow(reward_fn, sampling(len(members)), tokenizer, **options)
        made.append(workflow)
        engine = ScriptedEngine(tokenizer, *members)
        return episode(workflow, engine, answer="5"), engine

    yield ask
    for workflow in made:
        workflow.close()


def test_a_wrong_answer_is_asked_again_and_a_late_right_one_is_worth_less(ask):
    found, engine = ask(["5"], ["4", "5"], ["4", "3", "5"], ["4", "3", "2"], max_turns=3, turn_discount=0.5)
    assert [t.reward for t in found] == [1.0, 0.5, 0.25, 0.0]
    assert [t.statistics["num_turns"] for t in found] == [1, 2, 3, 3]
    assert [t.statistics["first_reward"] for t in found] == [1, 0, 0, 0]
    assert all("That is not right" in text for text in engine.prompts[2][1:])
    late = [r for r, is_own in zip(found[2].returns, found[2].loss_mask, strict=True) if is_own]
    assert sorted(set(late)) == [0.25, 0.5, 1.0] and late == sorted(late)


def test_feedback_may_say_what_the_score_is(ask):
    (t,), engine = ask(["4", "5"], feedback=lambda score: f"That earns {score.reward:g}.")
    assert t.status == "ok" and "That earns 0." in engine.prompts[0][1]


def test_a_reward_that_fails_is_no_zero(ask):
    found, _ = ask(["raise"], ["print"], reward_fn=by_word)
    assert [(t.status, t.reward is None) for t in found] == [("reward_error", True), ("ok", False)]
    assert "no such answer" in found[0].error


def test_what_cannot_work_is_refused(ask, tokenizer):
    with pytest.raises(ConfigError, match="max_turns 0"):
        ask(["5"], max_turns=0)
    with pytest.raises(ConfigError, match="turn_discount 0"):
        ask(["5"], turn_discount=0)
    workflow = MultiTurnWorkflow(number_reward, sampling(1), tokenizer)
    with pytest.raises(ConfigError, match="raw text"):
        episode(workflow, ScriptedEngine(tokenizer, ["5"]), messages=None, prompt="2 + 3 =", answer="5")
    workflow.close()


def test_tasks_of_reasoning_gym_are_tried_again(tokenizer):
    config = DatasetConfig(path="reasoning_gym:chain_sum", num_rows=1, batch_size=1, params={"seed": 3})
    (task,) = load_tasks(config, tokenizer, 1, named_reward)
    workflow = MultiTurnWorkflow(named_reward, sampling(1), tokenizer, turn_discount=0.5)
    engine = ScriptedEngine(tokenizer, ["I do not know", str(task.answer)])
    (t,) = episode(workflow, engine, messages=task.messages, answer=task.answer, extras=task.extras)
    workflow.close()
    assert t.status == "ok" and t.reward == 0.5 and t.statistics["num_turns"] == 2
