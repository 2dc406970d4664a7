"""What came out of a run: summary.json, the reward plot, and the table for the person who started it.

Called at the end of a run (rank 0). Everything is read from the run folder, so a run that was killed and resumed gets
the same report as a straight one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from arealite.api.atomic import read_jsonl, write_json
from arealite.observe.progress import format_span, terminal_width, time_shares
from arealite.observe.reasons import by_kind
from arealite.observe.records import num_restarts, read_evaluations, read_metrics

if TYPE_CHECKING:
    from arealite.observe.run_folder import RunFolder

NUM_EXAMPLES = 3
NO_TERMINAL_WIDTH = 100  # a pipe or a file has none of its own
COUNTS = ("num_reward_errors", "num_failed", "num_untrained", "num_rejected", "num_interruptions")
MEANS = ("mismatch_mean", "staleness_mean", "train_tokens_per_s", "mfu")
MEASURES = {"loss": "loss", "ppl": "perplexity", "accuracy": "share of pairs ranked as preferred"}
REWARD_COLOR, HELD_OUT_COLOR = "#2a6fbb", "#d1495b"

Lines = list[dict[str, Any]]  # of metrics.jsonl, or results of evaluations


def report(folder: RunFolder, console: Console | None = None) -> dict[str, Any]:
    """Write summary.json, and of a run with rollouts the plot; print the table, examples, and where everything lies.
    Returns the summary. Raises OSError."""
    console = console or Console(highlight=False, width=terminal_width() or NO_TERMINAL_WIDTH)
    lines, evaluations = read_metrics(folder.metrics), read_evaluations(folder)
    no_plot = ""
    console.print()
    if any("num_sequence_tokens" in line for line in lines) or any("num_tasks" not in e for e in evaluations):
        summary, table = summarise_supervised(folder, lines, evaluations)
        console.print(table)
    else:
        summary = summarise(folder, lines, evaluations)
        no_plot = plot_reward(folder, lines, evaluations)
        console.print(_table(summary))
        if len(evaluations) > 1 and evaluations[0]["step"] == 0:
            _print_examples(console, folder, evaluations[-1]["step"])
    write_json(folder.summary_json, summary)
    if no_plot:
        console.print(Text(f"warning: {no_plot}", style="yellow"), soft_wrap=True)
    places = {
        "reward plot": folder.reward_png,
        "numbers of each step": folder.metrics,
        "what was trained on": folder.rollouts_dir,
        "held-out answers": folder.evaluation_dir,
        "TensorBoard events": folder.tensorboard_dir,
        "checkpoints": folder.checkpoints_dir,
        "logs": folder.logs_dir,
    }
    found = [f"{name:<22}{path}" for name, path in places.items() if path.exists()]
    for line in (*found, "summary, all the figures of the run:", str(folder.summary_json)):
        console.print(Text(line), soft_wrap=True)
    return summary


def summarise(folder: RunFolder, lines: Lines, evaluations: Lines) -> dict[str, Any]:
    """The numbers of a whole run with rollouts; None where the run folder says nothing.

    `train_s` is the wall time of the finished steps (`step_s`), without evaluations, saves and lost work.
    `accuracy_before` is the evaluation after 0 steps, `accuracy_after` the one after the most steps.
    """
    before = next((e for e in evaluations if e["step"] == 0), {})
    after = evaluations[-1] if evaluations and evaluations[-1]["step"] > 0 else {}
    common = _common(folder, lines, "num_completion_tokens")
    num_samples, train_s = _total(lines, "num_samples"), common["train_s"]
    times = {name for line in lines for name in line if name.endswith("_s") and not name.endswith("_per_s")}
    return common | {
        "accuracy_before": before.get("accuracy"),
        "accuracy_after": after.get("accuracy"),
        "accuracy_before_interval": [before.get("low"), before.get("high")],
        "accuracy_after_interval": [after.get("low"), after.get("high")],
        "pass_at_before": before.get("pass_at", {}),
        "pass_at_after": after.get("pass_at", {}),
        "num_held_out_tasks": evaluations[-1]["num_tasks"] if evaluations else 0,
        "num_held_out_tasks_scored": [e["num_tasks_scored"] for e in (before, after) if e],
        "samples_per_s": num_samples / train_s if train_s > 0 else None,
        "num_samples": int(num_samples),
        "num_tokens": int(_total(lines, "num_completion_tokens")),
        "reward_first": lines[0].get("reward_mean") if lines else None,
        "reward_last": lines[-1].get("reward_mean") if lines else None,
        **{name: _over(lines, name, fmean) for name in MEANS},
        **{name: _over(lines, name, max) for name in ("mismatch_max", "staleness_max")},
        **{name: int(_total(lines, name)) for name in COUNTS},
        "time_shares": {k: round(share, 4) for k, share in time_shares({n: _total(lines, n) for n in times}).items()},
        "why": _why(lines, (after or before).get("why")),
    }


def summarise_supervised(folder: RunFolder, lines: Lines, evaluations: Lines) -> tuple[dict[str, Any], Table]:
    """The numbers of a supervised run, and its table: what it measured first and last, while training and on held-out
    rows."""
    summary = _common(folder, lines, "num_sequence_tokens")
    table = Table("", title="The run", title_justify="left", title_style="bold")
    for heading in ("first", "last"):
        table.add_column(heading, justify="right")
    for source, measured, prefix in (("training", lines, ""), ("held-out", evaluations, "eval_")):
        for name, words in MEASURES.items():
            if values := [row[name] for row in measured if row.get(name) is not None]:
                summary |= {f"{prefix}{name}_first": values[0], f"{prefix}{name}_last": values[-1]}
                table.add_row(f"{source} {words}", _number(values[0], "{:.4f}"), _number(values[-1], "{:.4f}"))
    for name in ("steps", "num_steps_skipped", "num_restarts"):
        table.add_row(name.removeprefix("num_").replace("_", " "), "", str(summary[name]))
    table.add_row("training time", "", format_span(summary["train_s"]))
    table.add_row("tokens per second", "", _number(summary["tokens_per_s"], "{:.0f}"))
    return summary, table


def _common(folder: RunFolder, lines: Lines, tokens: str) -> dict[str, Any]:
    """What summaries of all runs have; `tokens` is the metric whose rate counts."""
    train_s = _total(lines, "step_s")
    return {
        "steps": lines[-1]["step"] + 1 if lines else 0,
        "train_s": train_s,
        "tokens_per_s": _total(lines, tokens) / train_s if train_s > 0 else None,
        "num_steps_skipped": int(_total(lines, "skipped")),
        "num_restarts": num_restarts(folder.metrics),
    }


def _total(lines: Lines, name: str) -> float:
    return float(sum(line.get(name) or 0 for line in lines))


def _over(lines: Lines, name: str, form: Callable[[list[float]], float]) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return form(values) if values else None


def _why(lines: Lines, unscored: dict[str, int] | None) -> dict[str, dict[str, int]]:
    """{event: {reason: how many}} over all steps; `unscored`: of the last evaluation's answers."""
    noted: dict[str, Counter[str]] = {}
    for line in lines:
        for event, reasons in line.get("why", {}).items():
            noted.setdefault(event, Counter()).update(reasons)
    if unscored:
        noted["held-out answers without a reward"] = Counter(unscored)
    return {event: by_kind(reasons.elements()) for event, reasons in noted.items()}


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else spec.format(value)


def _table(summary: dict[str, Any]) -> Table:
    table = Table("", title="The run", title_justify="left", title_style="bold")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold green")
    num_scored, num_tasks = list(dict.fromkeys(summary["num_held_out_tasks_scored"])), summary["num_held_out_tasks"]
    of_all = f" of {num_tasks}" if num_scored not in ([], [num_tasks]) else ""
    accuracy = [(summary[f"accuracy_{when}"], summary[f"accuracy_{when}_interval"]) for when in ("before", "after")]
    table.add_row(
        f"accuracy on {' and '.join(map(str, num_scored or [num_tasks]))}{of_all} held-out tasks",
        *("not measured" if mean is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, (low, high) in accuracy),
    )
    chances = [summary[f"pass_at_{when}"] for when in ("before", "after")]
    for k in sorted(set().union(*chances), key=int):
        table.add_row(f"pass@{k}", *(_number(chance.get(k), "{:.3f}") for chance in chances))
    rewards = [_number(summary[f"reward_{when}"], "{:.3f}") for when in ("first", "last")]
    table.add_row("training reward, first and last step", *rewards)
    table.add_section()
    number = lambda name, spec: _number(summary[name], spec)  # noqa: E731
    updates = f"{number('train_tokens_per_s', '{:.0f}')}, {number('mfu', '{:.0%}')}"
    rows = {
        "steps (skipped)": "{steps} ({num_steps_skipped})".format(**summary),
        "training time": format_span(summary["train_s"]),
        "where it went": ", ".join(f"{k} {100 * share:.0f}%" for k, share in summary["time_shares"].items()) or "-",
        "samples and tokens per second": f"{number('samples_per_s', '{:.1f}')} and {number('tokens_per_s', '{:.0f}')}",
        "trained tokens per second of updates, MFU": updates,
        "samples trained on": str(summary["num_samples"]),
        "staleness, mean and max": f"{number('staleness_mean', '{:.2f}')} and {number('staleness_max', '{:.0f}')}",
        "trainer / server logprobs, mean |difference|": number("mismatch_mean", "{:.2g}"),
        "reward errors, failed, restarts": "{num_reward_errors}, {num_failed}, {num_restarts}".format(**summary),
    }
    for event, reasons in summary["why"].items():
        rows |= {f"{event}: {_short(reason)}": str(n) for reason, n in list(reasons.items())[:NUM_EXAMPLES]}
    for name, value in rows.items():
        table.add_row(name, "", value)
    return table


def _print_examples(console: Console, folder: RunFolder, last_step: int) -> None:
    """The first held-out tasks, not the ones that look best: their first answers before and after."""
    earlier, later = (
        {row["question"]: row for row in reversed(read_jsonl(folder.evaluation(step)))} for step in (0, last_step)
    )
    shared = [question for question in reversed(later) if question in earlier]
    table = Table(title="Sample answers", title_justify="left", title_style="bold", show_lines=True)
    for heading in ("held-out task", "expected", "before", f"after {last_step} steps"):
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


def plot_reward(folder: RunFolder, lines: Lines, evaluations: Lines) -> str:
    """Draw training reward over steps with the held-out accuracy into folder.reward_png; returns "" or why there is no
    picture. Imports matplotlib, which is slow to load."""
    rewards = {line["step"]: line["reward_mean"] for line in lines if line.get("reward_mean") is not None}
    if not rewards and not evaluations:
        return "no reward plot: no finished step has a reward yet"
    try:
        import matplotlib
    except ImportError as error:
        return f"no reward plot: {error}; pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    if rewards:
        means = smooth(list(rewards.values()))
        axes.plot(*zip(*rewards.items(), strict=True), "o", color=REWARD_COLOR, alpha=0.35, markersize=3.5,
                  label="training reward, each step")  # fmt: skip
        axes.plot(list(rewards), means, color=REWARD_COLOR, linewidth=2, label="running mean")
    if evaluations:
        steps, accuracy, lows, highs = ([e[key] for e in evaluations] for key in ("step", "accuracy", "low", "high"))
        errors = [
            [a - b for a, b in zip(accuracy, lows, strict=True)],
            [b - a for a, b in zip(accuracy, highs, strict=True)],
        ]
        axes.errorbar(steps, accuracy, yerr=errors, color=HELD_OUT_COLOR, fmt="D--", markersize=6, linewidth=1.2,
                      capsize=3, label="held-out accuracy, 95% interval")  # fmt: skip
        for step, value in {steps[0]: accuracy[0], steps[-1]: accuracy[-1]}.items():
            axes.annotate(f"{value:.2f}", (step, value), xytext=(9, -15), textcoords="offset points", ha="left",
                          color=HELD_OUT_COLOR, fontweight="bold", annotation_clip=False)  # fmt: skip
    axes.set_title(f"{folder.root.parent.name} / {folder.root.name}", loc="left", fontweight="bold")
    axes.set(xlabel="steps done", ylabel="reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.04)
    low, high = axes.get_ylim()
    if low > -0.1 and high < 1.1:
        axes.set_ylim(-0.03, 1.05)
    axes.legend(frameon=False, loc="best")
    try:
        figure.savefig(folder.reward_png)
    except OSError as error:
        return f"no reward plot: cannot write {folder.reward_png}: {error.strerror}"
    finally:
        pyplot.close(figure)
    return ""


def smooth(values: list[float], weight: float = 0.6) -> list[float]:
    """Exponential running mean, corrected for its start (the first value is kept as it is)."""
    means, running, total = [], 0.0, 0.0
    for value in values:
        running = weight * running + (1 - weight) * value
        total = weight * total + (1 - weight)
        means.append(running / total)
    return means
