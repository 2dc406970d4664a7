"""The answer sheet of one model: the problems it was asked, how, and its graded answers, appended as they come.

Written by asking.py, read by figures.py and page.py. A folder with `identity.json` (what answers depend on),
`problems.jsonl` and `answers.jsonl`; a kill loses no answer that was graded, but perhaps the one being written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arealite.api.atomic import finite_json, read_jsonl, write_json, write_jsonl
from arealite.api.errors import ConfigError, DatasetError
from arealite.api.types import Task, as_record

COMPARED = ("tasks", "prompts", "sampling", "reward")  # what two sheets that are compared have in common
LOCK_LIMIT_S = 2.0


@dataclass(frozen=True)
class Problem:
    """A task as this model is asked it: `task.id` is unique among all data sets, and names its own."""

    task: Task
    dataset: str
    prompt_text: str
    prompt_ids: list[int]


@dataclass(frozen=True)
class GradedAnswer:
    """One answer: its problem's id, which of the problem's samples it is, its reward (None: grading failed, see
    `error`). `versions`: of the weights that wrote it, in order."""

    problem: str
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str
    reward: float | None
    reward_parts: dict[str, float] = field(default_factory=dict)
    error: str = ""
    versions: list[int] = field(default_factory=list)


def question_of(task: Task) -> str:
    """What the user asked: the raw prompt, or the content of the last message."""
    return task.prompt if task.prompt is not None else str((task.messages or [{"content": ""}])[-1]["content"])


def digest(value: Any) -> str:
    """Of anything that JSON can carry."""
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


class AnswerSheet:
    """The sheet in `folder`, which is made when `begin` is called. Raises ConfigError: what is there is no sheet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.answers: dict[str, dict[int, GradedAnswer]] = {}  # problem -> sample
        self._torn = b""  # what follows the last whole line: a kill came in the middle, or somebody is writing
        self._lock = FileLock(folder / "lock", timeout=LOCK_LIMIT_S)
        if self.exists(folder):
            self._read()

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / "identity.json").is_file()

    @property
    def name(self) -> str:
        return str(self.identity.get("model", self.folder.name))

    def _read(self) -> None:
        try:
            self.identity = json.loads((self.folder / "identity.json").read_text())
            rows = read_jsonl(self.folder / "problems.jsonl")
            self.problems = [Problem(**{**row, "task": Task(**row["task"])}) for row in rows]
            self.answers = {problem.task.id: {} for problem in self.problems}
            path = self.folder / "answers.jsonl"
            *lines, self._torn = path.read_bytes().split(b"\n") if path.is_file() else [b""]
            for line in lines:
                self._keep(GradedAnswer(**json.loads(line)))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{self.folder} holds no evaluation that can be read ({type(error).__name__}: {error}): mend or remove"
                " it, or give another --out"
            ) from error

    def begin(self, identity: dict[str, Any], problems: Sequence[Problem]) -> None:
        """Take up the sheet, or go on with it; until `end` no other process can. Raises ConfigError: it is another
        evaluation's, with the differences, or it is in use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"{self.folder} is in use by another `arealite eval`: wait for it, or give --out"
            ) from None
        if self.exists(self.folder):
            self._read()  # again: another process may have written meanwhile
        if self.identity and (different := differences(self.identity, identity)):
            raise ConfigError(
                f"{self.folder} has the answers of another evaluation: {'; '.join(different)}. Give another --out,"
                " remove that folder, or, where only the reward differs, have `arealite eval reverify` grade it again"
            )
        if not self.identity:
            self.problems = list(problems)
            rows = [asdict(problem) | {"task": as_record(problem.task)} for problem in problems]
            write_jsonl(self.folder / "problems.jsonl", rows)
            self.answers = {problem.task.id: {} for problem in problems}
            self.set_identity(identity)
        if self._torn:
            os.truncate(path := self.folder / "answers.jsonl", path.stat().st_size - len(self._torn))
            self._torn = b""

    def end(self) -> None:
        self._lock.release()

    def add(self, answer: GradedAnswer) -> None:
        """Keep it, here and on disk. Raises OSError."""
        line = json.dumps(finite_json(vars(answer)), ensure_ascii=True, allow_nan=False) + "\n"
        with open(self.folder / "answers.jsonl", "a", encoding="ascii") as out:
            out.write(line)  # in the system's hands before it counts
        self._keep(answer)

    def _keep(self, answer: GradedAnswer) -> None:
        self.answers[answer.problem][answer.sample] = answer

    def regrade(self, answers: Iterable[GradedAnswer]) -> None:
        """Put other grades in place of all; the earlier file stays, numbered. Raises OSError."""
        path = self.folder / "answers.jsonl"
        number = 1 + len(list(self.folder.glob("answers.*.jsonl")))
        answers = list(answers)
        os.link(path, self.folder / f"answers.{number}.jsonl")
        write_jsonl(path, map(vars, answers))
        for answer in answers:
            self._keep(answer)

    def set_identity(self, identity: dict[str, Any]) -> None:
        """Raises OSError."""
        self.identity = identity
        write_json(self.folder / "identity.json", identity)

    def of(self, problem: str, among: Collection[tuple[str, int]] | None = None) -> list[GradedAnswer]:
        """The answers to a problem in the order of its samples; only those `among` (problem, sample), if given."""
        found = sorted(self.answers[problem].items())
        return [answer for sample, answer in found if among is None or (problem, sample) in among]

    def graded(self, among: Collection[tuple[str, int]] | None = None) -> dict[str, list[GradedAnswer]]:
        """The answers that have a reward, by problem; problems without any are left out."""
        return by_problem(answer for problem in self.answers for answer in self.of(problem, among))

    @property
    def num_answers(self) -> int:
        return sum(map(len, self.answers.values()))


def by_problem(answers: Iterable[GradedAnswer]) -> dict[str, list[GradedAnswer]]:
    """The answers that have a reward, by problem."""
    found: dict[str, list[GradedAnswer]] = {}
    for answer in answers:
        if answer.reward is not None:
            found.setdefault(answer.problem, []).append(answer)
    return found


def check_comparable(one: AnswerSheet, other: AnswerSheet) -> None:
    """Raises ConfigError with every difference that forbids to compare two sheets."""
    keep = lambda sheet: {key: sheet.identity.get(key) for key in COMPARED}  # noqa: E731
    if different := differences(keep(one), keep(other)):
        raise ConfigError(
            f"{one.name} and {other.name} were not asked the same, so a difference between them would say nothing:"
            f" {'; '.join(different)}"
        )


WHAT = {"prompts": "the prompts as the models read them (chat template, system prompt)"}


def differences(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """In words, one for each key whose value differs."""
    told = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), f"{within}{WHAT.get(key, key)}"
        if isinstance(old, dict) and isinstance(new, dict):
            told += differences(old, new, f"{name}.")
        elif old != new:
            told.append(f"{name}: {old!r} and {new!r}")
    return told


def weights_of(folder: str) -> str:
    """A digest by which a model's folder is known again: configuration, and of each file of weights size, beginning and
    end. Raises DatasetError: the folder has none."""
    files = sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("*.bin"))
    if not files:
        raise DatasetError(f"{folder} holds no weights (*.safetensors): give a Hugging Face folder")
    found = blake2b((Path(folder) / "config.json").read_bytes(), digest_size=8)
    for file in files:
        with file.open("rb") as weights:
            size = file.stat().st_size
            found.update(f"{file.name} {size}".encode() + weights.read(1 << 20))
            weights.seek(max(0, size - (1 << 20)))
            found.update(weights.read())
    return found.hexdigest()
