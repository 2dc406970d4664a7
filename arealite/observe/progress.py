"""One line per step for the person who watches: reward, speed, staleness, where the time goes, what is left.

Called by stats_logger.py. Styled on a terminal, plain text elsewhere.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

MAX_REASON = 60  # characters of the most frequent reason

# Of a step's line: metric, label, format, style. What two blanks part may be broken over lines.
FIELDS = (
    ("reward_mean", "  reward", "{:.3f}", "bold green"),
    ("workflow_num_turns", "  turns", "{:.1f}", ""),
    ("workflow_num_tool_calls", "  tool calls", "{:.1f}", ""),
    ("tokens_per_s", "  tokens/s", "{:.0f}", ""),
    ("train_tokens_per_s", "  trained tokens/s", "{:.0f}", ""),
    ("mfu", "  mfu", "{:.0%}", ""),
    ("staleness_mean", "  stale", "{:.1f}", ""),
    ("staleness_max", " max", "{:.0f}", ""),
)
SUPERVISED = (
    ("loss", "  loss", "{:.4f}", "bold green"),
    ("accuracy", "  accuracy", "{:.3f}", ""),
    ("eval_loss", "  held-out loss", "{:.4f}", ""),
)
ALARMS = {
    "skipped": "STEP SKIPPED",
    "num_reward_errors": "reward errors",
    "num_failed": "failed",
    "num_untrained": "not trained",
}


def terminal_width() -> int | None:
    """Columns of the terminal that will show the output: COLUMNS, which the launcher sets for its trainers, or those of
    stdout; None where there is no terminal."""
    return shutil.get_terminal_size((0, 0)).columns or None


def show(text: Text, console: Console | None = None) -> None:
    """Print in as many lines as the terminal needs, broken between fields, which two blanks part, or between words; in
    one where there is no terminal: a broken line cannot be searched in a log."""
    console, width = console or Console(highlight=False), terminal_width()
    lines = [Text()]
    for field in text.split("  "):
        both = Text("  ").join([lines[-1], field]) if lines[-1] else field
        if width is None or both.cell_len <= width:
            lines[-1] = both
        else:
            lines += [Text("  ").append(part) for part in field.wrap(console, width - 2)]
    if not lines[0]:  # the first field is longer than a line
        lines = [lines[1][2:], *lines[2:]]
    console.print(Text("\n").join(lines), soft_wrap=True)


def time_shares(stats: dict[str, float]) -> dict[str, float]:
    """Shares of the step's wall time (`step_s`), by phase; empty when the wait for rollouts was not timed.

    The wait for rollouts (`rollout_wait_s`) is split between "generate" and "reward" in the ratio in which the
    finished groups spent their time (`generate_s`, `reward_s`): both go on in other processes while the trainer waits.
    "train" is `train_s`, "sync" is `sync_s`, "other" the rest.
    """
    step_s = stats.get("step_s", 0.0)
    if not (step_s > 0 and "rollout_wait_s" in stats):
        return {}
    generate_s, reward_s = stats.get("generate_s", 0.0), stats.get("reward_s", 0.0)
    rewarding = reward_s / (generate_s + reward_s) if generate_s + reward_s > 0 else 0.0
    wait = stats["rollout_wait_s"] / step_s
    shares = {
        "generate": wait * (1 - rewarding),
        "reward": wait * rewarding,
        "train": stats.get("train_s", 0.0) / step_s,
        "sync": stats.get("sync_s", 0.0) / step_s,
    }
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    return shares


def format_span(seconds: float) -> str:
    """3:07 or 1:02:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Prints the line of each step; the time left comes from the last ten steps, pauses between them included."""

    def __init__(
        self, total_steps: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps = total_steps
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._ends: deque[float] = deque([clock()], maxlen=11)

    def step(self, step: int, stats: dict[str, float], why: dict[str, dict[str, int]] | None = None) -> None:
        """Print the line of step `step` (0 .. total_steps - 1); `why`: how often which reason, by the count's label."""
        self._ends.append(self._clock())
        show(self.line(step, stats, why or {}), self._console)

    def begin(self, step: int) -> None:
        """Say that step `step` comes next."""
        if step < self._total_steps:
            show(Text(f"data and model are loaded  step {step + 1} of {self._total_steps} begins"), self._console)

    def note(self, text: str) -> None:
        """Print a warning."""
        show(Text(f"warning: {text}", style="yellow"), self._console)

    def line(self, step: int, stats: dict[str, float], why: dict[str, dict[str, int]]) -> Text:
        """The line of the step, styled."""
        width = len(str(self._total_steps))
        text = Text.assemble(("step ", "dim"), (f"{step + 1:>{width}}/{self._total_steps}", "bold"))
        fields = FIELDS if "reward_mean" in stats else SUPERVISED + FIELDS
        for key, label, spec, style in fields:
            _put(text, label, stats.get(key), spec, style)
        shares = time_shares(stats)
        _put(text, "  step", stats["step_s"] if shares else None, "{:.1f}s")
        for phase, share in shares.items():
            if phase != "other" or share >= 0.05:
                _put(text, f"{': ' if phase == 'generate' else ' '}{phase}", 100 * share, "{:.0f}%", "cyan")
        left = self._total_steps - step - 1
        if left > 0 and len(self._ends) > 1:
            per_step_s = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            text.append("  left ", "dim").append(format_span(per_step_s * left))
        for name, label in ALARMS.items():
            if stats.get(name, 0) > 0:
                text.append(f"  {label} {stats[name]:.0f}", "bold red")
                for reason, number in list(why.get(label, {}).items())[:1]:
                    text.append(f" ({number} x {reason[:MAX_REASON]})", "red")
        return text


def _put(text: Text, label: str, value: float | None, spec: str, style: str = "") -> None:
    if value is not None:
        shown = (spec.format(value), style) if math.isfinite(value) else (str(value), "bold red")
        text.append(f"{label} ", "dim").append(*shown)
