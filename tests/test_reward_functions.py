"""Rewards for answers that are numbers."""

import pytest

from arealite.reward.math import gsm8k_reward
from arealite.reward.number import number_reward, numbers_in


def given(reward_fn, completion, answer):
    return reward_fn("question", completion, [1], [2], answer=answer, level="a column of the data set")


@pytest.mark.parametrize(("text", "numbers"), [
    ("5 + 7 = 12", [5, 7, 12]), ("-3 and 4-1", [-3, 4, 1]), ("1,234,567.50 or 12,34", [1234567.5, 12, 34]),
    ("x2 = .5", [2, 0.5]), ("The answer is 12.", [12]), ("(3)-4, - 5", [3, 4, 5]), ("none", []),
    ("\u22125, \u2013$6, -\\$7 and 5\u20137", [-5, -6, -7, 5, 7]),
    ("1e-05, 2 \\times 10^{3}, 3\u00d710^-2, 12eggs, 1{,}200", [1e-5, 2000, 0.03, 12, 1200]),
])  # fmt: skip
def test_numbers_are_found(text, numbers):
    assert [float(n) for n in numbers_in(text)] == numbers


@pytest.mark.parametrize(("completion", "reward"), [
    ("12", 1), ("5 + 7 = 12", 1), ("12 is 5 + 7", 1), ("5 + 12 = 7", 0), ("12.0", 1), ("-12", 0), ("twelve", 0),
    ("", 0),
])  # fmt: skip
def test_number_reward_looks_at_first_and_last_number(completion, reward):
    assert given(number_reward, completion, "12") == reward


@pytest.mark.parametrize("reward_fn", [number_reward, gsm8k_reward])
def test_a_task_without_an_answer_is_an_error_and_not_a_zero(reward_fn):
    with pytest.raises(ValueError, match="expected a number"):
        given(reward_fn, "12", "")


SOLUTION = "She has 3 * 400 = <<3*400=1200>>1,200 eggs.\n#### 1,200"


@pytest.mark.parametrize(("completion", "reward"), [
    ("so 1200", 1), ("#### 1200.00 dollars", 1), ("#### 12\n#### 1200", 1),
    (r"\boxed{1{,}200} is wrong, \boxed{\frac{1200}{1}} is no number, \boxed{1200}", 1),
    ("The answer is $1,200. #### 5", 0), ("1200 eggs, 7 of them bad", 0), (r"\boxed{1200} eggs in 3 days", 1),
    (r"\boxed{1200", 1), ("", 0), ("#### 1200 (which is 3 times 400)", 1),
    (r"#### Step 2: add" "\n" r"it is \boxed{1{,}200}", 1), ("#### 2. Add\nIt is 1200.", 1),
    (r"\boxed{1200 \text{ m}^2}", 1), (r"\boxed{\frac{2400}{2}}", 1), (r"\boxed{1.2 \times 10^{3}}", 1),
    (r"\boxed{- 1200}", 0), ("#### \u22121200", 0), (r"\boxed{1{,}200} or 200", 1), ("#### 1200 (3 times 400)", 1),
    ("#### **1200** eggs", 1), ("She pays $5 + $1195 = $1200", 1), ("$1195 first, then $5", 0),
    ("#### 1,200 = 3 * 400", 1), ("<answer>1200</answer> for 3 days", 1), ("<think>so 1200</think>", 0),
    ("the answer is 5 or 1200", 0), (r"\boxed{1200, 5}", 0), (r"\boxed{1200 + 0}", 0), (r"\boxed{1200x}", 0),
    (r"\boxed{\frac{\sqrt{1200}}{1}}", 0), ("\uff111200", 0), ("#### " + "12" * 9000, 0),
    (f"#### 1200/{'1' * 9000}", 0),
])  # fmt: skip
def test_gsm8k_compares_the_final_number(completion, reward):
    assert given(gsm8k_reward, completion, SOLUTION) == reward


@pytest.mark.parametrize(("completion", "answer"), [
    (r"\boxed{- 5}", "-5"), ("#### \u22125", "-$5"), ("it is -$5", "\u20135"), (r"\boxed{\frac{1}{2}}", "1/2"),
    (r"\boxed{0.5}", r"\dfrac{1}{2}"), ("0.00001", "1e-05"), ("42", "#### Step 2: add\n1 + 41 = \\boxed{42}"),
])  # fmt: skip
def test_gsm8k_reads_answers_as_people_write_them(completion, answer):
    assert given(gsm8k_reward, completion, answer) == 1
    assert given(gsm8k_reward, "3", answer) == 0
