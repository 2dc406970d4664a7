"""Kill -9 of trainer, server and launcher at random moments of a real run; then account for every sample.

    python benchmarks/chaos.py [--kills 10] [--seed 0] [key=value ...]

Runs the quickstart (SmolLM2-135M, a recovery point every second step) until it is done, killing one process after
another and starting the launcher again whenever it was the victim or gave up. Ends with the audit of the ledger and
one JSON line: kills, lives, samples trained exactly once, violations, checkpoints lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from arealite.observe.processes import Heartbeat
from arealite.rollout.ledger import audit

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS, NUM_PROMPTS = 48, 8
LIMIT_S = 3600.0


def command(folder: Path, overrides: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "arealite.cli", "run", "examples/arealite/quickstart.py",
        "--config", "examples/arealite/quickstart.yaml", f"cluster.fileroot={folder}",
        f"total_train_steps={NUM_STEPS}", f"train_dataset.batch_size={NUM_PROMPTS}", "gconfig.n_samples=4",
        "recover.freq_steps=2", "recover.max_restarts=20", "saver.freq_steps=8", "saver.num_kept=null",
        "evaluator.freq_steps=null", *overrides,
    ]  # fmt: skip


def living(run: Path) -> dict[str, int]:
    """Processes of the run by name, as they report themselves."""
    beats = map(Heartbeat.read, (run / "waits").glob("*.json"))
    return {beat.process: beat.pid for beat in beats if beat is not None and psutil.pid_exists(beat.pid)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("override", nargs="*")
    args = parser.parse_args()
    choose = random.Random(args.seed)
    checkpoints: set[str] = set()
    kills: list[str] = []
    lives, lost, started = 1, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "quickstart" / "addition"
        launcher = subprocess.Popen(command(Path(folder), args.override), cwd=ROOT)
        while launcher.poll() != 0:
            if time.monotonic() - started > LIMIT_S:
                launcher.terminate()
                sys.exit(f"not done within {LIMIT_S:.0f} s after {len(kills)} kills")
            if launcher.poll() is not None:
                lives += 1
                launcher = subprocess.Popen(command(Path(folder), args.override), cwd=ROOT)
            if len(kills) < args.kills:
                pause_s = choose.uniform(3.0, 45.0)
                try:
                    launcher.wait(timeout=pause_s)
                    continue
                except subprocess.TimeoutExpired:
                    pass
                victim = choose.choice(["trainer-0", "server-0", "launcher"])
                pid = launcher.pid if victim == "launcher" else living(run).get(victim)
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    kills.append(victim)
                    print(f"--- killed {victim} ({len(kills)} of {args.kills})", flush=True)
                time.sleep(0.5)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    launcher.wait(timeout=5)
            present = {p.name for p in (run / "checkpoints").glob("step_*")}
            lost += len(checkpoints - present)
            checkpoints |= present
        report = audit(run / "ledger.jsonl")
        summary = json.loads((run / "summary.json").read_text())
        left = living(run)
    trained = sum(state == "trained" for state in report.states.values())
    figures = {
        "benchmark": "chaos", "kills": len(kills), "victims": kills, "launcher_lives": lives,
        "samples_trained_once": trained, "samples_expected": NUM_STEPS * NUM_PROMPTS,
        "violations": len(report.violations), "checkpoints_lost": lost, "processes_left": len(left),
        "steps": summary["steps"], "accuracy_after": summary["accuracy_after"],
        "wall_s": round(time.monotonic() - started, 1),
    }  # fmt: skip
    print(json.dumps(figures))
    broken = report.violations or lost or left or trained != NUM_STEPS * NUM_PROMPTS
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
