"""What came out of a run: summary.json, the reward plot, and the table for the person who started it.

Called by the training script at its end (rank 0). Everything is read from the run folder, so a run that was killed and
resumed gets the same report as a straight one.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from arealite.api.atomic import write_json
from arealite.observe.evaluation_log import EvaluationResult, read_answers, read_evaluations
from arealite.observe.plot import plot_reward
from arealite.observe.progress import format_span, terminal_width, time_shares
from arealite.observe.reasons import by_kind
from arealite.observe.sinks import num_restarts, read_metrics

if TYPE_CHECKING:
    from arealite.observe.run_folder import RunFolder

NUM_EXAMPLES = 3
NO_TERMINAL_WIDTH = 100  # a pipe or a file has none of its own
COUNTS = ("num_reward_errors", "num_failed", "num_untrained", "num_rejected", "num_interruptions")
MEANS = ("mismatch_mean", "staleness_mean", "train_tokens_per_s", "mfu")
MEASURES = {"loss": "loss", "ppl": "perplexity", "accuracy": "share of pairs ranked as preferred"}


def summarise(folder: RunFolder) -> dict[str, Any]:
    """The numbers of the whole run; None where the run folder says nothing.

    `train_s` is the wall time of the finished steps (`step_s`), without evaluations, saves and lost work.
    `accuracy_before` is the evaluation after 0 steps, `accuracy_after` the one after the most steps.
    """
    lines = read_metrics(folder.metrics)
    evaluations = read_evaluations(folder)
    before = next((e for e in evaluations if e.step == 0), None)
    after = evaluations[-1] if evaluations and evaluations[-1].step > 0 else None
    common = _common(folder, lines, "num_completion_tokens")
    num_samples, train_s = _total(lines, "num_samples"), common["train_s"]
    return common | {
        "accuracy_before": before and before.accuracy,
        "accuracy_after": after and after.accuracy,
        "accuracy_before_stderr": before and before.stderr,
        "accuracy_after_stderr": after and after.stderr,
        "pass_at_before": before.pass_at if before else {},
        "pass_at_after": after.pass_at if after else {},
        "num_held_out_tasks": evaluations[-1].num_tasks if evaluations else 0,
        "num_held_out_tasks_scored": [e.num_tasks_scored for e in (before, after) if e],
        "samples_per_s": num_samples / train_s if train_s > 0 else None,
        "num_samples": int(num_samples),
        "num_tokens": int(_total(lines, "num_completion_tokens")),
        "reward_first": lines[0].get("reward_mean") if lines else None,
        "reward_last": lines[-1].get("reward_mean") if lines else None,
        **{name: _over(lines, name, fmean) for name in MEANS},
        **{name: _over(lines, name, max) for name in ("mismatch_max", "staleness_max")},
        **{name: int(_total(lines, name)) for name in COUNTS},
        "time_shares": _time_shares(lines),
        "why": _why(lines, after or before),
    }


def report(folder: RunFolder, console: Console | None = None) -> dict[str, Any]:
    """Write summary.json and the plot, print the table, the examples and where everything lies. Raises OSError."""
    console = console or _console()
    summary = summarise(folder)
    write_json(folder.summary_json, summary)
    no_plot = plot_reward(folder)
    evaluations = read_evaluations(folder)
    console.print()
    console.print(_table(summary))
    if len(evaluations) > 1 and evaluations[0].step == 0:
        _print_examples(console, folder, evaluations[0], evaluations[-1])
    if no_plot:
        console.print(Text(f"warning: {no_plot}", style="yellow"), soft_wrap=True)
    _print_places(console, folder)
    return summary


def report_supervised(folder: RunFolder, console: Console | None = None) -> dict[str, Any]:
    """As `report`, of a supervised run: what it measured first and last, while training and on held-out rows."""
    console = console or _console()
    lines = read_metrics(folder.metrics)
    held_out = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.evaluation_dir.glob("*.json"))]
    summary = _common(folder, lines, "num_sequence_tokens")
    table = Table("", title="The run", title_justify="left", title_style="bold")
    for heading in ("first", "last"):
        table.add_column(heading, justify="right")
    for source, rows, prefix in (("training", lines, ""), ("held-out", held_out, "eval_")):
        for name, words in MEASURES.items():
            found = [row[name] for row in rows if row.get(name) is not None]
            if found:
                summary |= {f"{prefix}{name}_first": found[0], f"{prefix}{name}_last": found[-1]}
                table.add_row(f"{source} {words}", _number(found[0], "{:.4f}"), _number(found[-1], "{:.4f}"))
    for name in ("steps", "num_steps_skipped", "num_restarts"):
        table.add_row(name.removeprefix("num_").replace("_", " "), "", str(summary[name]))
    table.add_row("training time", "", format_span(summary["train_s"]))
    table.add_row("tokens per second", "", _number(summary["tokens_per_s"], "{:.0f}"))
    write_json(folder.summary_json, summary)
    console.print(table)
    _print_places(console, folder)
    return summary


def _console() -> Console:
    return Console(highlight=False, width=terminal_width() or NO_TERMINAL_WIDTH)


def _common(folder: RunFolder, lines: list[dict[str, Any]], tokens: str) -> dict[str, Any]:
    """What summaries of all runs have; `tokens` is the metric whose rate counts."""
    train_s = _total(lines, "step_s")
    return {
        "steps": lines[-1]["step"] + 1 if lines else 0,
        "train_s": train_s,
        "tokens_per_s": _total(lines, tokens) / train_s if train_s > 0 else None,
        "num_steps_skipped": int(_total(lines, "skipped")),
        "num_restarts": num_restarts(folder.metrics),
    }


def _total(lines: list[dict[str, Any]], name: str) -> float:
    return float(sum(line.get(name) or 0 for line in lines))


def _over(lines: list[dict[str, Any]], name: str, form: Callable[[list[float]], float]) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return form(values) if values else None


def _time_shares(lines: list[dict[str, Any]]) -> dict[str, float]:
    names = {name for line in lines for name in line if name.endswith("_s") and not name.endswith("_per_s")}
    return {phase: round(share, 4) for phase, share in time_shares({n: _total(lines, n) for n in names}).items()}


def _why(lines: list[dict[str, Any]], latest: EvaluationResult | None) -> dict[str, dict[str, int]]:
    """{event: {reason: how many}} over all steps; of held-out answers without a reward, after the last evaluation."""
    noted: dict[str, Counter[str]] = {}
    for line in lines:
        for event, found in line.get("why", {}).items():
            noted.setdefault(event, Counter()).update(found)
    if latest is not None and latest.why:
        noted["held-out answers without a reward"] = Counter(latest.why)
    return {event: by_kind(found.elements()) for event, found in noted.items()}


def _accuracy(value: float | None, stderr: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f} ± {stderr or 0:.3f}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else spec.format(value)


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title="The run", title_justify="left", title_style="bold", show_header=True)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold green")
    num_scored, num_tasks = list(dict.fromkeys(summary["num_held_out_tasks_scored"])), summary["num_held_out_tasks"]
    of_all = f" of {num_tasks}" if num_scored not in ([], [num_tasks]) else ""
    table.add_row(
        f"accuracy on {' and '.join(map(str, num_scored or [num_tasks]))}{of_all} held-out tasks",
        _accuracy(summary["accuracy_before"], summary["accuracy_before_stderr"]),
        _accuracy(summary["accuracy_after"], summary["accuracy_after_stderr"]),
    )
    chances = [summary[f"pass_at_{when}"] for when in ("before", "after")]
    for k in sorted(set().union(*chances)):
        table.add_row(f"pass@{k}", *(_number(chance.get(k), "{:.3f}") for chance in chances))
    first, last = _number(summary["reward_first"], "{:.3f}"), _number(summary["reward_last"], "{:.3f}")
    table.add_row("training reward, first and last step", first, last)
    table.add_section()
    shares = ", ".join(f"{phase} {100 * share:.0f}%" for phase, share in summary["time_shares"].items())
    per_s = f"{_number(summary['samples_per_s'], '{:.1f}')} and {_number(summary['tokens_per_s'], '{:.0f}')}"
    mean, most = _number(summary["staleness_mean"], "{:.2f}"), _number(summary["staleness_max"], "{:.0f}")
    trained_per_s, mfu = _number(summary["train_tokens_per_s"], "{:.0f}"), _number(summary["mfu"], "{:.0%}")
    for name, value in (
        ("steps (skipped)", f"{summary['steps']} ({summary['num_steps_skipped']})"),
        ("training time", format_span(summary["train_s"])),
        ("where it went", shares or "-"),
        ("samples and tokens per second", per_s),
        ("trained tokens per second of updates, MFU", f"{trained_per_s}, {mfu}"),
        ("samples trained on", str(summary["num_samples"])),
        ("staleness, mean and max", f"{mean} and {most}"),
        ("trainer / server logprobs, mean |difference|", _number(summary["mismatch_mean"], "{:.2g}")),
        ("reward errors, failed, restarts", "{num_reward_errors}, {num_failed}, {num_restarts}".format(**summary)),
    ):
        table.add_row(name, "", value)
    for event, found in summary["why"].items():
        for reason, number in list(found.items())[:NUM_EXAMPLES]:
            table.add_row(f"{event}: {_short(reason)}", "", str(number))
    return table


def _print_examples(console: Console, folder: RunFolder, before: EvaluationResult, after: EvaluationResult) -> None:
    """The first held-out tasks, not the ones that look best: their first answers before and after."""
    earlier = {row["question"]: row for row in reversed(read_answers(folder, before.step))}
    later = {row["question"]: row for row in reversed(read_answers(folder, after.step))}
    shared = [question for question in reversed(later) if question in earlier]
    table = Table(title="Sample answers", title_justify="left", title_style="bold", show_lines=True)
    for heading in ("held-out task", "expected", "before", f"after {after.step} steps"):
        table.add_column(heading, overflow="fold")
    for question in shared[:NUM_EXAMPLES]:
        old, new = earlier[question], later[question]
        table.add_row(Text(_short(question)), Text(_short(old["answer"])), _answer(old), _answer(new))
    if shared:
        console.print(table)


def _answer(row: dict[str, Any]) -> Text:
    if row["reward"] is None:
        return Text(_short(row["error"] or row["status"]), style="yellow")
    return Text(f"{_short(row['completion'])}\n").append(f"reward {row['reward']:g}", "dim")


def _short(text: str, max_characters: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


def _print_places(console: Console, folder: RunFolder) -> None:
    places = {
        "reward plot": folder.reward_png,
        "numbers of each step": folder.metrics,
        "what was trained on": folder.rollouts_dir,
        "held-out answers": folder.evaluation_dir,
        "TensorBoard events": folder.tensorboard_dir,
        "checkpoints": folder.checkpoints_dir,
        "logs": folder.logs_dir,
    }
    for name, path in places.items():
        if path.exists():
            console.print(Text(f"{name:<22}{path}"), soft_wrap=True)
    console.print("summary, all the figures of the run:")
    console.print(Text(str(folder.summary_json)), soft_wrap=True)
