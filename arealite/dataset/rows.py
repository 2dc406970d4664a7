"""Turns one row into a task: which column is the question, which the answer, and what is kept beside them.

Called by dataset/loader.py for every row, whatever its source.
"""

from __future__ import annotations

import json
from typing import Any

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import DatasetError
from arealite.api.types import Task
from arealite.dataset.sources import Row

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "ground_truth", "solution")
# Names under which a reward function gets other things: a column of that name cannot be passed on as an extra.
RESERVED = ("prompt", "completion", "prompt_ids", "completion_ids", "answer")
FINAL_ANSWER_MARK = "####"


def task_of(row: Row, config: DatasetConfig, chat: bool) -> Task:
    """The task of a row, with id "r<row number>".

    Looks for `messages`, then `question`, `problem` or `prompt` (text: the user message; a list: messages), then
    `text` (raw text that the model continues). With `chat` False (the tokenizer has no chat template) questions are
    raw text as well. The answer is `answer`, `ground_truth` or `solution`; of an answer in GSM8K's form, what follows
    "####". All other columns become extras. Raises DatasetError naming file, row and column.
    """
    column, value = find_column(row, ("messages", *QUESTION_COLUMNS, "text"), "a question")
    answer_column, answer = find_column(row, ANSWER_COLUMNS, "an answer")
    answer_text = text_of(row, answer_column, answer)
    extras = extras_of(row, used=(column, answer_column))
    if FINAL_ANSWER_MARK in answer_text:
        extras.setdefault("solution", answer_text)
        answer_text = answer_text.rpartition(FINAL_ANSWER_MARK)[2].replace(",", "")
    messages, prompt = None, None
    if isinstance(value, list) and column != "text":
        messages = messages_of(row, column, value, config, chat)
    else:
        text = text_of(row, column, value)
        if column == "text":
            prompt = text
        else:
            text = config.prompt_template.replace("{prompt}", text)
            messages, prompt = ([{"role": "user", "content": text}], None) if chat else (None, text)
    if config.system_prompt is not None:
        messages = with_system_message(row, messages, config.system_prompt)
    return Task(id=f"r{row.number}", messages=messages, prompt=prompt, answer=answer_text.strip(), extras=extras)


def find_column(row: Row, names: tuple[str, ...], what: str) -> tuple[str, Any]:
    """The first of the columns `names` that the row has a value in."""
    for name in names:
        if row.values.get(name) is not None:
            return name, row.values[name]
    raise DatasetError(
        f"{row.where}: no {what.split()[-1]}: found the columns {', '.join(map(str, row.values)) or 'none'}, expected"
        f" {what} in one of {', '.join(names)}"
    )


def text_of(row: Row, column: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DatasetError(f"{row.where}: column {column!r} is {type(value).__name__}, expected text or a number")
    return str(value)


def messages_of(row: Row, column: str, value: list[Any], config: DatasetConfig, chat: bool) -> list[dict[str, Any]]:
    """The messages of a chat prompt, checked."""
    for position, message in enumerate(value):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise DatasetError(
                f"{row.where}: {column}[{position}] is {message!r}, expected {{'role': ..., 'content': ...}}"
            )
    if not value or value[-1]["role"] == "assistant":
        raise DatasetError(
            f"{row.where}: {column} is empty or ends with an assistant's turn: nothing is left to answer"
        )
    if not chat:
        raise DatasetError(
            f"{row.where}: {column} needs a chat template, which the tokenizer lacks: use a column `text`"
        )
    if config.prompt_template != "{prompt}":
        raise DatasetError(
            f"{row.where}: prompt_template is for rows with a question, this one has {column}: leave it out"
        )
    return value


def with_system_message(row: Row, messages: list[dict[str, Any]] | None, text: str) -> list[dict[str, Any]]:
    if messages is None:
        raise DatasetError(
            f"{row.where}: system_prompt needs a chat, but this row is raw text: leave system_prompt out"
        )
    if messages[0]["role"] == "system":
        raise DatasetError(f"{row.where}: the row has a system message of its own: leave system_prompt out")
    return [{"role": "system", "content": text}, *messages]


def extras_of(row: Row, used: tuple[str, ...]) -> dict[str, Any]:
    """The columns that are neither question nor answer. Tasks travel through JSON, so these have to as well."""
    extras = {str(k): v for k, v in row.values.items() if k not in used and k not in RESERVED}
    for name, value in extras.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise DatasetError(
                f"{row.where}: column {name!r} is no JSON ({type(value).__name__}): remove it or make it text"
            ) from None
    return extras
