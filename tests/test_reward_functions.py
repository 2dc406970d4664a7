"""The reward functions that come along."""

import pytest

from arealite.reward.math import gsm8k_reward, math_reward
from arealite.reward.number import number_reward, numbers_in


def given(reward_fn, completion, answer):
    return reward_fn("question", completion, [1], [2], answer=answer, level="a column of the data set")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("5 + 7 = 12", [5, 7, 12]),
        ("-3 and 4-1", [-3, 4, 1]),
        ("1,234,567.50 or 12,34", [1234567.5, 12, 34]),
        ("x2 = .5", [2, 0.5]),
        ("The answer is 12.", [12]),
        ("(3)-4, - 5", [3, 4, 5]),
        ("none", []),
        ("\u22125, \u2013$6, -\\$7 and 5\u20137", [-5, -6, -7, 5, 7]),
        ("1e-05, 2 \\times 10^{3}, 3\u00d710^-2, 12eggs, 1{,}200", [1e-5, 2000, 0.03, 12, 1200]),
    ],
)
def test_numbers_are_found(text, numbers):
    assert [float(n) for n in numbers_in(text)] == numbers


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("12", 1),
        ("5 + 7 = 12", 1),
        ("12 is 5 + 7", 1),
        ("5 + 12 = 7", 0),
        ("12.0", 1),
        ("-12", 0),
        ("twelve", 0),
        ("", 0),
    ],
)
def test_number_reward_looks_at_first_and_last_number(completion, reward):
    assert given(number_reward, completion, "12") == reward


@pytest.mark.parametrize("reward_fn", [number_reward, gsm8k_reward])
def test_a_task_without_an_answer_is_an_error_and_not_a_zero(reward_fn):
    with pytest.raises(ValueError, match="expected a number"):
        given(reward_fn, "12", "")


SOLUTION = "She has 3 * 400 = <<3*400=1200>>1,200 eggs.\n#### 1,200"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("so 1200", 1),
        ("#### 1200.00 dollars", 1),
        ("#### 12\n#### 1200", 1),
        (r"\boxed{1{,}200} is wrong, \boxed{\frac{1200}{1}} is no number, \boxed{1200}", 1),
        ("The answer is $1,200. #### 5", 0),
        ("1200 eggs, 7 of them bad", 0),
        (r"\boxed{1200} eggs in 3 days", 1),
        (r"\boxed{1200", 1),
        ("", 0),
        ("#### 1200 (which is 3 times 400)", 1),
        (r"#### Step 2: add" "\n" r"it is \boxed{1{,}200}", 1),
        ("#### 2. Add\nIt is 1200.", 1),
        (r"\boxed{1200 \text{ m}^2}", 1),
        (r"\boxed{\frac{2400}{2}}", 1),
        (r"\boxed{1.2 \times 10^{3}}", 1),
        (r"\boxed{- 1200}", 0),
        ("#### \u22121200", 0),
        (r"\boxed{1{,}200} or 200", 1),
        ("#### " + "12" * 9000, 0),  # more digits than Python makes an int of
        (f"#### 1200/{'1' * 9000}", 0),
    ],
)
def test_gsm8k_compares_the_final_number(completion, reward):
    assert given(gsm8k_reward, completion, SOLUTION) == reward


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{- 5}", "-5"),
        ("#### \u22125", "-$5"),
        ("it is -$5", "\u20135"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"\boxed{0.5}", r"\dfrac{1}{2}"),
        ("0.00001", "1e-05"),
        ("42", "#### Step 2: add\n1 + 41 = \\boxed{42}"),
    ],
)
def test_gsm8k_reads_answers_as_people_write_them(completion, answer):
    assert given(gsm8k_reward, completion, answer) == 1
    assert given(gsm8k_reward, "3", answer) == 0


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so it is $\frac{2}{4}$", r"\frac{1}{2}", 1),
        (r"Therefore \boxed{0.5}.", r"$\frac{1}{2}$", 1),
        (r"$\boxed{\sqrt{8}}$", r"2\sqrt{2}", 1),
        (r"the answer is $x+1$", "1+x", 1),
        (r"\boxed{3}", "4", 0),
        ("0.0000003", "0.0000001", 0),
        (r"\boxed{0.0000001}", "1e-07", 1),
        ("0.00001", "1e-05", 1),
        ("it is 1e-05", "0.00001", 1),
        (r"\boxed{0.5\%}", "0.005", 1),
        ("5", "1e-05", 0),
        (r"\boxed{0.001429}", r"\frac{1}{700}", 1),
        (r"\boxed{5}", r"\$5", 1),
        (r"\boxed{\$6}", r"\$5", 0),
        ("\\boxed{\u22125}", "-$5", 1),
        (r"\boxed{10^{10^{10}}}", "5", 0),
        (r"\boxed{99999999!}", "5", 0),
        (r"2^{2^{2}} is \boxed{2^{4}}", "16", 1),
        ("I do not know", "4", 0),
    ],
)
def test_math_reward_is_symbolic(completion, answer, reward):
    assert given(math_reward, completion, answer) == reward


def test_math_reward_works_outside_the_main_thread():
    """The library's alarm would make every answer wrong here."""
    import threading

    found = []
    thread = threading.Thread(target=lambda: found.append(given(math_reward, r"\boxed{4}", "4")))
    thread.start()
    thread.join()
    assert found == [1.0]
