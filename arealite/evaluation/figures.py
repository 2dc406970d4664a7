"""From answer sheets to the numbers of an evaluation, as JSON and as a table. Called by eval_command.py and page.py."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from arealite.api.errors import ConfigError, RewardError
from arealite.evaluation.sheet import AnswerSheet, GradedAnswer, Problem
from arealite.evaluation.statistics import (
    ALPHA,
    Estimate,
    estimate,
    estimate_difference,
    majority_at_k,
    p_value,
    pass_at_k,
)
from arealite.reward.extraction import extract_answer
from arealite.reward.number import number_of

CORRECT_REWARD = 1.0  # an answer counts for pass@k and maj@k when its reward is at least this
DIFFICULTY_COLUMNS = ("difficulty", "level")
MAX_GROUPS = 8  # of a column's values; more of them, if they are numbers, are put into quarters
PASS_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)

Answers = Sequence[GradedAnswer]
Values = dict[str, float]  # of problems, by id
Span = tuple[str, float, float]  # its name, from, to below
PARTS = {"pass_at": "pass@", "majority_at": "maj@", "by_dataset": "", "by_difficulty": "", "by_length": ""}


def vote_of(answer: GradedAnswer) -> str:
    """What an answer votes for in maj@k: what `extract_answer` finds in it, a number by its value; where that is
    nothing, its whole text; "" if it says nothing."""
    said = extract_answer(answer.text)
    number = number_of(said)
    return " ".join((said or answer.text).casefold().split()) if number is None else str(number)


def mean_rewards(answers: dict[str, list[GradedAnswer]]) -> Values:
    return {problem: float(np.mean([a.reward for a in found])) for problem, found in answers.items()}


def passes(answers: dict[str, list[GradedAnswer]], k: int) -> Values:
    """pass@k of the problems with at least k graded answers."""
    return {
        problem: pass_at_k(len(found), sum(is_correct(a) for a in found), k)
        for problem, found in answers.items()
        if len(found) >= k
    }


def majorities(answers: dict[str, list[GradedAnswer]], k: int) -> Values:
    """maj@k, likewise."""
    return {problem: _majority(found, k) for problem, found in answers.items() if len(found) >= k}


def _majority(answers: Answers, k: int) -> float:
    given, correct = Counter(map(vote_of, answers)), Counter(vote_of(a) for a in answers if is_correct(a))
    silent = given.pop("", 0)
    return majority_at_k([(count, correct[vote]) for vote, count in given.items()], silent, k)


def is_correct(answer: GradedAnswer) -> bool:
    return answer.reward is not None and answer.reward >= CORRECT_REWARD


def mean_of(values: Values) -> dict[str, Any] | None:
    """The mean over problems and its interval; None without any. Rewards may be outside 0 .. 1."""
    numbers = list(values.values())
    return asdict(estimate(numbers, min(0.0, *numbers), max(1.0, *numbers))) if numbers else None


def told(mean: dict[str, Any] | None) -> str:
    return f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]" if mean and "mean" in mean else "-"


def sizes(most: int) -> list[int]:
    """1, 2, 4 ... and the number of samples itself."""
    return sorted({*(2**i for i in range(most.bit_length())), most})


def figures(
    sheet: AnswerSheet, groups: dict[str, list[str]], spans: Sequence[Span], among: Collection[tuple[str, int]] | None
) -> dict[str, Any]:
    """All numbers of one sheet, JSON-ready; every estimate has mean, low, high, num_problems. `groups`: problems by
    difficulty; `spans`: of the lengths of answers. Only answers `among` (problem, sample) count, if given. Raises
    RewardError: none has a reward."""
    answers = sheet.graded(among)
    if not answers:
        first = next((a.error for found in sheet.answers.values() for a in found.values()), "there is no answer")
        raise RewardError(f"none of the answers of {sheet.name} has a reward; the first: {first}")
    everything = [a for problem in sheet.answers for a in sheet.of(problem, among)]
    rewards = mean_rewards(answers)
    most = max(map(len, answers.values()))
    lengths = [len(a.token_ids) for a in everything]
    by_dataset: dict[str, Values] = defaultdict(dict)
    for problem in sheet.problems:
        if problem.task.id in rewards:
            by_dataset[problem.dataset][problem.task.id] = rewards[problem.task.id]
    return {
        "model": sheet.name,
        "identity": sheet.identity,
        "num_problems": len(sheet.problems),
        "num_problems_graded": len(answers),
        "num_answers": len(everything),
        "num_reward_errors": sum(a.reward is None for a in everything),
        "num_versions": len({version for a in everything for version in a.versions}),
        "mean_reward": mean_of(rewards),
        "pass_at": {k: mean_of(passes(answers, k)) for k in sizes(most)},
        "majority_at": {k: mean_of(majorities(answers, k)) for k in sizes(most) if k > 1},
        "by_dataset": {name: mean_of(values) for name, values in by_dataset.items()} if len(by_dataset) > 1 else {},
        "by_difficulty": {name: mean_of(of(rewards, ids)) for name, ids in groups.items()},
        "by_length": by_length(answers, spans),
        "num_tokens_mean": float(np.mean(lengths)),
        "truncated_share": float(np.mean([a.finish_reason == "length" for a in everything])),
    }


def of(values: Values, problems: Sequence[str]) -> Values:
    return {problem: values[problem] for problem in problems if problem in values}


def by_length(answers: dict[str, list[GradedAnswer]], spans: Sequence[Span]) -> dict[str, Any]:
    """Mean reward of the answers within each span of lengths: of a problem's answers in it, then over problems."""
    parts = {}
    for name, low, high in spans:
        part = {p: [a for a in found if low <= len(a.token_ids) < high] for p, found in answers.items()}
        part = {problem: found for problem, found in part.items() if found}
        parts[f"{name} tokens"] = {**(mean_of(mean_rewards(part)) or {}), "num_answers": sum(map(len, part.values()))}
    return parts


def lengths_of(sheets: Sequence[AnswerSheet], among: Collection[tuple[str, int]] | None) -> list[int]:
    """Tokens of all graded answers."""
    return [len(a.token_ids) for sheet in sheets for found in sheet.graded(among).values() for a in found]


def quarters(values: Sequence[float]) -> list[Span]:
    """Ranges that hold about a quarter of the values each, fewer where many are equal."""
    if not values:
        return []
    edges = np.unique(np.quantile(values, [0, 0.25, 0.5, 0.75], method="nearest")).tolist()
    names = [f"{low:g} to below {high:g}" for low, high in pairwise(edges)] + [f"{edges[-1]:g} and more"]
    return list(zip(names, edges, [*edges[1:], inf], strict=True))


def difficulties(problems: Sequence[Problem], column: str | None, baseline: Values) -> dict[str, list[str]]:
    """Problems by the column of the data set that says how difficult they are, else by the pass rate of `baseline`;
    {} where there is neither. Raises ConfigError: no problem has the `column`."""
    columns = list(dict.fromkeys(name for problem in problems for name in problem.task.extras))
    if column and column not in columns:
        raise ConfigError(f"--difficulty is {column}, and the problems have {', '.join(columns) or 'no other column'}")
    names = [column] if column else [name for name in DIFFICULTY_COLUMNS if name in columns]
    groups: dict[str, list[str]] = {}
    if names:
        said = {p.task.id: p.task.extras[names[0]] for p in problems if p.task.extras.get(names[0]) is not None}
        if len(set(map(str, said.values()))) <= MAX_GROUPS:
            for problem, value in sorted(said.items(), key=lambda entry: str(entry[1])):
                groups.setdefault(f"{names[0]} {value}", []).append(problem)
        elif all(isinstance(value, int | float) for value in said.values()):
            for name, low, high in quarters(list(said.values())):
                groups[f"{names[0]} {name}"] = [problem for problem, value in said.items() if low <= value < high]
        return groups
    for low, high in zip((-1.0, *PASS_RATES[:-1]), PASS_RATES, strict=True):
        inside = [problem for problem, rate in baseline.items() if (low < rate <= high if high < 1 else low < rate)]
        if inside:
            groups["never solved" if high == 0 else f"solved up to {high:.0%}"] = inside
    return groups


@dataclass(frozen=True)
class Comparison:
    """Of the second model with the first, problem by problem: differences of means, second less first, and the p-value
    of no difference in mean reward, at `look` of `num_looks` planned looks (1 of 1 without sequential stopping)."""

    models: tuple[str, str]
    difference: Estimate
    p_value: float
    look: int
    num_looks: int
    num_answers: int  # taken for the verdict
    num_answers_planned: int
    by_difficulty: dict[str, Estimate]
    pass_at: dict[int, Estimate]
    majority_at: dict[int, Estimate]

    @property
    def verdict(self) -> str:
        if self.p_value > ALPHA / self.num_looks:
            return "not decided: the difference may be chance"
        return f"{self.models[self.difference.mean > 0]} is better"

    @property
    def words(self) -> str:
        """The verdict and what it stands on."""
        looked = f" at look {self.look} of {self.num_looks}" if self.num_looks > 1 else ""
        return (
            f"{self.verdict} (difference {signed(self.difference)}, paired by {self.difference.num_problems} problems,"
            f" p = {self.p_value:.4f}, error rate {ALPHA:.0%}{looked}, {self.num_answers} of"
            f" {self.num_answers_planned} answers)"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"alpha": ALPHA, "verdict": self.verdict, "words": self.words}


def signed(change: Estimate) -> str:
    return f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def paired(one: Values, other: Values) -> list[float]:
    """Differences, other less one, of the problems that both have."""
    return [other[problem] - one[problem] for problem in one if problem in other]


def compare(
    sheets: Sequence[AnswerSheet],
    groups: dict[str, list[str]],
    taken: Sequence[dict[str, list[GradedAnswer]]],
    looked: tuple[int, int],
    num_planned: int,
) -> Comparison:
    """`taken`: the graded answers of each sheet that the verdict is about; `looked`: at which look, of how many."""
    rewards = [mean_rewards(found) for found in taken]
    difference = paired(*rewards)
    if not difference:
        raise RewardError("no problem has a graded answer of both models: there is nothing to compare")

    def change(form: Callable[[dict[str, list[GradedAnswer]], int], Values]) -> dict[int, Estimate]:
        most = min(max(map(len, found.values())) for found in taken)
        differences = {k: paired(*(form(found, k) for found in taken)) for k in sizes(most)}
        return {k: estimate_difference(d) for k, d in differences.items() if d}

    by_difficulty = {name: paired(*(of(values, ids) for values in rewards)) for name, ids in groups.items()}
    return Comparison(
        models=(sheets[0].name, sheets[1].name),
        difference=estimate_difference(difference),
        p_value=p_value(difference),
        look=looked[0],
        num_looks=looked[1],
        num_answers=sum(len(answers) for found in taken for answers in found.values()),
        num_answers_planned=num_planned,
        by_difficulty={name: estimate_difference(d) for name, d in by_difficulty.items() if d},
        pass_at=change(passes),
        majority_at=change(majorities),
    )


def table(results: Sequence[dict[str, Any]], comparison: Comparison | None) -> Table:
    """One column per model, and one for what the second has more than the first."""
    out = Table("", title="Evaluation", title_justify="left", title_style="bold")
    for result in results:
        out.add_column(Text(str(result["model"])), justify="right", overflow="fold")
    if comparison:
        out.add_column("difference", justify="right")

    def row(name: str, cells: Sequence[dict[str, Any] | None], change: Estimate | None = None) -> None:
        out.add_row(Text(name), *map(told, cells), *([signed(change) if change else ""] if comparison else []))

    changes: dict[str, Any] = vars(comparison) if comparison else {}
    row("mean reward", [result["mean_reward"] for result in results], changes.get("difference"))
    for key, words in PARTS.items():
        names = list(dict.fromkeys(name for result in results for name in result[key]))
        if names and not words:
            out.add_section()
        for name in names:
            row(f"{words}{name}", [result[key].get(name) for result in results], changes.get(key, {}).get(name))
    out.add_section()
    for name, counts in (
        ("problems graded", [f"{r['num_problems_graded']} of {r['num_problems']}" for r in results]),
        ("answers", [str(r["num_answers"]) for r in results]),
        ("answers that could not be graded", [str(r["num_reward_errors"]) for r in results]),
        ("versions of the weights that answered", [str(r["num_versions"]) for r in results]),
        ("tokens of an answer; cut off", [f"{r['num_tokens_mean']:.0f}; {r['truncated_share']:.1%}" for r in results]),
    ):
        out.add_row(name, *counts, *([""] if comparison else []))
    return out
