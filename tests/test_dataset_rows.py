"""Rows become tasks: every accepted form, and for every malformed one an error that names the place and the fix."""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from pathlib import Path

import pytest

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import DatasetError
from arealite.dataset import sources
from arealite.dataset.rows import task_of
from arealite.dataset.sources import Row, read_rows

USER = {"role": "user", "content": "What is 2 + 3?"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def task(values, chat=True, needs_answer=False, **settings):
    return task_of(Row(7, "f.jsonl:8", values), DatasetConfig(**settings), chat, needs_answer)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("column", ["question", "problem", "prompt"])
@pytest.mark.parametrize("answer_column", ["answer", "solution", "ground_truth"])
def test_questions_become_user_messages(column, answer_column):
    made = task({column: "What is 2 + 3?", answer_column: 5})
    assert (made.id, made.messages, made.prompt, made.answer, made.extras) == ("r7", [USER], None, "5", {})


@pytest.mark.parametrize("column", ["messages", "prompt", "question"])
def test_lists_are_messages(column):
    chat = [{"role": "system", "content": "Be brief."}, USER]
    assert task({column: chat, "answer": "5"}).messages == chat


def test_text_is_raw_and_so_is_everything_without_a_chat_template():
    assert task({"text": "2 + 3 =", "answer": "5"}).prompt == "2 + 3 ="
    made = task({"question": "2 + 3", "answer": "5"}, chat=False, prompt_template="{prompt} =")
    assert (made.prompt, made.messages) == ("2 + 3 =", None)


def test_gsm8k_answers_are_what_follows_the_mark():
    made = task({"question": "?", "answer": "600 + 678 = <<600+678=1278>>\n#### 1,278"})
    assert made.answer == "1278"
    assert made.extras == {"solution": "600 + 678 = <<600+678=1278>>\n#### 1,278"}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("so:\n#### (1, 2)", "(1, 2)"),
        ("#### 3,4", "3,4"),
        ("#### -$1,234,567.50", "-$1234567.50"),
        ("#### Step 1: add\n#### 42", "42"),
        ("#### Step 2: add\n1 + 41 = \\boxed{42}", "#### Step 2: add\n1 + 41 = \\boxed{42}"),
        ("##### 42", "##### 42"),
    ],
)
def test_a_mark_before_the_last_line_is_a_heading_and_commas_part_thousands_in_numbers_alone(answer, wanted):
    assert task({"question": "?", "answer": answer}).answer == wanted


def test_other_columns_are_kept_but_none_that_would_shadow_a_reward_argument():
    made = task({"question": "?", "answer": "5", "level": 3, "tags": ["a"], "completion": "x", "none": None})
    assert made.extras == {"level": 3, "tags": ["a"], "none": None}


def test_cells_are_read_whatever_type_a_table_gave_them():
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": ""}]
    stored = [{**message, "name": None} for message in chat]  # a table gives every key to every message
    stored[0]["content"] = [{"type": "text", "text": USER["content"], "image": None}]
    wanted = [
        USER,
        {**chat[1], "content": "", "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"a": 2}}}]},
        chat[2],
    ]
    for cell in (stored, json.dumps(stored)):
        for column in ("messages", "prompt"):
            assert task({column: cell}).messages == wanted
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}, "b": None}}}}]
    shown = {"properties": {"a": {}}}
    for cell in (tools, json.dumps(tools)):
        made = task({"question": "?", "tools": cell}, chat_template_kwargs={"enable_thinking": False})
        assert made.template_options["tools"][0]["function"]["parameters"] == shown
        assert made.template_options["enable_thinking"] is False
    for cell, text in (
        (5, "5"),
        (5.0, "5"),
        (0.5, "0.5"),
        (Decimal("5.10"), "5.10"),
        (1e300, "1e+300"),
        ("5.0", "5.0"),
    ):
        assert task({"question": "?", "answer": cell}).answer == text
    assert task({"question": '[{"x": 1}] is JSON. Why?'}).messages[0]["content"].startswith("[{")


def test_empty_cells_are_no_answer_no_question_and_no_harm():
    assert task({"question": "?", "answer": "so:\n####"}, needs_answer=True) is None
    for empty in (None, math.nan, "", " \n", []):
        assert task({"question": "?", "answer": empty}).answer is None
        assert task({"question": "?", "answer": empty}, needs_answer=True) is None
        assert task({"question": "?", "answer": empty, "solution": 5}).answer == "5"
        assert task({"question": empty, "answer": "5"}) is None
        assert task({"question": empty, "prompt": "?", "answer": "5"}).messages == [{"role": "user", "content": "?"}]
    extras = {
        "nan": math.nan,
        "many": [{"x": math.nan}],
        "day": datetime.date(2026, 1, 2),
        "cost": Decimal("1.5"),
        "most": math.inf,
    }
    harmless = {"nan": None, "many": [{"x": None}], "day": "2026-01-02", "cost": "1.5", "most": "inf"}
    assert task({"question": "?", **extras}).extras == harmless


def test_template_and_system_prompt():
    made = task({"question": "2 {+} 3", "answer": "5"}, prompt_template="Q: {prompt} {x}", system_prompt="Be brief.")
    assert made.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 2 {+} 3 {x}"},
    ]


MALFORMED = [
    ({"answer": "5"}, {}, "no question: found the columns answer, expected a question in one of messages, question"),
    ({"question": "?", "n": 1}, {"needs_answer": True}, "no answer: found the columns question, n"),
    ({"question": {"a": 1}, "answer": "5"}, {}, "column 'question' is dict, expected text or a number"),
    ({"question": "?", "answer": [5]}, {}, "column 'answer' is list"),
    ({"question": "?", "answer": True}, {}, "column 'answer' is bool"),
    (
        {"question": "hi", "answer": "5"},
        {"system_prompt": "s", "chat": False},
        "raw text, and that needs a chat: leave system_prompt",
    ),
    ({"messages": "hi", "answer": "5"}, {}, "column 'messages' is text that is no JSON .* store a list"),
    ({"prompt": "[{'role': 'user', 'content': 'hi'}]"}, {}, "column 'prompt' is text that is no JSON"),
    ({"messages": '"hi"'}, {}, "messages: expected a list, found 'hi'"),
    ({"messages": [{"content": "hi"}], "answer": "5"}, {}, r"messages\[0\].role: expected a string, found None"),
    ({"messages": [{"from": "human", "value": "hi"}]}, {}, r"messages\[0\].role: expected a string, found None"),
    (
        {"messages": [{"role": "user", "content": 3}]},
        {},
        r"messages\[0\].content: expected a string or a list of parts",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "only text is supported, found 'image'"),
    ({"messages": [{"role": "user", "content": None}]}, {}, r"messages\[0\] \(user\) has a content that is empty"),
    ({"messages": [{"role": "system", "content": ""}]}, {}, "messages is empty"),
    ({"question": "?", "tools": "add(a, b)"}, {}, "column 'tools' is text that is no JSON"),
    (
        {"question": "?", "tools": '{"name": "add"}'},
        {},
        "column 'tools' is .* expected a list of function descriptions",
    ),
    ({"question": "?", "answer": math.inf}, {}, "column 'answer' is inf, expected text or a number"),
    ({"messages": [{"role": "assistant", "content": "5"}], "answer": "5"}, {}, "ends with an assistant's turn"),
    ({"messages": [USER], "answer": "5"}, {"chat": False}, "needs a chat template"),
    ({"messages": [USER], "answer": "5"}, {"prompt_template": "Q {prompt}"}, "prompt_template is for rows with a"),
    (
        {"messages": [{"role": "system", "content": "a"}, USER], "answer": "5"},
        {"system_prompt": "b"},
        "has a system message of its own",
    ),
    (
        {"text": "2 + 3 =", "answer": "5"},
        {"system_prompt": "b"},
        "raw text, and that needs a chat: leave system_prompt out",
    ),
    ({"question": "?", "answer": "5", "image": b"x"}, {}, "column 'image' is no JSON"),
]


@pytest.mark.parametrize(("values", "settings", "complaint"), MALFORMED)
def test_malformed_rows_name_place_column_and_fix(values, settings, complaint):
    with pytest.raises(DatasetError, match=complaint) as raised:
        task(values, **settings)
    assert str(raised.value).startswith("f.jsonl:8: ")


def read(path, **settings):
    return list(read_rows(DatasetConfig(path=str(path), **settings), seed=1))


def test_files_and_folders_in_the_order_of_their_names(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "b.jsonl", [{"question": "b0"}, {"question": "b1"}])
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a0", "a1"], "n": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not a data file")
    rows = read(tmp_path)
    assert [(r.number, r.values["question"]) for r in rows] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert rows[1].where.endswith("a.parquet row 1")
    assert rows[3].where.endswith("b.jsonl:2")
    assert [r.number for r in read(tmp_path, num_rows=3)] == [0, 1, 2]
    assert [r.values["question"] for r in read(tmp_path / "b.jsonl")] == ["b0", "b1"]


def test_a_data_set_saved_by_its_library_is_read(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"question": "a"}, {"question": "b"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "splits")
    assert [row.values["question"] for row in read(tmp_path / "one")] == ["a", "b"]
    (row,) = read(tmp_path / "splits", split="test")
    assert row.values == {"question": "b"} and row.where.endswith("splits row 0")
    with pytest.raises(DatasetError, match="has no split 'dev': set split to one of train, test"):
        read(tmp_path / "splits", split="dev")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(DatasetError, match="not readable as what save_to_disk writes"):
        read(tmp_path / "one")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a"}\n')
    assert [row.values for row in read(tmp_path / "rows.jsonl")] == [{"question": "a"}]


def test_unreadable_sources_say_where(tmp_path):
    import pyarrow
    import pyarrow.parquet

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a"}\n\n{"question": \n')
    with pytest.raises(DatasetError, match=r"bad\.jsonl:3: not JSON"):
        read(bad)
    with pytest.raises(DatasetError, match=r"list\.jsonl:1: found list, expected one mapping"):
        read(write_jsonl(tmp_path / "list.jsonl", [[1]]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "a"}\n{"question": "caf\xe9"}\n')
    with pytest.raises(DatasetError, match=r"latin\.jsonl:2: not UTF-8 .* byte 17"):
        read(tmp_path / "latin.jsonl")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(DatasetError, match="not a readable Parquet file"):
        read(tmp_path / "bad.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"] * 50}), tmp_path / "cut.parquet", use_dictionary=False)
    raw = bytearray((tmp_path / "cut.parquet").read_bytes())
    raw[4:40] = b"\xff" * 36
    (tmp_path / "cut.parquet").write_bytes(raw)
    with pytest.raises(DatasetError, match="not a readable Parquet file"):
        read(tmp_path / "cut.parquet")
    with pytest.raises(DatasetError, match="does not exist"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "rows.txt").write_text("")
    with pytest.raises(DatasetError, match="ends in '.txt', expected .jsonl or .parquet"):
        read(tmp_path / "rows.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no .jsonl or .parquet file"):
        read(tmp_path / "empty")


def test_hub_data_sets_are_read_by_subset_and_split(tmp_path, monkeypatch):
    """A data set in the hub's folder layout, loaded by the library that loads hub ids."""
    import datasets

    rows = [{"question": "How many?", "answer": "It is\n#### 42"}]
    (tmp_path / "main").mkdir()
    write_jsonl(tmp_path / "main" / "test.jsonl", rows)
    real = datasets.load_dataset

    def from_folder(path, subset, split):
        assert path == "openai/gsm8k"
        return real(str(tmp_path), data_dir=subset, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    monkeypatch.setattr(sources, "find_on_hub", lambda name, kind: None)
    found = read("openai/gsm8k", subset="main", split="test")
    assert [r.values for r in found] == rows
    assert task_of(found[0], DatasetConfig(), chat=True).answer == "42"


def test_an_unknown_hub_id_says_what_was_tried():
    with pytest.raises(DatasetError, match="nobody/nothing is no local path, and offline mode is set"):
        read("nobody/nothing")


def test_a_folder_is_read_without_hidden_files_and_folders(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"question": "?", "answer": "1"}])
    (tmp_path / "._b.jsonl").write_bytes(b"\x00\x05")
    (tmp_path / "c.jsonl").mkdir()
    assert [row.where for row in read_rows(DatasetConfig(path=str(tmp_path)), 0)] == [f"{tmp_path}/b.jsonl:1"]
    (tmp_path / "d.jsonl").symlink_to(tmp_path / "absent")
    with pytest.raises(DatasetError, match="d.jsonl cannot be read: No such file"):
        list(read_rows(DatasetConfig(path=str(tmp_path)), 0))


@pytest.mark.parametrize("cell", ["9" * 5000, "[" * 100_000 + "]" * 100_000])
def test_json_beyond_every_bound_is_refused_by_line(cell, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"question": "?", "answer": {cell}}}\n')
    with pytest.raises(DatasetError, match="a.jsonl:1: cannot be read"):
        list(read_rows(DatasetConfig(path=str(tmp_path / "a.jsonl")), 0))
