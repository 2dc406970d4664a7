"""Loads a data set as tasks, and draws tasks from it endlessly with a position that can be saved.

Called by training scripts. `load_tasks` runs on every rank; only the rollout head (rank 0) draws.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from arealite.api.cli_args import DatasetConfig, RunConfig
from arealite.api.config_rules import warm_up
from arealite.api.errors import ConfigError, DatasetError, RecoveryError
from arealite.api.types import Task, as_record
from arealite.dataset.examples import Example
from arealite.dataset.fetch import resolve_model
from arealite.dataset.rows import task_of
from arealite.dataset.sources import read_rows

logger = logging.getLogger(__name__)

Drawn = TypeVar("Drawn", Task, Example)


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_path`, else of the trained model."""
    return AutoTokenizer.from_pretrained(resolve_model(config.tokenizer_path or config.trained[1].path))


def load_tasks(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Task]:
    """All tasks in the order of their rows, "r<row>" their ids; longer ones than `max_prompt_tokens` are left out.
    `seed` matters for generated tasks only.

    Raises DatasetError: not found, a malformed row (file, line and column named), nothing left.
    """
    chat = tokenizer.chat_template is not None
    tasks = [task_of(row, config, chat) for row in read_rows(config, seed)]
    if not tasks:
        raise DatasetError(f"data set {config.path!r} has no rows: check path, split and num_rows")
    if config.max_prompt_tokens is None:
        return tasks
    lengths = prompt_lengths(tasks, tokenizer)
    kept = [task for task, length in zip(tasks, lengths, strict=True) if length <= config.max_prompt_tokens]
    if not kept:
        raise DatasetError(
            f"data set {config.path!r}: all {len(tasks)} prompts are longer than max_prompt_tokens"
            f" ({config.max_prompt_tokens}); the shortest has {min(lengths)} tokens: raise the limit"
        )
    if len(kept) < len(tasks):
        logger.warning(
            "%s: %d of %d rows left out, their prompts are longer than max_prompt_tokens (%d); the longest has %d",
            *(config.path, len(tasks) - len(kept), len(tasks), config.max_prompt_tokens, max(lengths)),
        )
    return kept


def prompt_lengths(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each prompt, as the model will see it: chat template and generation prompt included."""
    texts = [
        task.prompt
        if task.messages is None
        else tokenizer.apply_chat_template(task.messages, tokenize=False, add_generation_prompt=True)
        for task in tasks
    ]
    # The template writes the special tokens of a chat itself; raw text gets those that the tokenizer adds.
    return [
        len(tokenizer(text, add_special_tokens=task.messages is None)["input_ids"])
        for task, text in zip(tasks, texts, strict=True)
    ]


class StatefulDataLoader(Generic[Drawn]):
    """An endless stream of tasks (api.engine.DataSource) or examples: epoch after epoch, each in its own order from
    the seed.

    The position is one task wide: a loader that loads `state_dict()` goes on with exactly the next task. Task ids
    are "e<epoch>-r<row>", so that every draw of a row has its own. A batch may span two epochs; no row is skipped.
    """

    def __init__(self, tasks: Sequence[Drawn], config: RunConfig) -> None:
        if not tasks:
            raise DatasetError("the data loader got no tasks: expected at least one")
        self._tasks: Sequence[Drawn] = tasks
        self._config = config
        self._seed = config.seed
        self._shuffle = config.train_dataset.shuffle
        self.batch_size = config.train_dataset.batch_size
        self._position = 0
        self._order: tuple[int, np.ndarray] | None = None
        records = [as_record(task) for task in tasks]
        self._fingerprint = zlib.crc32(json.dumps(records, sort_keys=True, default=np.ndarray.tolist).encode())

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row has been drawn once."""
        return -(-len(self._tasks) // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run. Raises ConfigError when warm-up would be all of them."""
        config = self._config
        total = config.total_train_steps or config.total_train_epochs * self.steps_per_epoch
        if problems := list(warm_up(config, total)):
            raise ConfigError("\n".join(problems))
        return total

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        epoch, place = divmod(self._position, len(self._tasks))
        task = self._tasks[int(self._order_of(epoch)[place])]
        self._position += 1
        return replace(task, id=f"e{epoch}-{task.id}")

    def _order_of(self, epoch: int) -> np.ndarray:
        """int64 [number of tasks], which task stands at which place of the epoch; the last one used is kept."""
        if self._order is None or self._order[0] != epoch:
            count = len(self._tasks)
            order = np.random.default_rng([self._seed, epoch]).permutation(count) if self._shuffle else np.arange(count)
            self._order = (epoch, order)
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: tasks drawn so far, and what the stream depends on."""
        return {"position": self._position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the tasks that `state` has drawn. Raises RecoveryError when the stream would be another one."""
        changed = {key: (state.get(key), now) for key, now in self._identity().items() if state.get(key) != now}
        if changed:
            differences = ", ".join(f"{key} was {then!r} and is {now!r}" for key, (then, now) in changed.items())
            raise RecoveryError(
                f"the recovery point belongs to another data stream ({differences}): restore data set and seed, or"
                " start a new trial_name"
            )
        self._position = state["position"]

    def _identity(self) -> dict[str, Any]:
        """What makes the stream: seed, shuffling, and the tasks themselves (CRC-32 of their JSON)."""
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_tasks": len(self._tasks),
            "fingerprint": self._fingerprint,
        }
