"""Rewards by rule, and sums of them: tables of what earns and what does not."""

import asyncio
from functools import partial

import pytest
from support.rewards import by_word

from arealite.api.errors import ConfigError, RewardError
from arealite.reward.math import math_reward
from arealite.reward.pool import RewardPool
from arealite.reward.rules import (
    choice_reward,
    exact_reward,
    format_reward,
    instructions_reward,
    json_reward,
    length_reward,
    regex_reward,
)
from arealite.reward.weighted import WeightedSum, is_async


def of(function, completion, num_ids=0, **named):
    return function("q", completion, [], [0] * num_ids, **named)


@pytest.mark.parametrize(("completion", "earned"), [
    ("<think>so</think><answer>5</answer>", 1.0),
    ("\n<think>\nso\n\nit is\n</think>\n\n<answer>\n5\n</answer>\n", 1.0),
    ("<think></think><answer>5</answer>", 0.0),
    ("<think>so</think><answer></answer>", 0.0),
    ("<answer>5</answer>", 0.0),
    ("<think>so</think><answer>5</answer> indeed", 0.0),
    ("<think>a</think><think>b</think><answer>5</answer>", 0.0),
    ("<think>a</think><answer>5</answer><answer>6</answer>", 0.0),
    ("<answer>5</answer><think>so</think>", 0.0),
])  # fmt: skip
def test_format(completion, earned):
    assert of(format_reward, completion) == earned
    assert of(format_reward, "A: 5", format_pattern=r"A: \d") == 1.0
    assert of(format_reward, "A: 5!", format_pattern=r"A: \d") == 0.0


def test_length_falls_linearly():
    rewards = [of(length_reward, "", n, full_tokens=10, max_tokens=20) for n in (0, 10, 15, 20, 99)]
    assert rewards == [1.0, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"full_tokens is 20 and max_tokens 20; expected 0 <= full < max"):
        of(length_reward, "", full_tokens=20, max_tokens=20)


@pytest.mark.parametrize(("completion", "answer", "earned"), [
    ("Paris", "paris", 1.0), (" Paris.\n", "Paris", 1.0), ("\uff30aris", "Paris", 1.0), ("new  york", "New York", 1.0),
    ("It is Paris", "Paris", 0.0), ("", "Paris", 0.0), ("Pari", "Paris", 0.0),
])  # fmt: skip
def test_exact(completion, answer, earned):
    assert of(exact_reward, completion, answer=answer) == earned


def test_regex_is_for_the_whole_text():
    assert of(regex_reward, " 2024-05-01\n", answer=r"\d{4}-\d\d-\d\d") == 1.0
    assert of(regex_reward, "on 2024-05-01", answer=r"\d{4}-\d\d-\d\d") == 0.0


SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}, "additionalProperties": False}


@pytest.mark.parametrize(("completion", "earned"), [
    ('{"n": 5}', 1.0), ('Here:\n```json\n{"n": 5}\n```\nDone.', 1.0), ('```\n{"n": 1}\n```\n```\n{"m": 1}\n```', 0.0),
    ('{"n": "5"}', 0.0), ('{"n": 5, "m": 1}', 0.0), ('The answer is {"n": 5}', 0.0), ("", 0.0), ('{"n": NaN}', 0.0),
    ("[" * 100_000, 0.0), ('{"n": 5.5}', 0.0), ("{'n': 5}", 0.0),
])  # fmt: skip
def test_json_schema(completion, earned):
    pytest.importorskip("jsonschema")
    assert of(json_reward, completion, json_schema=SCHEMA) == earned


def test_a_wrong_schema_is_an_error_of_the_row():
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match="is no JSON schema"):
        of(json_reward, "{}", json_schema='{"type": "objekt"}')


@pytest.mark.parametrize("completion", [
    "B", "b", "(B)", "**B**", "B.", "The answer is B.", "The answer is (B) because A is wrong", "Answer: B",
    "**Answer:** B", r"\boxed{B}", r"so it is $\boxed{\text{B}}$", "I choose A. No, the answer is B", "B. Paris",
    "<answer>B</answer>", "(B) Paris", "\u7b54\u6848\u662fB", "\u7b54\u6848\uff1aB\u3002", "Final answer: **B**\n",
])  # fmt: skip
def test_choices_that_count(completion):
    assert of(choice_reward, completion, answer="B") == of(choice_reward, completion, answer="(b)") == 1.0
    assert of(choice_reward, completion, answer="A") == 0.0


@pytest.mark.parametrize("completion", [
    "", "A B C D", "A, B", "the answer is A and B", "the answer is A or B", "the answer is A, B", "the answer is not B",
    "A. Rome B. Paris", "A. Rome\nB. Paris\nC. Oslo", "Because B", "The answer is Banana", "\u7b54\u6848\u662fA\u548cB",
    "The answer is B. No, the answer is A",
])  # fmt: skip
def test_choices_that_do_not_count(completion):
    assert of(choice_reward, completion, answer="B") == 0.0


def test_a_choice_needs_a_letter():
    with pytest.raises(ValueError, match="expected the letter of an option"):
        of(choice_reward, "B", answer="Paris")


@pytest.mark.parametrize(("instruction", "kept", "broken"), [
    ({"min_words": 3}, "one two three", "one two"),
    ({"max_words": 2}, "it's well-known", "one two three"),
    ({"num_paragraphs": 2}, "one\n\ntwo\nlines", "one\n\ntwo\n\nthree"),
    ({"num_bullets": 2}, "list:\n- a\n* b", "- a"),
    ({"contains": ["Sea", "sky"]}, "the SEA and the sky", "the sea"),
    ({"avoids": ["sea"]}, "the sky", "a Sea"),
    ({"starts_with": "Dear"}, " Dear you", "Oh Dear"),
    ({"ends_with": "Yours"}, "I am Yours\n", "Yours truly"),
    ({"avoids_commas": True}, "no such sign", "one\uff0c two"),
    ({"is_lowercase": True}, "all low 5", "Not"),
    ({"is_uppercase": True}, "ALL HIGH", "aLL"),
    ({"is_json": True}, "[1]", "[1"),
])  # fmt: skip
def test_instructions(instruction, kept, broken):
    assert of(instructions_reward, kept, instructions=[instruction]) == {"reward": 1.0, "kept_share": 1.0}
    both = of(instructions_reward, broken, instructions=[instruction, {"min_words": 0}])
    assert both == {"reward": 0.0, "kept_share": 0.5}


@pytest.mark.parametrize("instructions", [[], [{"min_word": 3}]])
def test_unknown_instructions_are_errors(instructions):
    with pytest.raises(ValueError, match="expected one or more {kind: value} of min_words"):
        of(instructions_reward, "text", instructions=instructions)


def scored(reward_fn, completion="B", answer="B", extras=None, **settings):
    pool = RewardPool(reward_fn, **settings)
    try:
        return asyncio.run(pool.score("q", completion, [1], [2, 3], answer, extras))
    finally:
        pool.close()


async def slow_half(prompt, completion, prompt_ids, completion_ids, **extras):
    await asyncio.sleep(0.01)
    return {"reward": 0.5, "tokens": len(completion_ids)}


def test_a_sum_logs_every_part_and_gives_each_its_columns():
    reward_fn = WeightedSum(
        right=(1.0, choice_reward), short=(0.5, partial(length_reward, max_tokens=4)), judged=(2.0, slow_half)
    )
    score = scored(reward_fn, extras={"full_tokens": 0, "unknown": 1})
    assert score.reward == 1.0 + 0.5 * 0.5 + 2 * 0.5
    assert score.parts == {"right": 1.0, "short": 0.5, "judged": 0.5, "judged_tokens": 2.0}


@pytest.mark.parametrize(("completion", "ungraded"), [(r"\boxed{9^9^9^9}", 1.0), (r"\boxed{5}", 0.0)])
def test_a_sum_keeps_what_a_part_reports_of_itself(completion, ungraded):
    score = scored(WeightedSum(right=(2.0, math_reward), given=(1.0, by_word)), completion, "5")
    assert score.parts == {"right": 1.0 - ungraded, "right_ungraded": ungraded, "given": 1.0}
    assert score.reward == 2 * (1.0 - ungraded) + 1.0


def test_a_sum_asks_for_the_columns_of_all_parts():
    reward_fn = WeightedSum(right=(1.0, choice_reward), short=(0.1, length_reward))
    with pytest.raises(ConfigError, match="full_tokens"):
        scored(reward_fn)


def test_a_part_that_fails_fails_the_sum():
    with pytest.raises(RewardError, match="no such answer"):
        scored(WeightedSum(right=(1.0, choice_reward), bad=(1.0, by_word)), completion="raise")


def test_parts_of_one_name_are_refused():
    sum_of_both = WeightedSum(right=(1.0, math_reward), right_ungraded=(1.0, by_word))
    with pytest.raises(RewardError, match="two parts are named right_ungraded"):
        scored(sum_of_both, "5", "5")


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"reward": (1.0, choice_reward)},
        {"right": choice_reward},
        {"right": ("1", choice_reward)},
        {"right": (1.0, 5)},
    ],
)
def test_what_is_no_part_is_refused(parts):
    with pytest.raises(ConfigError, match="expected|another name"):
        WeightedSum(**parts)


def test_what_is_async():
    class Called:
        async def __call__(self, *args, **named):
            return 1.0

    assert is_async(slow_half) and is_async(partial(slow_half)) and is_async(Called())
    assert is_async(WeightedSum(a=(1, slow_half), b=(1, by_word)))
    assert not any(map(is_async, (by_word, partial(by_word), WeightedSum(a=(1, by_word)))))
