"""Rows of answers and of preferences as tokens, with the tokens that are to be learned. For supervised training.

Called by arealite/supervised.py. A conversation is rendered by the tokenizer's chat template; only what the assistant
says is learned, up to the token that ends the turn, as the model will write it when it is asked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import DatasetError
from arealite.api.types import Batch, Group, Task, Trajectory
from arealite.dataset.rows import find_column, text_of
from arealite.dataset.sources import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")
ANSWER_COLUMNS = ("completion", "response", "answer", "solution", "output")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # how hh-rlhf writes a dialogue as one text
HH_ROLES = {"Human": "user", "Assistant": "assistant"}

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row: a sequence, or the preferred and the rejected one: tokens int64 [T], and which are learned, bool [T]."""

    id: str
    tokens: tuple[np.ndarray, ...]
    loss_mask: tuple[np.ndarray, ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


def load_answers(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Example]:
    """For SFT: rows with `messages` (every turn of the assistant is learned), with a question and an answer, or with
    `text` (raw; all of it is learned).

    Raises DatasetError: not found, a malformed row (file, line and column named), nothing left.
    """

    def example(row: Row) -> Example:
        if row.values.get("messages") is None and row.values.get("text") is not None:
            ids = _raw(text_of(row, "text", row.values["text"]), tokenizer)
            return Example(f"r{row.number}", (ids,), (np.arange(len(ids)) > 0,))
        tokens, mask = _learned(row, _conversation(row, config), tokenizer)
        return Example(f"r{row.number}", (tokens,), (mask,))

    return _load(config, seed, example)


def load_preferences(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Example]:
    """For reward models: rows with `chosen` and `rejected`, each a list of messages, a dialogue in hh-rlhf's form, or
    an answer to the row's prompt. The score is wanted at the last token, so a token is added that it is to predict.
    Rows that prefer nothing, as hh-rlhf has some, are left out with a warning: two equal sides, an empty answer.

    Raises DatasetError as `load_answers` does.
    """

    def example(row: Row) -> Example | None:
        chosen, rejected = (_side(row, name, config) for name in ("chosen", "rejected"))
        if chosen is None or rejected is None or chosen == rejected:
            return None
        sequences = [np.append(_learned(row, messages, tokenizer)[0], 0) for messages in (chosen, rejected)]
        return Example(f"r{row.number}", tuple(sequences), tuple(np.arange(len(s)) == len(s) - 1 for s in sequences))

    return _load(config, seed, example)


def check_row(row: Row, config: DatasetConfig, kind: str) -> None:
    """Raises DatasetError where a row is no example of the kind of run `kind`, as far as columns can tell."""
    if kind == "rw":
        for name in ("chosen", "rejected"):
            _side(row, name, config)
    elif row.values.get("messages") is not None or row.values.get("text") is None:
        _conversation(row, config)


def _load(config: DatasetConfig, seed: int, example: Callable[[Row], Example | None]) -> list[Example]:
    """All rows but those of more than `max_length` tokens, and those that are no example; both are counted."""
    kept: list[Example] = []
    left_out: dict[str, list[str]] = {"are empty or prefer nothing": [], f"exceed max_length ({config.max_length})": []}
    empty, long = left_out.values()
    for row in read_rows(config, seed):
        made = example(row)
        if made is None:
            empty.append(row.where)
        elif config.max_length is not None and max(map(len, made.tokens)) > config.max_length:
            long.append(row.where)
        else:
            kept.append(made)
    for why, rows in left_out.items():
        if rows:
            logger.warning("%d rows of %s %s and are left out, the first is %s", len(rows), config.path, why, rows[0])
    if not kept:
        told = ", ".join(f"{len(rows)} {why}" for why, rows in left_out.items() if rows) or "it has no rows"
        raise DatasetError(f"data set {config.path!r} gives no example: {told}: check path, split, max_length")
    return kept


def _conversation(row: Row, config: DatasetConfig) -> list[Message]:
    """The messages of an SFT row, the last one the assistant's."""
    value = row.values.get("messages")
    if value is not None:
        return _checked(row, "messages", value, config)
    column, question = find_column(row, PROMPT_COLUMNS, "a question")
    answer_column, answer = find_column(row, ANSWER_COLUMNS, "an answer")
    return _asked(row, column, question, answer_column, text_of(row, answer_column, answer), config)


def _side(row: Row, column: str, config: DatasetConfig) -> list[Message] | None:
    """One side's messages; None where its answer is empty."""
    _, value = find_column(row, (column,), f"the column {column}")
    if isinstance(value, list):
        return _checked(row, column, value, config)
    text = text_of(row, column, value)
    if HH_TURN.match(text):
        _, *parts = HH_TURN.split(text)
        turns = [
            {"role": HH_ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
        ]
        is_whole = all(turn["content"] for turn in turns) and turns[-1]["role"] == "assistant"
        return _checked(row, column, turns, config) if is_whole else None
    if not text.strip():
        return None
    prompt_column, question = find_column(row, PROMPT_COLUMNS, "a question")
    return _asked(row, prompt_column, question, column, text, config)


def _asked(row: Row, column: str, question: Any, of_answer: str, answer: str, config: DatasetConfig) -> list[Message]:
    text = config.prompt_template.replace("{prompt}", text_of(row, column, question))
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return _checked(row, of_answer, turns, config)


def _checked(row: Row, column: str, messages: Any, config: DatasetConfig) -> list[Message]:
    """The messages with the configured system message, if they end with something that the assistant says."""
    for position, message in enumerate(messages if isinstance(messages, list) else [messages]):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and message.get("content")):
            raise DatasetError(
                f"{row.where}: {column}[{position}] is {message!r}, expected {{'role': ..., 'content': ...}} with a"
                " content that is not empty"
            )
    if not messages or messages[-1]["role"] != "assistant":
        raise DatasetError(f"{row.where}: {column} does not end with an assistant's turn, so there is nothing to learn")
    if config.system_prompt is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": config.system_prompt}, *messages]


def _raw(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Text without a chat: the tokens that the tokenizer makes of it, and its end-of-sequence token."""
    ids = tokenizer(text)["input_ids"]
    return np.asarray([*ids, *([] if ids[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id])], np.int64)


def _learned(
    row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a conversation, and which of them the assistant says: the end of each turn too, white space after not.

    What is asked and what is answered become tokens apart, as they do when the model is asked. Where a template shows
    earlier turns differently once others have followed (it hides their reasoning), the last turn alone is learned.
    """
    if tokenizer.chat_template is None:
        raise DatasetError(
            f"{row.where}: a conversation needs a chat template, which the tokenizer lacks: give rows with a column"
            " `text`, or set tokenizer_path to a chat model"
        )

    def rendered(count: int, asks: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asks))

    whole = rendered(len(messages), False)
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, answered = rendered(i, True), rendered(i + 1, False)
            if whole.startswith(answered) and answered.startswith(asked):
                spans.append((len(asked), len(answered.rstrip())))
    if not spans or spans[-1][1] != len(whole.rstrip()):
        raise DatasetError(
            f"{row.where}: the chat template does not put the last answer behind its own generation prompt, so what is"
            " to be learned cannot be told apart: use another template"
        )
    tokens, masks, done = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)], 0
    for begin, end in spans:
        for text, is_learned in ((whole[done:begin], False), (whole[begin:end], True)):
            tokens.append(np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64))
            masks.append(np.full(len(tokens[-1]), is_learned))
        done = end
    return np.concatenate(tokens), np.concatenate(masks)


def pack_examples(examples: Sequence[Example], places: Sequence[int], num_examples: int) -> Batch:
    """The batch of `examples`, a share of a step of `num_examples`; `places` are their positions in the step, which
    become group ids. The first sequence of an example has reward 1, a second one 0."""
    groups = []
    for place, example in zip(places, examples, strict=True):
        sides = []
        for side, (tokens, mask) in enumerate(zip(example.tokens, example.loss_mask, strict=True)):
            nothing = [0.0] * len(tokens), [-1] * len(tokens)  # logprobs and versions
            sides.append(Trajectory(example.id, side, tokens.tolist(), mask.tolist(), *nothing, 1.0 - side, "stop"))
        groups.append(Group(Task(example.id), place, sides))
    return replace(
        Batch.pack(groups, num_groups=num_examples),
        group_ids=np.asarray([group.ordinal for group in groups for _ in group.trajectories], np.int64),
    )
