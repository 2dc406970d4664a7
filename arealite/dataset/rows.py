"""Turns one row into a task: which column is the question, which the answer, and what is kept beside them. What cells
may hold, here and in rows of supervised training (examples.py), and what becomes of empty ones.

Called by dataset/loader.py for every row, whatever its source.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable
from datetime import date, time
from decimal import Decimal
from typing import Any, TypeVar

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import DatasetError, PromptError
from arealite.api.types import Task
from arealite.dataset.prompts import Message, chat_messages
from arealite.dataset.sources import DatasetPart, Row, parts_of, read_rows

logger = logging.getLogger(__name__)

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "ground_truth", "solution")
# Names under which a reward function gets other things: a column of that name cannot be passed on as an extra.
RESERVED = ("prompt", "completion", "prompt_ids", "completion_ids", "answer")
FINAL_ANSWER = re.compile(r"(?<!#)####(?!#)([^\n]*)\Z")  # GSM8K's last line; elsewhere it may be a heading
BOXED = "\\boxed{"
GROUPED = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?")  # a number with commas between its thousands
MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{(\s*[\"']content|[^{}]*[\"']role)[\"']\s*:")
MAX_EXACT = 2**53  # integers up to here are exact as floats

EMPTY = "have an empty question or answer, or two equal sides"

Made = TypeVar("Made")


def kept_rows(
    config: DatasetConfig, seed: int, make: Callable[[Row, DatasetConfig], tuple[Made, int] | None], limit_name: str
) -> list[Made]:
    """What `make` makes of each row of each data set of `config`, beside its number of tokens. Rows that are empty
    (None) and those of more tokens than `config.<limit_name>` are left out, and each data set reports once: how many,
    why, and where the first one is.

    Raises DatasetError: not found, a malformed row (with its place), or nothing is left.
    """
    return [made for part in parts_of(config) for made in _kept(part, seed, make, limit_name)]


def _kept(
    part: DatasetPart, seed: int, make: Callable[[Row, DatasetConfig], tuple[Made, int] | None], limit_name: str
) -> list[Made]:
    config = part.config
    kept: list[Made] = []
    limit = vars(config)[limit_name]
    left_out: dict[str, list[str]] = {EMPTY: [], f"exceed {limit_name} ({limit})": []}
    empty, long = left_out.values()
    malformed: list[str] = []
    shortest = math.inf
    for row in read_rows(config, seed, malformed, part.prefix):
        try:
            made = make(row, config)
        except (PromptError, DatasetError) as error:
            fault = error if isinstance(error, DatasetError) else DatasetError(f"{row.where}: {error}")
            if config.malformed_rows == "refuse":
                raise fault from error
            malformed.append(str(fault))
            continue
        if made is None:
            empty.append(row.where)
        elif limit is not None and made[1] > limit:
            long.append(row.where)
            shortest = min(shortest, made[1])
        else:
            kept.append(made[0])
    reasons = "; ".join(f"{len(rows)} {why}, the first is {rows[0]}" for why, rows in left_out.items() if rows)
    if malformed:
        reasons += f"{'; ' if reasons else ''}{len(malformed)} are malformed, the first is {malformed[0]}"
    num_left_out = len(empty) + len(long) + len(malformed)
    if not kept:
        told = f"{reasons or 'it has no rows'}{f'; the shortest has {shortest} tokens' if long else ''}"
        raise DatasetError(f"data set {config.path!r} has nothing to use: {told}: check path, split and limits")
    if reasons:
        num_rows = num_left_out + len(kept)
        logger.warning("%s: %d of %d rows are left out: %s", config.path, num_left_out, num_rows, reasons)
    return kept


def task_of(row: Row, config: DatasetConfig, chat: bool, needs_answer: bool = False) -> Task | None:
    """The task of a row, with the row's id; None where question or needed answer are empty.

    Looks for `messages`, then `question`, `problem` or `prompt` (text: the user message; a list, or its JSON:
    messages), then `text` (raw text that the model continues). With `chat` False (the tokenizer has no chat template)
    questions are raw text as well. The answer is `answer`, `ground_truth` or `solution`; where its last line has
    GSM8K's "####", what follows that; of a solution, what is in the last \\boxed{}. All other columns become
    extras. Raises DatasetError naming file, row and column.
    """
    column, value = find_column(row, ("messages", *QUESTION_COLUMNS, "text"), "a question")
    answer_column, cell = find_column(row, ANSWER_COLUMNS, "an answer", is_needed=needs_answer)
    if cell is None and row.values.get("task") == "math":  # AReaL's rows: some right answers, all equal
        answer_column, cell = "solutions", next(iter(row.values.get("solutions") or []), None)
    answer = None if cell is None else text_of(row, answer_column, cell).strip()
    extras = extras_of(row, used=(column, answer_column))
    if answer is not None and (final := FINAL_ANSWER.search(answer)):
        extras.setdefault("solution", answer)
        answer = final[1].strip()
        answer = (answer.replace(",", "") if GROUPED.fullmatch(answer) else answer) or None
    elif answer is not None and answer_column == "solution" and BOXED in answer:
        extras.setdefault("solution", answer)
        answer = last_box(answer)
    if value is None or (answer is None and needs_answer):
        return None
    messages: list[Message] | None = None
    prompt: str | None = None
    if column == "text":
        refuse_template(row, column, config)
        prompt = text_of(row, column, value)
    else:
        said, is_text = turns(row, column, value, "user", config)
        if not said or said[-1]["role"] == "assistant":
            raise DatasetError(
                f"{row.where}: {column} is empty or ends with an assistant's turn: nothing is left to answer"
            )
        if not chat and not is_text:
            raise DatasetError(
                f"{row.where}: {column} needs a chat template, which the tokenizer lacks: use a column `text`"
            )
        messages, prompt = (said, None) if chat else (None, said[0]["content"])
    if config.system_prompt is not None:
        messages = with_system_message(row, messages, config.system_prompt)
    options = {} if messages is None else template_variables(row, config)
    return Task(row.id, messages, prompt, answer, extras, options)


def last_box(text: str) -> str | None:
    """What the last \\boxed{} of a solution holds; None if that is nothing."""
    text, depth = text.rpartition(BOXED)[2], 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i].strip() or None
    return text.strip() or None


def find_column(row: Row, names: tuple[str, ...], what: str, is_needed: bool = True) -> tuple[str, Any]:
    """The first of the columns `names` that holds something, and what; None if all that there are of them are empty."""
    there = [name for name in names if name in row.values]
    for name in there:
        if not is_empty(row.values[name]):
            return name, row.values[name]
    if is_needed and not there:
        raise DatasetError(
            f"{row.where}: no {what.split()[-1]}: found the columns {', '.join(map(str, row.values)) or 'none'},"
            f" expected {what} in one of {', '.join(names)}"
        )
    return "", None


def is_empty(value: Any) -> bool:
    """Whether a cell of a table holds nothing: null, NaN, white space, an empty list."""
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def text_of(row: Row, column: str, value: Any) -> str:
    """A cell's text. A whole number is written as one: columns with empty cells turn 5 into 5.0."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number and not isinstance(value, str):
        found = value if isinstance(value, float) else type(value).__name__
        raise DatasetError(f"{row.where}: column {column!r} is {found}, expected text or a number")
    return str(int(value) if isinstance(value, float) and value.is_integer() and abs(value) < MAX_EXACT else value)


def unpacked(row: Row, column: str, value: Any) -> Any:
    """The cell; a list of messages or tools that is stored as JSON text is read."""
    if not isinstance(value, str) or not (column in ("messages", "tools") or MESSAGES_AS_TEXT.match(value)):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{row.where}: column {column!r} is text that is no JSON ({error}): store a list, or its JSON (json.dumps,"
            " not str); if the user says this text, give messages that hold it"
        ) from None


def said_messages(row: Row, column: str, value: Any) -> list[Message]:
    """The messages of a cell, each of which says something; an empty system message is left out."""
    try:
        messages = chat_messages(column, filled(value, drops=True))
    except PromptError as error:
        raise DatasetError(f"{row.where}: {error}") from None
    for i, message in enumerate(messages):
        if is_empty(message["content"]) and not message.get("tool_calls") and message["role"] not in ("system", "tool"):
            raise DatasetError(
                f"{row.where}: {column}[{i}] ({message['role']}) has a content that is empty, and no tool call: give it"
                " words, or remove the row"
            )
    return [m for m in messages if m["role"] != "system" or m["content"].strip()]


def turns(row: Row, column: str, value: Any, role: str, config: DatasetConfig) -> tuple[list[Message], bool]:
    """The messages of a cell: a list of them, its JSON, or a text that `role` says; and whether it was a text. What the
    user says is put into the prompt template, which nothing else takes."""
    value = unpacked(row, column, value)
    if isinstance(value, list) or column == "messages":
        messages = said_messages(row, column, value)
        if role == "user":
            refuse_template(row, column, config)
        return messages, False
    text = text_of(row, column, value)
    return [
        {"role": role, "content": config.prompt_template.replace("{prompt}", text) if role == "user" else text}
    ], True


def template_variables(row: Row, config: DatasetConfig) -> dict[str, Any]:
    """What the chat template is given beside the messages: `chat_template_kwargs`, and the row's tools."""
    tools = row.values.get("tools")
    if is_empty(tools):
        return dict(config.chat_template_kwargs)
    tools = unpacked(row, "tools", tools)
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DatasetError(f"{row.where}: column 'tools' is {tools!r:.200}, expected a list of function descriptions")
    return {**config.chat_template_kwargs, "tools": filled(tools, drops=True)}


def filled(value: Any, drops: bool = False) -> Any:
    """The value as JSON can carry it: NaN is null; infinity, a date, a decimal are text. `drops` leaves out the keys
    without a value that tables give to every entry."""
    if isinstance(value, dict):
        entries = {str(key): filled(entry, drops) for key, entry in value.items()}
        return {key: entry for key, entry in entries.items() if not (drops and entry is None)}
    if isinstance(value, list):
        return [filled(entry, drops) for entry in value]
    if isinstance(value, date | time | Decimal) or (isinstance(value, float) and math.isinf(value)):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def refuse_template(row: Row, column: str, config: DatasetConfig) -> None:
    """Raises DatasetError if there is a prompt_template, since this row has no question to put into it."""
    if config.prompt_template != "{prompt}":
        raise DatasetError(
            f"{row.where}: prompt_template is for rows with a question, this one has {column}: leave it out"
        )


def with_system_message(row: Row, messages: list[Message] | None, text: str) -> list[Message]:
    if messages is None or messages[0]["role"] == "system":
        has = "is raw text, and that needs a chat" if messages is None else "has a system message of its own"
        raise DatasetError(f"{row.where}: the row {has}: leave system_prompt out")
    return [{"role": "system", "content": text}, *messages]


def extras_of(row: Row, used: tuple[str, ...]) -> dict[str, Any]:
    """The columns that are neither question nor answer. Tasks travel through JSON, so these have to as well."""
    extras = {str(k): filled(v) for k, v in row.values.items() if k not in used and k not in RESERVED}
    for name, value in extras.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DatasetError(
                f"{row.where}: column {name!r} is no JSON ({error}): remove it or make it text"
            ) from None
    return extras
