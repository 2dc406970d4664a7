"""Rows of answers and of preferences as tokens, with the tokens that are to be learned. For supervised training.

Called by arealite/supervised.py. A conversation is rendered by the tokenizer's chat template; only what the assistant
says is learned, up to the token that ends the turn, as the model will write it when it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import DatasetError
from arealite.api.types import Batch, Group, Task, Trajectory
from arealite.dataset.prompts import Message, check_shown, check_variables, encode, render, turn_end
from arealite.dataset.rows import (
    find_column,
    is_empty,
    kept_rows,
    refuse_template,
    template_variables,
    text_of,
    turns,
    with_system_message,
)
from arealite.dataset.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")
ANSWER_COLUMNS = ("completion", "response", "answer", "solution", "output")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # how hh-rlhf writes a dialogue as one text
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


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
    `text` (raw; all of it is learned). Empty rows and those of more than `max_length` tokens are left out, and counted.
    What is learned ends with the tokenizer's end-of-sequence token where the template writes nothing after an answer.

    Raises DatasetError: not found, a malformed row (file, line and column named), nothing left.
    """

    def example(row: Row, config: DatasetConfig) -> tuple[Example, int] | None:
        said = _answers(row, config)
        if said is None:
            return None
        if isinstance(said, str):
            tokens = _ended(row, encode(tokenizer, said, is_raw=True), tokenizer)
            mask = np.arange(len(tokens)) > 0
        else:
            tokens, mask = _learned(row, said, tokenizer, template_variables(row, config))
            if is_open:
                tokens = _ended(row, tokens.tolist(), tokenizer)
                mask = np.append(mask, [True] * (len(tokens) - len(mask)))
        return Example(row.id, (tokens,), (mask,)), len(tokens)

    check_variables(tokenizer, config.chat_template_kwargs, are_known=True)
    is_open = tokenizer.chat_template is not None and not turn_end(tokenizer)
    return kept_rows(config, seed, example, "max_length")


def load_preferences(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Example]:
    """For reward models: rows with `chosen` and `rejected`, each a list of messages, a dialogue in hh-rlhf's form, or
    an answer to the row's prompt. The score is wanted at the last token, so a token is added that it is to predict.
    Rows that prefer nothing, as hh-rlhf has some, are left out as empty: two equal sides, an empty answer.

    Raises DatasetError as `load_answers` does.
    """

    def example(row: Row, config: DatasetConfig) -> tuple[Example, int] | None:
        pair = _preference(row, config)
        if pair is None:
            return None
        variables = template_variables(row, config)
        sides = [np.append(_learned(row, said, tokenizer, variables)[0], 0) for said in pair]
        if np.array_equal(sides[0], sides[1]):  # a template may leave out what they differ in
            return None
        masks = tuple(np.arange(len(side)) == len(side) - 1 for side in sides)
        return Example(row.id, tuple(sides), masks), max(map(len, sides))

    check_variables(tokenizer, config.chat_template_kwargs, are_known=True)
    return kept_rows(config, seed, example, "max_length")


def check_row(row: Row, config: DatasetConfig, kind: str) -> None:
    """Raises DatasetError where a row is no example of the kind of run `kind`, as far as columns can tell."""
    (_preference if kind == "rw" else _answers)(row, config)


def _answers(row: Row, config: DatasetConfig) -> list[Message] | str | None:
    """The conversation of an SFT row, or its raw text; None where it is empty."""
    column, value = find_column(row, ("messages", "text", *PROMPT_COLUMNS), "a question")
    if column == "text":
        refuse_template(row, column, config)
        if config.system_prompt is not None:
            with_system_message(row, None, config.system_prompt)
        return text_of(row, column, value)
    if column and column != "messages":
        column, value = find_column(row, ANSWER_COLUMNS, "an answer")
    return _dialogue(row, column, value, config) if column else None


def _preference(row: Row, config: DatasetConfig) -> tuple[list[Message], list[Message]] | None:
    """The preferred and the rejected conversation of a row; None where it prefers nothing."""
    chosen, rejected = (_side(row, name, config) for name in ("chosen", "rejected"))
    return None if chosen is None or rejected is None or chosen == rejected else (chosen, rejected)


def _side(row: Row, column: str, config: DatasetConfig) -> list[Message] | None:
    """One side's messages; None where its answer is empty."""
    _, value = find_column(row, (column,), f"the column {column}")
    if value is None:
        return None
    if isinstance(value, str) and HH_TURN.match(value):
        _, *parts = HH_TURN.split(value)
        value = [
            {"role": HH_ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
        ]
        if not all(turn["content"] for turn in value) or value[-1]["role"] != "assistant":
            return None
    return _dialogue(row, column, value, config)


def _dialogue(row: Row, column: str, value: Any, config: DatasetConfig) -> list[Message] | None:
    """A whole dialogue, with the configured system message and the assistant's turn at its end: what a cell holds, and
    if that is only what the assistant says, the row's question before it. None if that is empty."""
    said, _ = turns(row, column, value, "assistant", config)
    if not said or said[-1]["role"] != "assistant":
        raise DatasetError(f"{row.where}: {column} does not end with an assistant's turn, so there is nothing to learn")
    if column == "messages" or any(turn["role"] != "assistant" for turn in said):
        refuse_template(row, column, config)
    else:
        asking, question = find_column(row, PROMPT_COLUMNS, "a question", is_needed=isinstance(value, str))
        if question is None and isinstance(value, str):
            return None
        if asking == "instruction" and not is_empty(row.values.get("input")):  # what the instruction is about
            question = f"{question}\n\n{text_of(row, 'input', row.values['input'])}"
        said = said if question is None else turns(row, asking, question, "user", config)[0] + said
    if config.system_prompt is None or said[0]["role"] == "system":
        return said
    return [{"role": "system", "content": config.system_prompt}, *said]


def _ended(row: Row, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The tokens and their end of sequence, int64."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DatasetError(
            f"{row.where}: nothing says where the text ends, since the tokenizer has no end-of-sequence token: name one"
            " as eos_token in its tokenizer_config.json, or set tokenizer_path"
        )
    return np.asarray(ids if ids[-1:] == [end] else [*ids, end], np.int64)


def _learned(
    row: Row, messages: list[Message], tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any]
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
        return render(tokenizer, messages[:count], asks, **variables)

    whole = rendered(len(messages), False)
    check_shown(tokenizer, messages, whole, False, **variables)
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            answered = rendered(i + 1, False)
            asked = rendered(i, True) if i else _before_opening(answered, tokenizer, variables)
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
            tokens.append(np.asarray(encode(tokenizer, text), np.int64))
            masks.append(np.full(len(tokens[-1]), is_learned))
        done = end
    return np.concatenate(tokens), np.concatenate(masks)


def _before_opening(answered: str, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any]) -> str:
    """What stands before an answer that opens a conversation, up to the generation prompt: templates cannot be asked
    for it, since there is no message yet."""
    question = [{"role": "user", "content": "question"}]
    without, with_prompt = (render(tokenizer, question, asks, **variables) for asks in (False, True))
    prompt = with_prompt.removeprefix(without)
    return answered[: answered.find(prompt) + len(prompt)] if prompt in answered else ""


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
