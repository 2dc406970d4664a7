"""Loads a data set as tasks, and draws tasks from it endlessly with a position that can be saved.

Called by training scripts. `load_tasks` runs on every rank; only the rollout head (rank 0) draws.
"""

from __future__ import annotations

import inspect
import json
import logging
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any, Generic

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from arealite.api.cli_args import DatasetConfig, GRPOConfig, RunConfig, RWConfig
from arealite.api.config_rules import warm_up
from arealite.api.errors import ConfigError, DatasetError, RecoveryError
from arealite.api.types import Group, Task, as_record
from arealite.dataset.mixture import Drawn, Source, Stream, next_source
from arealite.dataset.prompts import check_shown, check_variables, encode, prompt_text, turn_end
from arealite.dataset.rows import kept_rows, task_of
from arealite.dataset.sources import Row, parts_of
from arealite.models.fetch import resolve_model
from arealite.models.folder import open_config, open_tokenizer

logger = logging.getLogger(__name__)


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_path`, else of the trained model. A warning tells if answers have no end.

    Raises ConfigError: there is none.
    """
    model = resolve_model(config.trained[1].path)
    path = resolve_model(config.tokenizer_path or model)
    tokenizer: PreTrainedTokenizerBase = open_tokenizer(path)
    if tokenizer.chat_template is not None and not isinstance(config, RWConfig):
        complaint = _missing_end(config, model, tokenizer)
        if complaint:
            logger.warning("the chat template of %s %s", path, complaint)
    return tokenizer


def _missing_end(config: RunConfig, model: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What is wrong between the end of a turn, as the chat template writes it, and the tokens that end generation."""
    end = turn_end(tokenizer)
    known, fix = {tokenizer.eos_token_id}, "name it eos_token in the tokenizer's tokenizer_config.json"
    for read in (GenerationConfig.from_pretrained, lambda path: open_config(path).get_text_config()):
        with suppress(OSError, ValueError, ConfigError):
            found = read(model).to_dict().get("eos_token_id")
            known |= set(found) if isinstance(found, list) else {found}
    if isinstance(config, GRPOConfig):
        known |= set(config.gconfig.stop_token_ids)
        if not end or any(stop in tokenizer.decode(end) for stop in config.gconfig.stop):
            return ""
        fix = f"set gconfig.stop_token_ids=[{end[0]}], or {fix}"
    elif not end:
        return "writes nothing after an answer, so the tokenizer's end of sequence is learned after the last one"
    if end[0] in known:
        return ""
    text = tokenizer.decode(end)
    return f"ends a turn with {text!r}, and token {end[0]} is no end token of {model}: answers go on after it; {fix}"


def load_tasks(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    reward_fn: Callable[..., Any] | None = None,
) -> list[Task]:
    """All tasks in the order of their rows, "r<row>" their ids; longer ones than `max_prompt_tokens`, and empty ones,
    are left out, counted and reported. `seed` matters for generated tasks only. A `reward_fn` whose argument `answer`
    has no default needs an answer in each row; others may have rows without. One with an argument `verifier` is given
    the name of what grades a row.

    Raises DatasetError: not found, a malformed row (file, line and column named), nothing left.
    """
    chat = tokenizer.chat_template is not None
    answer, verifier = (_argument(reward_fn, name) for name in ("answer", "verifier"))
    needs_answer = answer is not None and answer.default is answer.empty
    check_variables(tokenizer, config.chat_template_kwargs, are_known=True)

    def made(row: Row, config: DatasetConfig) -> tuple[Task, int] | None:
        task = task_of(row, config, chat, needs_answer)
        if task is None:
            return None
        if verifier is not None:  # reward/named.py
            if not row.verifier:
                raise DatasetError(
                    f"{row.where}: nothing says how to grade answers: give the script a reward function, or the rows a"
                    " column `verifier` with package.module:FUNCTION"
                )
            task.extras["verifier"] = row.verifier
        text = prompt_text(tokenizer, task)
        if task.messages is not None:
            check_shown(tokenizer, task.messages, text, **task.template_options)
        is_short = config.max_prompt_tokens is None  # counting takes ten times as long as the rest
        return task, 0 if is_short else len(encode(tokenizer, text, is_raw=task.messages is None))

    tasks = kept_rows(config, seed, made, "max_prompt_tokens")
    num_open = sum(task.answer is None for task in tasks)
    if num_open and (reward_fn is None or answer is not None):  # programs are graded by tests
        logger.warning("%s: %d of %d rows have no answer, their rewards get none", config.path, num_open, len(tasks))
    return tasks


def _argument(reward_fn: Callable[..., Any] | None, name: str) -> inspect.Parameter | None:
    try:
        return None if reward_fn is None else inspect.signature(reward_fn).parameters.get(name)
    except (TypeError, ValueError):  # it does not tell its arguments
        return None


class StatefulDataLoader(Generic[Drawn]):
    """An endless stream of tasks (api.protocols.DataSource) or examples: epoch after epoch, each in its own order from
    the seed. Of a mixture each data set has epochs of its own, and its share of the draws.

    The position is one task wide: a loader that loads `state_dict()` goes on with exactly the next task. Task ids
    are "e<epoch>-r<row>" ("e<epoch>-s<data set>-r<row>" of a mixture), so that every draw of a row has its own. A batch
    may span two epochs; no row is skipped but those that rest.
    """

    def __init__(self, tasks: Sequence[Drawn], config: RunConfig) -> None:
        if not tasks:
            raise DatasetError("the data loader got no tasks: expected at least one")
        self._config = config
        self.batch_size = config.train_dataset.batch_size
        self._num_tasks = len(tasks)
        self._place: dict[str, tuple[Source[Drawn], int]] = {}  # of each row: its data set, and its level there
        self._sources: list[Source[Drawn]] = _sources(tasks, config, self._place)
        self._noted: deque[Group] = deque()  # by the thread of the rollout head; this one takes them out
        self._rewards: dict[str, list[float]] = defaultdict(list)  # by source, since the last `stats`
        records = [as_record(task) for task in tasks]
        self._fingerprint = zlib.crc32(json.dumps(records, sort_keys=True, default=np.ndarray.tolist).encode())

    @property
    def steps_per_epoch(self) -> int:
        """Steps that draw as often as there are rows: without a mixture, and if none rests, each row once."""
        return -(-self._num_tasks // self.batch_size)

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
        self._learn()
        return next_source(self._sources).draw()

    def note(self, group: Group) -> None:
        """How answers to a drawn task were rewarded, also of a group that is not trained on: prompts may rest, and a
        curriculum go on. From any thread; it counts from the next draw on."""
        self._noted.append(group)

    def _learn(self) -> None:
        rest = self._config.train_dataset.rest_epochs
        while self._noted:
            group = self._noted.popleft()
            mark, _, row = group.task.id.partition("-")
            rewards = [t.reward for t in group.trajectories if t.reward is not None]
            if row not in self._place or not rewards:
                continue
            source, level = self._place[row]
            self._rewards[source.name].append(fmean(rewards))
            source.note(level, fmean(rewards), self.batch_size)
            if rest and len(rewards) > 1 and min(rewards) == max(rewards):
                rests = source.streams[level].rests
                rests[row] = max(rests.get(row, 0), int(mark[1:]) + rest)

    def stats(self) -> dict[str, float]:
        """Since the last call: the mean reward of each data set of a mixture; levels, and how many rows rest now."""
        self._learn()
        found = {}
        for source in self._sources:
            if len(self._sources) > 1 and (rewards := self._rewards[source.name]):
                found[f"reward_mean_of/{source.name}"] = fmean(rewards)
            if source.config.curriculum is not None:
                found[f"level_of/{source.name}"] = float(source.level)
        if self._config.train_dataset.rest_epochs:
            found["num_rows_resting"] = float(sum(s.streams[s.level].num_resting() for s in self._sources))
        self._rewards.clear()
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: tasks drawn so far, what rests, and what the stream depends on."""
        self._learn()
        return {"sources": {source.name: source.state_dict() for source in self._sources}} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the tasks that `state` has drawn. Raises RecoveryError when the stream would be another one."""
        changed = {key: (state.get(key), now) for key, now in self._identity().items() if state.get(key) != now}
        if changed:
            differences = ", ".join(f"{key} was {then!r} and is {now!r}" for key, (then, now) in changed.items())
            raise RecoveryError(
                f"the recovery point belongs to another data stream ({differences}): restore data set and seed, or"
                " start a new trial_name"
            )
        self._noted.clear()
        for source in self._sources:
            source.load_state_dict(state["sources"][source.name])

    def _identity(self) -> dict[str, Any]:
        """What makes the stream: seed, shuffling, shares, and the tasks themselves (CRC-32 of their JSON)."""
        return {
            "seed": self._config.seed,
            "shuffle": self._config.train_dataset.shuffle,
            "num_tasks": self._num_tasks,
            "weights": {source.name: source.weight for source in self._sources},
            "fingerprint": self._fingerprint,
        }


def _sources(
    tasks: Sequence[Drawn], config: RunConfig, place: dict[str, tuple[Source[Drawn], int]]
) -> list[Source[Drawn]]:
    """The data sets that `tasks` are from, by the prefixes of their ids; fills in `place`.

    Raises DatasetError: one of the data sets has no task.
    """
    sources: dict[str, Source[Drawn]] = {}
    for number, part in enumerate(parts_of(config.train_dataset)):
        rows = [task for task in tasks if task.id.startswith(part.prefix)]
        if not rows:
            raise DatasetError(f"none of {len(tasks)} tasks is of {part.source}: their ids would begin {part.prefix!r}")
        source = sources.setdefault(part.source, Source(part.source, part.config, [], part.config.weight or len(rows)))
        place.update({row.id: (source, len(source.streams)) for row in rows})
        source.streams.append(Stream(rows, config.seed, number, config.train_dataset.shuffle))
    return list(sources.values())
