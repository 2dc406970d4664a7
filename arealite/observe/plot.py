"""The picture of a run: training reward over steps with the held-out accuracy, as PNG. Called by summary.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arealite.observe.evaluation_log import EvaluationResult, read_evaluations
from arealite.observe.sinks import read_metrics

if TYPE_CHECKING:
    from arealite.observe.run_folder import RunFolder

REWARD_COLOR = "#2a6fbb"
HELD_OUT_COLOR = "#d1495b"


def smooth(values: list[float], weight: float = 0.6) -> list[float]:
    """Exponential running mean, corrected for its start (the first value is kept as it is)."""
    out, running, total = [], 0.0, 0.0
    for value in values:
        running = weight * running + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(running / total)
    return out


def plot_reward(folder: RunFolder) -> str:
    """Write folder.reward_png; returns "" or why there is no picture. Imports matplotlib, which is slow to load."""
    lines = [line for line in read_metrics(folder.metrics) if line.get("reward_mean") is not None]
    evaluations = read_evaluations(folder)
    if not lines and not evaluations:
        return "no reward plot: no finished step has a reward yet"
    try:
        import matplotlib
    except ImportError as error:
        return f"no reward plot: {error}; pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    _draw_rewards(axes, lines)
    _draw_evaluations(axes, evaluations)
    axes.set_title(f"{folder.root.parent.name} / {folder.root.name}", loc="left", fontweight="bold")
    axes.set_xlabel("steps done")
    axes.set_ylabel("reward")
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


def _draw_rewards(axes: Any, lines: list[dict[str, Any]]) -> None:
    if not lines:
        return
    steps = [line["step"] for line in lines]
    rewards = np.asarray([line["reward_mean"] for line in lines])
    axes.plot(steps, rewards, "o", color=REWARD_COLOR, alpha=0.35, markersize=3.5, label="training reward, each step")
    axes.plot(steps, smooth(rewards.tolist()), color=REWARD_COLOR, linewidth=2, label="running mean")


def _draw_evaluations(axes: Any, evaluations: list[EvaluationResult]) -> None:
    if not evaluations:
        return
    steps = [e.step for e in evaluations]
    accuracy = [e.accuracy for e in evaluations]
    errors = [e.stderr for e in evaluations]
    axes.errorbar(
        steps, accuracy, yerr=errors, color=HELD_OUT_COLOR, fmt="D--", markersize=6, linewidth=1.2, capsize=3,
        label="held-out accuracy ± standard error",
    )  # fmt: skip
    for step, value in {steps[0]: accuracy[0], steps[-1]: accuracy[-1]}.items():
        axes.annotate(
            f"{value:.2f}", (step, value), xytext=(9, -15), textcoords="offset points", ha="left",
            color=HELD_OUT_COLOR, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
