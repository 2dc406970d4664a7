"""Head and agents of a job where tests are about Slurm alone: python support/node_program.py FOLDER NUM.

The head makes NUM steps, of all starts together, a line each in FOLDER/steps; warned it leaves with 85, asked to stop
with 143. The others leave then; with 86 when FOLDER/no_head says so. Each start leaves its environment in
FOLDER/starts.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEP_S = 0.2
LIMIT_S = 120.0


def main(folder: Path, num_steps: int) -> int:
    signals: list[int] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    slot, attempt = int(os.environ.get("AREALITE_SLOT", 0)), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    starts, over = folder / "starts", folder / f"over_{attempt}"
    starts.mkdir(parents=True, exist_ok=True)
    start = {"slot": slot, "attempt": attempt, "pid": os.getpid(), "cwd": os.getcwd(), "env": dict(os.environ)}
    partial = starts / f".{slot}.{os.getpid()}"
    partial.write_text(json.dumps(start))
    partial.rename(starts / f"{attempt}.{slot}.{os.getpid()}.json")
    end = time.monotonic() + LIMIT_S
    if slot:
        while not over.exists() and time.monotonic() < end:
            time.sleep(STEP_S / 2)
            if attempt == 0 and (folder / "no_head").exists():
                return 86
        return 0
    over.unlink(missing_ok=True)  # of a head that was killed here
    with open(folder / "steps", "a") as steps:
        while (folder / "steps").read_text().count("\n") < num_steps:
            if signals:
                leave(over)
                print(f"head: {signal.Signals(signals[0]).name}", flush=True)
                return 85 if signals[0] == signal.SIGUSR2 else 143
            print(f"step of attempt {attempt}", file=steps, flush=True)
            print(f"head: a step of attempt {attempt}", flush=True)
            time.sleep(STEP_S)
    leave(over)
    return 0


def leave(over: Path) -> None:
    over.touch()
    time.sleep(2 * STEP_S)  # until the others have gone


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
