"""`arealite reward test`: each of its warnings on a reward that deserves it, and none on one that does not."""

import json
import subprocess
import sys

import pytest

from arealite.api.errors import ConfigError
from arealite.cli import main
from arealite.reward.named import find_reward

ROWS = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(12)]
REWARDS = """
import itertools, random, time

def right_reward(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return float(completion == answer)

def one(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return 1.0

def zero(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return 0.0

def generous(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return float(completion != "")

def random_one(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return random.random()

counter = itertools.count()

def by_order(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return float(next(counter) % 2)

def raises(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return 1 / len(completion)

def slow(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    time.sleep(0.11 if completion == "1" else 0)
    return float(completion == answer)

def strict(prompt, completion, prompt_ids, completion_ids, *, answer, **extras):
    return float(completion == answer and answer != "3")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    (folder / "audited.py").write_text(REWARDS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def audited(place, capsys, function, *more, rows="rows.jsonl"):
    words = ["reward", "test", f"{place}/audited.py:{function}", "--data", f"{place}/{rows}", *more]
    return main(words), capsys.readouterr().out


def test_a_sound_reward_has_no_warning(place, capsys, tmp_path):
    code, told = audited(place, capsys, "right_reward", "--json", str(tmp_path / "found.json"))
    assert code == 0 and "warning: none" in told and "time of a call: median" in told
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rewards"]["the row's own answer"] == [1.0] * 12
    assert found["rewards"]["an empty text"] == [0.0] * 12


@pytest.mark.parametrize(("function", "told"), [
    ("one", "every answer gets 1: nothing can be learned"),
    ("zero", "every answer gets 0: nothing can be learned"),
    ("generous", "12 rows give the best reward to another row's answer"),
    ("generous", "12 rows give the best reward to the question itself"),
    ("random_one", "answers get another reward when asked again"),
    ("by_order", "answers get another reward in another order of calls"),
    ("raises", "error, 12 times: ZeroDivisionError"),
    ("strict", "1 rows get less than the best reward for their own answer, the first is r2 ('3' for '3')"),
])  # fmt: skip
def test_what_looks_wrong_is_told(place, capsys, function, told):
    code, out = audited(place, capsys, function)
    assert code == 1 and told in out


def test_slow_calls_are_told(place, capsys):
    code, out = audited(place, capsys, "slow", "--limit-s", "0.2", "--num-rows", "3")
    assert code == 1 and "some calls take more than half of the limit of 0.2 s" in out


def test_rows_with_completions_are_graded_as_they_are(place, capsys):
    rows = [
        {"prompt": "2?", "answer": "2", "completion": "2", "expected": 1},
        {"prompt": "3?", "answer": "3", "completion": "2", "expected": 1},
    ]
    (place / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out = audited(place, capsys, "right_reward", rows="graded.jsonl")
    assert (
        code == 1 and "1 rows get another reward than their column `expected` says, the first is r1: 0 for '2'" in out
    )


@pytest.mark.parametrize(("name", "told"), [
    ("nowhere.py:f", "there is no file nowhere.py"), ("nowhere.at.all:f", "cannot be imported: ModuleNotFoundError"),
    ("arealite.reward.rules", "say which: arealite.reward.rules:FUNCTION"),
    ("arealite.reward.rules:x", "no function 'x'"),
])  # fmt: skip
def test_functions_that_are_not_found(name, told):
    with pytest.raises(ConfigError, match=told):
        find_reward(name)


def test_files_of_one_name_are_told_apart(tmp_path):
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        (tmp_path / str(value) / "twin.py").write_text(f"def reward(*args, **row): return {value}\n")
    for value in (1, 2, 1):
        assert find_reward(f"{tmp_path}/{value}/twin.py")() == value
    for library in ("json", "math"):
        (tmp_path / f"{library}.py").write_text("def reward(*args, **row): return 1\n")
        with pytest.raises(ConfigError, match=f"has the name of a library, {library}"):
            find_reward(f"{tmp_path}/{library}.py")


def test_the_only_reward_of_a_file_needs_no_name(place):
    command = [sys.executable, "-m", "arealite.cli", "reward", "test", f"{place}/audited.py", "--data"]
    ran = subprocess.run([*command, f"{place}/rows.jsonl"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "warning: none" in ran.stdout
