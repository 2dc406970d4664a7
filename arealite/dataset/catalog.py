"""Data sets that are known by name: where they lie, which column is what, and what verifies their answers.

Called by sources.py for every configured path, by scripts without a reward of their own, and by `arealite check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arealite.api.config_rules import REASONING_GYM
from arealite.api.errors import DatasetError

MATH, NUMBER = "arealite.reward.math:math_reward", "arealite.reward.math:gsm8k_reward"
CODE, PUZZLE = "arealite.reward.code:code_reward", "arealite.dataset.sources:reasoning_gym_reward"
CODE_COLUMNS = ("input_output", "public_test_cases", "entry_point", "test_list")  # as in reward/problems.py
PROBLEM = {"question": "problem", "answer": "answer"}
FENCED = "```python\n{}\n```".format


@dataclass(frozen=True)
class CatalogEntry:
    """`columns`: ours -> the data set's: a column, a place in one ("reward_model.ground_truth"), or a text with columns
    in braces. `verifier`: of answers, as `find_reward` names functions; "" for preferences. `files`: those that hold
    the rows, where the repository loads them by a script. `left_out`: columns that no task can carry.
    """

    about: str
    hub: str
    columns: Mapping[str, str]
    verifier: str
    splits: tuple[str, ...] = ("train", "test")
    subset: str | None = None
    files: str = ""
    left_out: tuple[str, ...] = field(default=())

    def split(self, wanted: str) -> str:
        """The split to read; a set with one split has no other for training. Raises DatasetError."""
        if wanted in self.splits:
            return wanted
        if wanted == "train" and len(self.splits) == 1:
            return self.splits[0]
        raise DatasetError(f"{self.hub} has no split {wanted!r}: set split to one of {', '.join(self.splits)}")


CATALOG = {
    "gsm8k": CatalogEntry(
        "grade school word problems", "openai/gsm8k", {"question": "question", "answer": "answer"}, NUMBER,
        subset="main",
    ),
    "math": CatalogEntry(
        "competition mathematics, 5 levels", "DigitalLearningGmbH/MATH-lighteval",
        {"question": "problem", "solution": "solution"}, MATH,
    ),
    "math500": CatalogEntry("500 problems of MATH", "HuggingFaceH4/MATH-500", PROBLEM, MATH, ("test",)),
    "deepscaler": CatalogEntry(
        "40,000 competition problems", "agentica-org/DeepScaleR-Preview-Dataset", PROBLEM, MATH, ("train",)
    ),
    "dapo-math": CatalogEntry(
        "17,000 problems with whole numbers as answers, each once", "open-r1/DAPO-Math-17k-Processed",
        {"question": "prompt", "answer": "solution"}, MATH, ("train",), subset="all",
    ),
    "dapo-math-raw": CatalogEntry(
        "the same with DAPO's own prompts, each 100 times", "BytedTsinghua-SIA/DAPO-Math-17k",
        {"question": "prompt", "answer": "reward_model.ground_truth"}, MATH, ("train",),
    ),
    "aime24": CatalogEntry("AIME 2024, 30 problems", "HuggingFaceH4/aime_2024", PROBLEM, MATH, ("train",)),
    "aime25": CatalogEntry("AIME 2025, 30 problems", "math-ai/aime25", PROBLEM, MATH, ("test",)),
    "amc": CatalogEntry("AMC 12 of 2022 and 2023, 83 problems", "AI-MO/aimo-validation-amc", PROBLEM, MATH, ("train",)),
    "livecodebench": CatalogEntry(
        "programs against hidden tests", "livecodebench/code_generation_lite",
        {"question": "{question_content}\n\nAnswer with a Python program in a code block.\n{starter_code}"},
        CODE, ("test",), files="test*.jsonl",
    ),
    "humaneval": CatalogEntry(
        "164 functions to complete", "openai/openai_humaneval",
        {
            "question": f"Complete this function; answer with all of it in a code block.\n{FENCED('{prompt}')}",
            "answer": FENCED("{prompt}{canonical_solution}"),
            "code_prompt": "prompt",
        },
        CODE, ("test",),
    ),
    "mbpp": CatalogEntry(
        "974 small functions", "google-research-datasets/mbpp",
        {
            "question": f"{{text}} Answer with a code block. It passes this test:\n{FENCED('{test_list[0]}')}",
            "answer": FENCED("{code}"),
        },
        CODE, ("train", "test", "validation", "prompt"), subset="full",
    ),
    "clevr-count": CatalogEntry(
        "how many objects an image shows; text columns only", "BUAADreamer/clevr_count_70k", PROBLEM, NUMBER,
        left_out=("images", "image"),
    ),
    "hh-rlhf": CatalogEntry(
        "preferred and rejected dialogues", "Anthropic/hh-rlhf", {"chosen": "chosen", "rejected": "rejected"}, ""
    ),
}  # fmt: skip


def entry_of(path: str) -> CatalogEntry | None:
    """What is known of a data set by its name, its hub id, or a folder of either name that holds a copy."""
    is_folder, last = Path(path).is_dir(), Path(path).name.lower()
    for name, entry in CATALOG.items():
        if path.lower() in (name, entry.hub.lower()) or (is_folder and last in (name, Path(entry.hub).name.lower())):
            return entry
    return None


def hub_id(path: str) -> str:
    entry = entry_of(path)
    return path if entry is None else entry.hub


def mapped(values: Mapping[str, Any], columns: Mapping[str, str], left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """A row under our names: what `columns` says, and beside it the columns that are not used up. Raises LookupError,
    with what is missing."""
    named = {}
    for name, place in columns.items():
        try:
            named[name] = _cell(values, place)
        except (LookupError, TypeError, AttributeError) as error:
            raise LookupError(f"no {place!r} ({error}): found the columns {', '.join(map(str, values))}") from None
    gone = {*columns.values(), *named, *left_out, *(["messages"] if "question" in named else [])}
    return named | {key: value for key, value in values.items() if key not in gone}


def _cell(values: Mapping[str, Any], place: str) -> Any:
    if place in values:
        return values[place]
    if "{" in place:
        return place.format_map(values)
    value: Any = values
    for part in place.split("."):
        value = value[part]
    return value


def verifier_of(path: str, values: Mapping[str, Any]) -> str:
    """The name of the function that grades answers to a row: what its column `verifier` says, else that of its data
    set, else what its columns tell (tests of programs; AReaL's `task`: math or code); "" where nothing does."""
    entry = entry_of(path)
    if isinstance(own := values.get("verifier"), str) and own:
        return own
    if path.startswith(REASONING_GYM):
        return PUZZLE
    if entry is not None:
        return entry.verifier
    return CODE if any(values.get(name) for name in CODE_COLUMNS) else MATH if values.get("task") == "math" else ""


def described(path: str, columns: Mapping[str, str]) -> str:
    """One line for `arealite check`."""
    entry = entry_of(path)
    columns = columns or (entry.columns if entry else {})
    places = ", ".join(f"{name} = {' '.join(place.split())}" for name, place in columns.items())
    verifier = verifier_of(path, {})
    return "; ".join(
        part
        for part in (
            f"{path} is {entry.hub}: {entry.about}" if entry else path,
            f"columns: {places}" if places else "",
            f"verifier {verifier}" if verifier else "",
        )
        if part
    )
