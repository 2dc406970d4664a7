"""One script and YAML trained with several seeds, and the curves of it as a picture.

python benchmarks/learning_curves.py examples/arealite/own_verifier.py examples/arealite/needle.yaml \
    [--seeds 1,2,3] [--picture docs/curves/needle.png] [--columns NAME,NAME] [KEY=VALUE ...]

The runs go one after the other, each in a folder of its own under --out; a run that has ended there is not repeated.
Ends with one JSON line: of each seed the seconds in all, the mean reward of the first and last five steps, the held-out
accuracy with its interval by step; and of `columns` of metrics.jsonl the means over the first and last five steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from surroundings import surroundings

ENDS = 5  # steps


def run(args: argparse.Namespace, seed: int) -> Path:
    """The folder of the finished run."""
    name = f"seed{seed}"
    place = Path(args.out, Path(args.config).stem)
    done = place / f"{name}.seconds"
    if not done.is_file():
        began = time.monotonic()
        command = [sys.executable, "-m", "arealite.cli", "run", args.script, "--config", args.config]
        names = [f"cluster.fileroot={place}", "experiment_name=curves", f"trial_name={name}", f"seed={seed}"]
        subprocess.run([*command, *names, *args.overrides], check=True)
        done.write_text(str(time.monotonic() - began))
    return place / "curves" / name


def read(folder: Path, columns: list[str]) -> dict[str, object]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, object] = {"steps": len(rows)}
    for name in ("reward_mean", *columns):
        values = [row[name] for row in rows if name in row]
        if len(values) < len(rows) / 2:
            sys.exit(f"{folder}/metrics.jsonl has no column {name} in most steps; it has {', '.join(sorted(rows[-1]))}")
        found[name] = values
    held_out = [json.loads(path.read_text()) for path in sorted((folder / "evaluation").glob("step_*.json"))]
    found["held_out"] = [[e["step"], e["accuracy"], e["low"], e["high"]] for e in held_out]
    return found


def draw(path: Path, title: str, runs: dict[int, dict], columns: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["reward_mean", *columns]
    figure, axes = pyplot.subplots(1, len(names), figsize=(6 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for number, (seed, found) in enumerate(runs.items()):
            smooth = [
                sum(found[name][max(0, i - 4) : i + 1]) / len(found[name][max(0, i - 4) : i + 1])
                for i in range(len(found[name]))
            ]
            axis.plot(
                range(1, len(smooth) + 1), smooth, color=f"C{number}", linewidth=1, alpha=0.7, label=f"seed {seed}"
            )
            if name == "reward_mean" and found["held_out"]:
                steps, accuracy, low, high = zip(*found["held_out"], strict=True)
                bars = [
                    [a - b for a, b in zip(accuracy, low, strict=True)],
                    [b - a for a, b in zip(accuracy, high, strict=True)],
                ]
                axis.errorbar(steps, accuracy, bars, fmt="o", color=f"C{number}", markersize=4, capsize=2)
        axis.set_xlabel("step")
        axis.set_ylabel("reward (line), held-out accuracy (points)" if name == "reward_mean" else name)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    axes[0][0].set_ylim(-0.02, 1.02)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("script")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every run")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--columns", type=lambda text: text.split(","), default=[])
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", default=os.path.join(tempfile.gettempdir(), "learning_curves"))
    args = parser.parse_intermixed_args()
    runs, seconds = {}, {}
    for seed in args.seeds:
        folder = run(args, seed)
        runs[seed] = read(folder, args.columns)
        seconds[seed] = float((folder.parent.parent / f"seed{seed}.seconds").read_text())
    if args.picture is not None:
        draw(args.picture, Path(args.config).stem, runs, args.columns)

    def ends(values: list[float]) -> list[float]:
        return [round(sum(part) / len(part), 3) for part in (values[:ENDS], values[-ENDS:])]

    result = {
        seed: {
            "seconds": round(seconds[seed]),
            "steps": found["steps"],
            "held_out": [[step, *(round(x, 3) for x in numbers)] for step, *numbers in found["held_out"]],
            **{name: ends(found[name]) for name in ("reward_mean", *args.columns)},
        }
        for seed, found in runs.items()
    }
    print(json.dumps({"benchmark": "learning_curves", "config": args.config, **surroundings(), "seeds": result}))


if __name__ == "__main__":
    main()
