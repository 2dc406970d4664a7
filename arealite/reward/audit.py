"""`arealite reward test`: a reward function tried on rows before a run, and what looks wrong is told. Called by cli.py.

Rows with a column `completion` are graded as they are; for others, answers are made whose worth is known.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from arealite.api.cli_args import DatasetConfig
from arealite.api.errors import DatasetError, RewardError
from arealite.api.types import Task
from arealite.dataset.rows import is_empty, task_of
from arealite.dataset.sources import read_rows
from arealite.observe.reasons import by_kind, last_line
from arealite.reward.pool import RewardFunction, RewardPool, Score

OWN, OTHER, NOTHING, QUESTION, GIVEN = (
    "the row's own answer", "another row's answer", "an empty text", "the question again", "the row's completion"
)  # fmt: skip
MAX_SHOWN = 100  # characters of an answer


@dataclass(frozen=True)
class Trial:
    """One call: the kind of answer, the task, and the answer; `expected`: the reward that the row names."""

    kind: str
    task: Task
    completion: str
    expected: float | None = None


@dataclass
class Audit:
    """What was found. `rewards`: of each kind of answer; `errors`: how many of each kind; `seconds`: of each call."""

    rewards: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def table(self) -> str:
        width = max(map(len, self.rewards), default=0)
        lines = [f"{'answer':{width}}  {'calls':>6} {'mean':>7} {'lowest':>7} {'highest':>7}"]
        for kind, rewards in self.rewards.items():
            numbers = [fmean(rewards), min(rewards), max(rewards)] if rewards else [math.nan] * 3
            lines.append(f"{kind:{width}}  {len(rewards):6} " + " ".join(f"{n:7.3f}" for n in numbers))
        if len(self.seconds) > 1:
            slowest = quantiles(self.seconds, n=100)[-1]
            times = [f"{1000 * s:.1f} ms" for s in (median(self.seconds), slowest, max(self.seconds))]
            lines.append("time of a call: median {}, 99% within {}, longest {}".format(*times))
        lines += [f"error, {number} times: {reason}" for reason, number in self.errors.items()]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings or ["none"])])


def audit(reward_fn: RewardFunction, path: str, num_rows: int | None, limit_s: float) -> Audit:
    """Three passes over the same calls, each in a fresh worker: forwards, backwards, forwards again. What differs
    between the first and the third is chance; between the first and the second alone, the order.

    Raises:
        DatasetError: the rows cannot be read, or none has an answer or a completion.
        ConfigError: the function cannot be called with them.
    """
    trials = list(_trials(path, num_rows))
    if not trials:
        raise DatasetError(f"{path} has no row with a completion or an answer to try; expected a column of that name")
    found = Audit()
    first = asyncio.run(_grade(reward_fn, trials, limit_s, found.seconds))
    backwards = asyncio.run(_grade(reward_fn, trials[::-1], limit_s))[::-1]
    again = asyncio.run(_grade(reward_fn, trials, limit_s))
    found.errors = by_kind(last_line(o) for o in first if isinstance(o, str))
    graded = [(trial, o.reward) for trial, o in zip(trials, first, strict=True) if isinstance(o, Score)]
    found.rewards = {kind: [r for t, r in graded if t.kind == kind] for kind in dict.fromkeys(t.kind for t in trials)}
    found.warnings = [
        *_about_rewards(graded),
        *_about_repeats(trials, first, backwards, again),
        *(
            [f"some calls take more than half of the limit of {limit_s:g} s"]
            if max(found.seconds) > limit_s / 2
            else []
        ),
    ]
    return found


def report(reward_fn: RewardFunction, path: str, num_rows: int | None, limit_s: float, json_path: str | None) -> int:
    """Prints the audit; the exit code: 1 when a call failed or something looks wrong."""
    found = audit(reward_fn, path, num_rows, limit_s)
    print(found.table())
    if json_path:
        Path(json_path).write_text(json.dumps(asdict(found), indent=1) + "\n")
    return int(bool(found.errors or found.warnings))


def _trials(path: str, num_rows: int | None) -> Iterator[Trial]:
    config = DatasetConfig(path=path, num_rows=num_rows)
    read = [(row, task_of(row, config, chat=False)) for row in read_rows(config, 0)]
    tasks = [task for _, task in read if task is not None and task.answer is not None]
    for row, task in read:
        if task is None:
            continue
        completion = row.values.get("completion")
        if not is_empty(completion):
            expected = row.values.get("expected")
            yield Trial(GIVEN, task, str(completion), None if is_empty(expected) else float(str(expected)))
        elif task.answer is not None:
            yield Trial(OWN, task, str(task.extras.get("solution", task.answer)))
            other = next((t for t in tasks if t.answer != task.answer), None)
            if other is not None:
                yield Trial(OTHER, task, str(other.answer))
            yield Trial(NOTHING, task, "")
            yield Trial(QUESTION, task, task.prompt or "")


async def _grade(
    reward_fn: RewardFunction, trials: list[Trial], limit_s: float, seconds: list[float] | None = None
) -> list[Score | str]:
    """The score of each trial, or the error's text, one after the other in one fresh worker."""
    pool = RewardPool(reward_fn, limit_s=limit_s)
    outcomes: list[Score | str] = []
    try:
        for number, trial in enumerate(trials):
            task, began = trial.task, time.perf_counter()
            try:
                score = await pool.score(task.prompt or "", trial.completion, [], [], task.answer, task.extras)
                outcomes.append(score)
            except RewardError as error:
                outcomes.append(str(error))
            if seconds is not None and number > 0:  # the first one starts the process
                seconds.append(time.perf_counter() - began)
    finally:
        pool.close()
    return outcomes


def _about_rewards(graded: list[tuple[Trial, float]]) -> Iterator[str]:
    values = {reward for _, reward in graded}
    if len(values) == 1 and len(graded) > 1:
        yield f"every answer gets {values.pop():g}: nothing can be learned"
        return
    best = max(values, default=0.0)
    wrong = [
        (OWN, "get less than the best reward for their own answer", lambda reward: reward < best),
        (OTHER, "give the best reward to another row's answer", lambda reward: reward >= best),
        (NOTHING, "give the best reward to an empty text", lambda reward: reward >= best),
        (QUESTION, "give the best reward to the question itself", lambda reward: reward >= best),
    ]  # fmt: skip
    for kind, what, is_wrong in wrong:
        rows = [trial for trial, reward in graded if trial.kind == kind and is_wrong(reward)]
        if rows:
            told = (
                f"{rows[0].task.id} ({rows[0].completion[:MAX_SHOWN]!r} for {str(rows[0].task.answer)[:MAX_SHOWN]!r})"
            )
            yield f"{len(rows)} rows {what}, the first is {told}"
    off = [(trial, reward) for trial, reward in graded if trial.expected is not None and trial.expected != reward]
    if off:
        trial, reward = off[0]
        told = f"{trial.task.id}: {reward:g} for {trial.completion[:MAX_SHOWN]!r}, expected {trial.expected:g}"
        yield f"{len(off)} rows get another reward than their column `expected` says, the first is {told}"


def _about_repeats(trials: list[Trial], first: list[Any], backwards: list[Any], again: list[Any]) -> Iterator[str]:
    chance = [i for i in range(len(trials)) if _differ(first[i], again[i])]
    order = [i for i in range(len(trials)) if _differ(first[i], backwards[i]) and i not in set(chance)]
    for places, what in (
        (chance, "another reward when asked again"),
        (order, "another reward in another order of calls"),
    ):
        if places:
            i, others = places[0], again if places is chance else backwards
            rewards = " and ".join(
                f"{o.reward:g}" if isinstance(o, Score) else "an error" for o in (first[i], others[i])
            )
            yield f"{len(places)} of {len(trials)} answers get {what}, the first is {trials[i].task.id}: {rewards}"


def _differ(one: Score | str, other: Score | str) -> bool:
    if isinstance(one, Score) and isinstance(other, Score):
        return one != other
    return isinstance(one, Score) != isinstance(other, Score)
