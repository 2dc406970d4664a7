"""The graders of mathematics on labelled pairs (math_pairs.jsonl), hostile answers, and with planted mutations."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import threading
import time
from pathlib import Path

import pytest
from support.rewards import greedy_math

from arealite.reward import equality, extraction, formulas, number
from arealite.reward.equality import math_equal
from arealite.reward.extraction import extract_answer
from arealite.reward.formulas import TooCostly
from arealite.reward.math import gsm8k_reward, math_reward
from arealite.reward.number import number_reward
from arealite.reward.pool import RewardPool

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "math_pairs.jsonl").read_text().splitlines()]
LIMIT_S = 3.0  # of processor time, since others use the machine too; the limit itself is 1 s


def verdict(pair):
    if "completion" in pair:
        return math_reward("", pair["completion"], [], [], answer=pair["answer"]) == 1
    try:
        return math_equal(pair["answer"], pair["given"])
    except TooCostly:
        return False


def test_labelled_pairs():
    wrong = [pair for pair in PAIRS if verdict(pair) != pair["equal"]]
    assert len(PAIRS) >= 700 and sum(pair["kind"] == "adversarial" for pair in PAIRS) >= 150
    assert not wrong


@pytest.mark.parametrize(("text", "policy", "answer"), [
    (r"\boxed{1} then \boxed{\boxed{2}}", "boxed", "2"), (r"\fbox{3}", "boxed", "3"), (r"\boxed 4", "boxed", "4"),
    (r"\boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"), ("the answer is 5", "boxed", None),
    ("The answer is $5$.", "marked", "5"), ("Answer: (B) 7", "marked", "(B) 7"),
    ("<answer>8</answer>", "marked", "8"), ("#### 9", "marked", "9"), ("So 10", "marked", None),
    ("So 10", "final", "10"), ("答案是11。", "final", "11"), ("therefore $x^2$.", "final", "x^2"),
    ("What is 5 + 7?", "final", None), ("it is not 12", "final", None),
    (r"<think>\boxed{1}</think> 13", "final", "13"), (r"<think>\boxed{1}", "final", None), ("", "final", None),
])  # fmt: skip
def test_the_answer_by_policy(text, policy, answer):
    assert extract_answer(text, policy) == answer


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="'first'; expected one of boxed, marked, final"):
        extract_answer("1", "first")


@pytest.mark.parametrize("answer", ["", "$$", "9" * 5000, r"10^{10^{10}}"])
def test_a_gold_answer_that_cannot_be_compared_is_an_error_of_the_data(answer):
    with pytest.raises(ValueError, match="the task's answer"):
        math_reward("", "5", [], [], answer=answer)


@pytest.mark.parametrize(
    "completion", ["No, 5 + 5 is not 10", "Is it 10?", "9, 10 or 11", "5 + 10", "\u09e7\u09e6", "10 is wrong"]
)
def test_what_a_number_reward_does_not_take(completion):
    assert number_reward("", completion, [], [], answer="10") == 0
    assert gsm8k_reward("", completion if completion != "5 + 10" else "", [], [], answer="10") == 0


BOX = r"\boxed{%s}"
HOSTILE = [
    "9" * 10_000_000, BOX % ("9" * 10_000_000), BOX % ("{" * 10_000), "(" * 10_000 + "10" + ")" * 10_000,
    BOX % ("(" * 10_000 + "10" + ")" * 10_000), r"\boxed{" * 10_000 + "10", r"\boxed{9}" * 10_000,
    "10 " * 1_000_000 + "9", r"\frac{1}{" * 5_000 + "10" + "}" * 5_000, BOX % (r"\frac{1}{" * 60 + "10" + "}" * 60),
    BOX % (r"\sqrt{" * 200 + "10"),
    *(BOX % tower for tower in (
        "10^{10^{10}}", "10^{10^{10^{10}}}", "9^9^9^9", "2^{2^{2^{2^{2}}}}", "10^{99999999}", "(10^{999})^{999}",
        "9**9**9", "10^{9!}", "((9^9)^9)^9999", "2^{9999999}", "x^{10^{10}}", "1e999999999", "10^{-10^{10}}",
        "(9^{99})^{(9^{9})}",
    )),
    *(BOX % f for f in (
        "99999999!", "9999!!", "((9!)!)!", "((9)!)!", r"\binom{999999}{500000}", "10^{100!}", r"\Gamma(99999999)",
        r"\sum_{k=1}^{10000000} k", r"\prod_{k=1}^{99999} k", r"\int_0^1 x^{x^{x^x}} dx",
        r"\sum_{k=1}^{\infty} \frac{1}{k^{k}}", "+".join(f"x_{{{i}}}" for i in range(120)), "(x+y+z)^{4999}",
        r"\sin" * 200 + "x", "-" * 900 + "9", "1/" * 300 + "3", "=".join(["x"] * 400),
        ",".join(map(str, range(200))), "|" * 300, r"\{" * 400, "&" * 500, "^" * 500, "_" * 500,
        r"\begin{pmatrix}" * 60, r"\cup" * 200, r"\left" * 180, r"\text{" * 150, r"\pm" * 300,
    )),
    *(BOX % digits for digits in (
        "\u09e7\u09e6", "\u0661\u0660", "\u0967\u0966", "\U0001d7cf\U0001d7ce", "\uff11\uff10", "\u2460\u24ea",
        "\uff110", "l0", "1\u041e", "\u2469", "10\u200b1",
    )),
    "a" * 100_000 + "=" * 100_000, "the answer is " * 20_000, "#### " * 40_000, "$" * 100_000, "\n" * 200_000,
    "<answer>" * 30_000, "1," * 100_000, "\x00" * 1000, "\ud800" * 10, "-" * 100_000 + "9",
    "1" + " " * 100_000 + "0", "<think>" * 30_000 + "10",
]  # fmt: skip


@pytest.mark.parametrize("number_of_it", range(len(HOSTILE)))
def test_a_hostile_answer_earns_nothing_in_bounded_time(number_of_it):
    start = time.process_time()
    assert math_reward("", HOSTILE[number_of_it], [], [], answer="10") == 0
    assert time.process_time() - start < LIMIT_S
    assert gsm8k_reward("", HOSTILE[number_of_it], [], [], answer="4711") == 0
    assert number_reward("", HOSTILE[number_of_it], [], [], answer="4711") == 0
    assert time.process_time() - start < 3 * LIMIT_S


def test_there_are_enough_hostile_answers():
    assert len(HOSTILE) >= 60


def test_a_hostile_answer_is_counted_and_does_not_hold_up_the_next():
    async def scores(*completions):
        pool = RewardPool(math_reward)
        try:
            return [await pool.score("", completion, [], [], answer="5") for completion in completions]
        finally:
            pool.close()

    hostile, honest = asyncio.run(scores(r"\boxed{9^9^9^9}", r"\boxed{5}"))
    assert (hostile.reward, hostile.parts) == (0, {"ungraded": 1.0})
    assert (honest.reward, honest.parts) == (1, {"ungraded": 0.0})  # so that the mean over a step is their share


def test_time_is_bounded_by_the_comparison_itself(monkeypatch):
    monkeypatch.setattr(formulas, "LIMIT_S", 0.2)

    def endless(*_):
        while True:
            time.sleep(0)

    monkeypatch.setattr(equality, "_equal", endless)
    result = math_reward("", r"\boxed{5}", [], [], answer="6")
    assert (result, result.parts) == (0, {"ungraded": 1.0})


def test_memory_is_bounded_by_the_comparison_in_a_worker():
    async def scores(*completions):
        pool = RewardPool(greedy_math, limit_s=60.0)
        try:
            return [await pool.score("", completion, [], [], answer="5") for completion in completions]
        finally:
            pool.close()

    for found, reward in zip(asyncio.run(scores("3", "1", "3")), (0, 1, 0), strict=True):
        assert (found.reward, found.parts) == (reward, {"ungraded": 1.0 - reward, "after": 3.0})


def test_beside_other_threads_it_works_and_their_memory_is_not_bounded(monkeypatch):
    found, equal = [], equality._equal
    monkeypatch.setattr(
        equality, "_equal", lambda *texts: (found.append(resource.getrlimit(resource.RLIMIT_AS)), equal(*texts))[1]
    )
    thread = threading.Thread(target=lambda: found.append(math_reward("", r"\boxed{4}", [], [], answer="4")))
    thread.start()
    thread.join()
    assert found == [resource.getrlimit(resource.RLIMIT_AS), 1.0]


MUTATIONS = {
    "no sign": (number, "MINUS", {}),
    "denials are answers": (extraction, "DENIAL", re.compile(r"(?!)")),
    "no marks": (extraction, "PHRASE", re.compile(r"(?!)")),
    "any rounding": (equality, "MIN_DIGITS", 1),
    "no units": (equality, "_unit", lambda text: ""),
    "order does not matter": (equality, "_covers", lambda parts, others: True),
    "look-alike digits": (equality, "STRANGE_DIGIT", re.compile(r"(?!)")),
    "no structures": (equality, "_structure", lambda text: None),
    "no formulas": (equality, "_same_formula", lambda one, other: False),
    "every formula": (equality, "_same_formula", lambda one, other: True),
    "no boxes": (extraction, "BOX", re.compile(r"(?!)")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mutations_are_seen(name, monkeypatch):
    """A sample of what the tests above ask; a mutation that changes none of it has survived."""
    sample = [pair for pair in PAIRS if pair["kind"] not in ("expression", "equation", "constant", "root")]
    formulas_too = [pair for pair in PAIRS if pair["kind"] in ("root", "absolute")]
    module, attribute, value = MUTATIONS[name]
    equality._quantity.cache_clear()
    monkeypatch.setattr(module, attribute, value)
    number_wrong = number_reward("", "\u22125", [], [], answer="-5") != 1 or number_reward(
        "", "It is not 5", [], [], answer="5"
    )
    assert number_wrong or any(verdict(pair) != pair["equal"] for pair in [*sample, *formulas_too])
    equality._quantity.cache_clear()
