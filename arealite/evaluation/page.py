"""One HTML file that shows an evaluation: numbers, plots, a browser of the graded answers. Called by eval_command.py.

It needs nothing else: page.html has styles and the script that draws, and its policy forbids to load anything. What is
shown travels as JSON in it, and becomes text nodes there: nothing that models or data sets wrote is ever markup.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from importlib.resources import files
from typing import Any

from arealite.api.atomic import finite_json
from arealite.evaluation.figures import Comparison, is_correct, mean_rewards, vote_of
from arealite.evaluation.sheet import AnswerSheet, GradedAnswer, question_of

MAX_SHOWN_CHARACTERS = 20_000_000  # of texts in the browser; all of them are in answers.jsonl
MAX_TITLE = 100

Among = Collection[tuple[str, int]] | None  # answers that count, as problem and sample; None: all


def page(
    sheets: Sequence[AnswerSheet], results: Sequence[dict[str, Any]], comparison: Comparison | None, among: Among
) -> str:
    """The whole document."""
    problems, note = browser_entries(sheets, among)
    rates = [sorted(mean_rewards(sheet.graded(among)).values(), reverse=True) for sheet in sheets]
    shown = {
        "results": results,
        "comparison": None if comparison is None else comparison.as_json(),
        "rates": rates,
        "problems": problems,
        "note": note,
    }
    # Only a tag or the start of a comment could end a script element, and JSON can write "<" another way.
    text = json.dumps(finite_json(shown), allow_nan=False).replace("<", "\\u003c")
    return files("arealite.evaluation").joinpath("page.html").read_text(encoding="utf-8").replace("{json}", text)


def browser_entries(sheets: Sequence[AnswerSheet], among: Among) -> tuple[list[dict[str, Any]], str]:
    """What the browser of answers shows, problem by problem, and a note on what it leaves out."""
    entries: list[dict[str, Any]] = []
    num_characters = 0
    for problem in sheets[0].problems:
        found = [sheet.of(problem.task.id, among) for sheet in sheets]
        answers = [entry(sheet.name, a) for sheet, own in zip(sheets, found, strict=True) for a in own]
        num_characters += len(problem.prompt_text) + sum(len(answer["text"]) for answer in answers)
        if num_characters > MAX_SHOWN_CHARACTERS:
            return entries, f"The first {len(entries)} of {len(sheets[0].problems)} problems; all are in answers.jsonl."
        rights = ", ".join(f"{sum(map(is_correct, own))} of {len(own)} right" for own in found)
        question = " ".join(question_of(problem.task).split())[:MAX_TITLE]
        entries.append(
            {
                "title": f"{problem.task.id} \u00b7 {rights} \u00b7 {question}",
                "prompt": problem.prompt_text,
                "expected": problem.task.answer,
                "answers": answers,
            }
        )
    return entries, "All answers."


def entry(model: str, answer: GradedAnswer) -> dict[str, Any]:
    kind = "error" if answer.reward is None else "right" if is_correct(answer) else "wrong"
    return {
        "model": model,
        "sample": answer.sample,
        "text": answer.text,
        "tokens": len(answer.token_ids),
        "finish": answer.finish_reason,
        "error": answer.error,
        "vote": vote_of(answer)[:MAX_TITLE],
        "kind": kind,
        "grade": "not graded" if answer.reward is None else f"reward {answer.reward:g}",
    }
