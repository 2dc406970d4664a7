"""What came out of a supervised run: summary.json, and the table for the person who started it.

Called by arealite/supervised.py at its end (rank 0). As summary.py, it reads everything from the run folder.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from arealite.observe.progress import format_span
from arealite.observe.rollout_log import write_json
from arealite.observe.sinks import num_restarts, read_metrics
from arealite.observe.summary import number, print_places, total

if TYPE_CHECKING:
    from arealite.observe.run_folder import RunFolder

MEASURES = {"loss": "loss", "ppl": "perplexity", "accuracy": "share of pairs ranked as preferred"}


def write_held_out(folder: RunFolder, step: int, result: dict[str, float]) -> None:
    """The held-out numbers after `step` optimiser steps. Raises OSError."""
    write_json(folder.evaluation(step).with_suffix(".json"), {"step": step, **result})


def report_supervised(folder: RunFolder, console: Console | None = None) -> dict[str, Any]:
    """Write summary.json, print the table and where everything lies; returns what the file holds. Raises OSError."""
    console = console or Console(highlight=False)
    lines = read_metrics(folder.metrics)
    held_out = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.evaluation_dir.glob("*.json"))]
    train_s = total(lines, "step_s")
    summary: dict[str, Any] = {
        "steps": lines[-1]["step"] + 1 if lines else 0,
        "train_s": train_s,
        "tokens_per_s": total(lines, "num_sequence_tokens") / train_s if train_s > 0 else None,
        "num_steps_skipped": int(total(lines, "skipped")),
        "num_restarts": num_restarts(folder.metrics),
    }
    table = Table(title="The run", title_justify="left", title_style="bold")
    for heading in ("", "first", "last"):
        table.add_column(heading, justify="right" if heading else "left")
    for source, rows, prefix in (("training", lines, ""), ("held-out", held_out, "eval_")):
        for name, words in MEASURES.items():
            found = [row[name] for row in rows if row.get(name) is not None]
            if found:
                summary |= {f"{prefix}{name}_first": found[0], f"{prefix}{name}_last": found[-1]}
                table.add_row(f"{source} {words}", number(found[0], "{:.4f}"), number(found[-1], "{:.4f}"))
    for name in ("steps", "num_steps_skipped", "num_restarts"):
        table.add_row(name.removeprefix("num_").replace("_", " "), "", str(summary[name]))
    table.add_row("training time", "", format_span(train_s))
    table.add_row("tokens per second", "", number(summary["tokens_per_s"], "{:.0f}"))
    write_json(folder.summary_json, summary)
    console.print(table)
    print_places(console, folder)
    return summary
