"""Speed of this checkout against another one (the commit before, say), in turns on one machine.

    git worktree add ../before COMMIT
    python benchmarks/two_checkouts.py ../before [--parts decode,train,serving,update,quickstart] [--rounds 3]

Each checkout runs its own benchmarks on its own package, one after the other, and the order changes every round.
Medians of: a decode step of 8 and 64 rows, a training step (rollout excluded), tokens per second at 64 requests at a
time, the pause of a weight update by each link, seconds of the quickstart's first steps. A ratio above 1 says that this
checkout is the slower one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_vs_trl import ROOT
from serving import servers
from train_step import trainer_env

from arealite.models.fetch import resolve_model

RUN_LIMIT_S = 1800.0
QUICKSTART_STEPS = 4
Figures = dict[str, float]  # name -> seconds


def run(checkout: Path, words: list[str], env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The JSON lines that `words` prints when they run on the package of `checkout`."""
    path = f"{checkout}:{checkout / 'benchmarks'}"
    command, env = [sys.executable, "-P", *words], {**(env or os.environ), "PYTHONPATH": path}
    ran = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True, timeout=RUN_LIMIT_S)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {checkout}:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def decode(checkout: Path, model: str) -> Figures:
    [line] = run(checkout, ["benchmarks/decode_step.py", "--model", model])
    return {f"decode of {r['rows']} rows": r["step_ms"] / 1e3 for r in line["results"]}


def train(checkout: Path, model: str) -> Figures:
    words = ["benchmarks/train_step.py", "--side", "ours", "--steps", "4", "--model", model]
    lines = run(checkout, words, trainer_env(model) | {"MASTER_ADDR": "127.0.0.1"})
    return {"training step": statistics.median([line["step_s"] for line in lines if "step_s" in line][1:])}


def serving(checkout: Path, model: str) -> Figures:
    with servers(model, ("native", sorted(os.sched_getaffinity(0))), root=checkout) as [server]:
        [line] = run(
            checkout, ["-m", "arealite.cli", "bench", "serve", "--address", server.url.removeprefix("http://")]
        )
    return {"serving, a token": 1 / line["output_tokens_per_s"]}


def update(checkout: Path, model: str) -> Figures:
    words = ["benchmarks/weight_update.py", "--links", "shm,distributed,disk", "--updates", "5", "--model", model]
    [line] = run(checkout, words)
    links = ("shm", "distributed", "disk")
    return {f"update by {link}, {part}": line[link][f"{part}_s"] for link in links for part in ("paused", "whole")}


def quickstart(checkout: Path, model: str) -> Figures:
    script = "examples/arealite/quickstart"
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "arealite.cli", "run", f"{script}.py", "--config", f"{script}.yaml", f"actor.path={model}"]
        limits = [f"{name}={QUICKSTART_STEPS}" for name in ("total_train_steps", "saver.freq_steps")]
        began = time.monotonic()
        limits += ["valid_dataset=null", "evaluator.freq_steps=null"]
        run(checkout, [*words, *limits, f"cluster.fileroot={folder}"])
        return {f"quickstart, {QUICKSTART_STEPS} steps": time.monotonic() - began}


PARTS: dict[str, Callable[[Path, str], Figures]] = {
    "decode": decode, "train": train, "serving": serving, "update": update, "quickstart": quickstart
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m", help="a folder, or a name for `arealite fetch`")
    args = parser.parse_args()
    model, sides = resolve_model(args.model), {"before": args.before.resolve(), "now": Path(ROOT)}
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for part in args.parts.split(","):
        for number in range(args.rounds):
            for side in sorted(sides, reverse=number % 2 == 1):
                for name, seconds in PARTS[part](sides[side], model).items():
                    figures[name][side].append(seconds)
                    print(f"round {number}: {name}, {side}: {seconds:.4f} s", flush=True)
    medians = {name: {side: statistics.median(values[side]) for side in sides} for name, values in figures.items()}
    ratios = {name: round(m["now"] / m["before"], 3) for name, m in medians.items()}
    for name, ratio in ratios.items():
        print(f"{name:32} {medians[name]['before']:9.4f} s {medians[name]['now']:9.4f} s   ratio {ratio:.3f}")
    commits = {
        side: subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=path, capture_output=True, text=True
        ).stdout.strip()
        for side, path in sides.items()
    }
    machine = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print(json.dumps({"benchmark": "two_checkouts", "ratio": ratios, "commits": commits, "machine": machine}))


if __name__ == "__main__":
    main()
