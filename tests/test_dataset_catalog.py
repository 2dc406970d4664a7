"""Data sets by name: rows in each one's own columns become tasks, their own answers are right, and the docs say so."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import re
import zlib
from pathlib import Path

import datasets
import pytest

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import DatasetError
from arealite.dataset.catalog import CATALOG, MATH, entry_of
from arealite.dataset.loader import load_tasks
from arealite.dataset.sources import read_rows
from arealite.reward.named import named_reward

PACKED = base64.b64encode(
    zlib.compress(pickle.dumps(json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}])))
).decode()
HUMAN = {
    "task_id": "HumanEval/900", "prompt": 'def twice(x: int) -> int:\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n", "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}  # fmt: skip
MBPP = {
    "task_id": 901, "text": "Write a function to double a number.", "code": "def twice(x):\r\n    return 2 * x",
    "test_list": ["assert twice(2) == 4", "assert twice(0) == 0"], "test_setup_code": "", "challenge_test_list": [],
}  # fmt: skip
LIVE = {
    "question_title": "Twice", "question_content": "Read a number, print its double.", "platform": "atcoder",
    "question_id": "a", "contest_id": "b", "contest_date": "2024-01-01T00:00:00", "starter_code": "",
    "difficulty": "easy", "public_test_cases": '[{"input": "1\\n", "output": "2\\n", "testtype": "stdin"}]',
    "private_test_cases": PACKED, "metadata": "{}",
}  # fmt: skip
# A row of each, made by hand in the columns of the real one; its answer, and text that is right and wrong.
ROWS = {
    "gsm8k": ({"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "4", "It is 4.", "It is 5."),
    "math": (
        {"problem": "Half of $x$?", "level": "Level 1", "type": "Algebra", "solution": r"So \boxed{\frac{x}{2}}."},
        r"\frac{x}{2}", r"\boxed{x/2}", r"\boxed{x}",
    ),
    "math500": (
        {"problem": "2+2", "solution": r"\boxed{4}", "answer": "4", "subject": "Prealgebra", "level": 1,
         "unique_id": "test/1"}, "4", r"\boxed{4}", r"\boxed{3}",
    ),
    "deepscaler": ({"problem": "2+2", "answer": "4", "solution": "easy"}, "4", r"\boxed{4}", r"\boxed{5}"),
    "dapo-math": (
        {"prompt": "2+2", "solution": "4", "data_source": "math_dapo", "source_prompt": [
            {"content": "Solve ...", "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "4", "style": "rule"}, "extra_info": {"index": "1"}},
        "4", r"\boxed{4}", r"\boxed{5}",
    ),
    "dapo-math-raw": (
        {"data_source": "math_dapo", "prompt": [{"content": "2+2. Answer:", "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "34", "style": "rule"}, "extra_info": {"index": "1"}},
        "34", "Answer: 34", "Answer: 4",
    ),
    "aime24": (
        {"id": 60, "problem": "?", "solution": r"\boxed{204}", "answer": "204", "url": "u", "year": "2024"},
        "204", r"\boxed{204}", r"\boxed{20}",
    ),
    "aime25": ({"problem": "?", "answer": "70", "id": "0"}, "70", r"\boxed{70}", r"\boxed{7}"),
    "amc": ({"id": 0, "problem": "?", "answer": 142.0, "url": "u"}, "142", r"\boxed{142}", r"\boxed{14}"),
    "livecodebench": (LIVE, None, "```python\nprint(2 * int(input()))\n```", "```python\nprint(2)\n```"),
    "humaneval": (HUMAN, ..., "```python\ndef twice(x): return x + x\n```", "```python\ndef twice(x): return 5\n```"),
    "mbpp": (MBPP, ..., "```python\ndef twice(x): return x + x\n```", "```python\ndef twice(x): return 4\n```"),
    "clevr-count": ({"images": [], "problem": "<image>How many?", "answer": "3"}, "3", "[3]", "[4]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def copy_of(place: Path, name: str, row: dict) -> Path:
    """A folder in the layout of the hub's repository, with one row in each split."""
    entry = CATALOG[name]
    folder = place / Path(entry.hub).name
    for split in entry.splits:
        if entry.files:
            file = folder / "test.jsonl"
        elif entry.subset and name != "dapo-math":
            file = folder / entry.subset / f"{split}-00000-of-00001.parquet"
        else:
            file = folder / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".jsonl":
            file.write_text(json.dumps(row) + "\n")
        else:
            datasets.Dataset.from_list([row]).to_parquet(file)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_rows_in_a_data_sets_own_columns_become_tasks_that_its_verifier_grades(name, tokenizer, tmp_path):
    row, answer, right, wrong = ROWS[name]
    folder = copy_of(tmp_path, name, row)
    (task,) = load_tasks(DatasetConfig(path=str(folder)), tokenizer, 0, named_reward)
    if answer is not ...:
        assert task.answer == answer
    row = json.loads(json.dumps(task.extras)) | ({} if task.answer is None else {"answer": task.answer})
    own = right if task.answer is None else f"\\boxed{{{task.answer}}}" if row["verifier"] == MATH else task.answer
    rewards = [named_reward("", text, [], [], **row) for text in (right, wrong, own)]
    assert [r["reward"] if isinstance(r, dict) else r for r in rewards] == [1.0, 0.0, 1.0]
    (message,) = task.messages
    for hidden in ("canonical_solution", "return 2 * x", "ground_truth", "private_test_cases", PACKED):
        assert hidden not in message["content"]


def test_every_entry_has_a_row_here():
    assert {*ROWS, "hh-rlhf"} == set(CATALOG)


def test_preferences_in_the_hubs_folders_of_packed_files(tmp_path):
    for split in ("train", "test"):
        for part in ("harmless-base", "helpful-base"):
            (tmp_path / "hh-rlhf" / part).mkdir(parents=True, exist_ok=True)
            said = {side: f"\n\nHuman: Hi\n\nAssistant: {side} {split} {part}" for side in ("chosen", "rejected")}
            (tmp_path / "hh-rlhf" / part / f"{split}.jsonl.gz").write_bytes(gzip.compress(json.dumps(said).encode()))
    rows = list(read_rows(DatasetConfig(path=str(tmp_path / "hh-rlhf"), split="test"), 0))
    assert sorted(row.values["chosen"].rsplit(": ")[-1] for row in rows) == [
        "chosen test harmless-base", "chosen test helpful-base",
    ]  # fmt: skip


def test_a_name_its_hub_id_and_a_copy_are_one(tmp_path):
    (tmp_path / "MATH-500").mkdir()
    for path in ("math500", "HuggingFaceH4/MATH-500", str(tmp_path / "MATH-500")):
        assert entry_of(path) is CATALOG["math500"]
    assert entry_of("test.jsonl") is entry_of("reasoning_gym:acre") is entry_of("nobody/math") is None


def test_a_split_that_is_not_there_and_columns_of_another_data_set_are_told(tmp_path):
    folder = copy_of(tmp_path, "gsm8k", {"question": "?", "solution": "4"})
    with pytest.raises(DatasetError, match="no split 'valid': set split to one of train, test"):
        list(read_rows(DatasetConfig(path=str(folder), split="valid"), 0))
    with pytest.raises(DatasetError, match=r"row 0: .* as openai/gsm8k, wants .* no 'answer' .* found the columns"):
        list(read_rows(DatasetConfig(path=str(folder)), 0))
    own = DatasetConfig(path=str(folder), columns={"question": "Well: {question}", "answer": "solution"})
    assert next(read_rows(own, 0)).values == {"question": "Well: ?", "answer": "4"}


def test_rows_of_mathematics_and_of_programs_in_one_file_are_told_apart(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    rows = [
        {"task": "math", "query_id": "a", "prompt": "Six sevens?", "solutions": [r"\boxed{42}"]},
        {"task": "code", "query_id": "b", "prompt": "Double it.", "input_output": tests},
        {"prompt": "Say B", "answer": "B", "verifier": "arealite.reward.rules:choice_reward"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = load_tasks(DatasetConfig(path=str(file)), tokenizer, 0, named_reward)
    said = (r"\boxed{42}", "```python\nprint(2 * int(input()))\n```", "B")
    for task, text in zip(tasks, said, strict=True):
        row = task.extras | ({} if task.answer is None else {"answer": task.answer})
        for other in said:
            reward = named_reward("", other, [], [], **row)
            assert (reward["reward"] if isinstance(reward, dict) else reward) == float(other == text)
    file.write_text(json.dumps({"prompt": "Hi", "answer": "1"}))
    with pytest.raises(DatasetError, match=r"rows.jsonl:1: nothing says how to grade"):
        load_tasks(DatasetConfig(path=str(file)), tokenizer, 0, named_reward)


def test_malformed_rows_are_refused_or_left_out_counted_and_shown(tokenizer, tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": \n[1]\n{"answer": "2"}\n{"question": "b"}\n')
    with pytest.raises(DatasetError, match=r"rows.jsonl:2: not JSON"):
        load_tasks(DatasetConfig(path=str(file)), tokenizer, 0)
    caplog.clear()
    tasks = load_tasks(DatasetConfig(path=str(file), malformed_rows="skip"), tokenizer, 0)
    assert [task.id for task in tasks] == ["r0", "r4"], "numbers stay those of the file"
    assert f"3 of 5 rows are left out: 3 are malformed, the first is {file}:2: not JSON" in caplog.text


def test_the_table_in_the_docs_is_the_catalog():
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    table = re.findall(r"^\| `([\w-]+)` \| (.*?) \| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert table == [row_of(name) for name in CATALOG]


def row_of(name: str) -> tuple[str, ...]:
    entry = CATALOG[name]
    columns = "; ".join(
        f"{ours} = `{json.dumps(place)[1:-1].replace('```', '')}`" for ours, place in entry.columns.items()
    )
    splits = f"{', '.join(entry.splits)}{f' (subset {entry.subset})' if entry.subset else ''}"
    return name, entry.about, entry.hub, splits, columns, entry.verifier.rpartition(":")[2] or "none: for `rw` runs"
