"""What locking a program up costs: a test in a warm sandbox against the same program in a bare interpreter.

    python benchmarks/sandbox.py [--tests 200]

Both run the same small program with input and output, one after the other, in turns of 20; then as many tests at a time
as there are cores. The peer is `python -I -c PROGRAM`, which protects from nothing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

from arealite.reward.code import code_verify
from arealite.reward.sandbox import ProcessLimits, Sandbox, SandboxError

PROGRAM = "import math\nnumbers = list(map(int, input().split()))\nprint(sum(numbers), math.prod(numbers))\n"
GIVEN, EXPECTED = b"3 4 5\n", b"12 60\n"
TURN = 20


def bare() -> bytes:
    return subprocess.run([sys.executable, "-I", "-c", PROGRAM], input=GIVEN, capture_output=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=200, help="of each kind")
    args = parser.parse_args()
    sandboxes: dict[str, Sandbox] = {}
    for kind in ("bubblewrap", "landlock"):
        try:
            sandboxes[kind] = Sandbox(kind)  # type: ignore[arg-type]
        except SandboxError as error:
            print(f"no {kind} here: {error}")
    seconds: dict[str, list[float]] = {"bare": [], **{kind: [] for kind in sandboxes}}
    for _ in range(args.tests // TURN):
        for side, times in seconds.items():
            for _ in range(TURN):
                began = time.perf_counter()
                out = bare() if side == "bare" else sandboxes[side].run(PROGRAM, GIVEN, ProcessLimits()).stdout
                times.append(time.perf_counter() - began)
                assert out == EXPECTED, out
    for sandbox in sandboxes.values():
        sandbox.close()
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    rows = {"sum": {"input_output": {"inputs": [GIVEN.decode()] * 10, "outputs": [EXPECTED.decode()] * 10}}}
    began, num_programs = time.perf_counter(), max(1, args.tests // 10)
    verdicts = code_verify(rows, [f"```python\n{PROGRAM}```"] * num_programs, ["sum"] * num_programs)
    rate = 10 * num_programs / (time.perf_counter() - began)
    assert all(verdict.reason == "passed" for verdict in verdicts)
    for side, median in medians.items():
        print(f"{side:12} {1000 * median:6.1f} ms a test, {median / medians['bare']:.2f} of a bare interpreter")
    print(f"{rate:.0f} tests per second on all cores, starting the sandboxes included")
    figures = {"benchmark": "sandbox", "ratio": {side: round(m / medians["bare"], 3) for side, m in medians.items()}}
    figures |= {"bare_ms": round(1000 * medians["bare"], 2), "tests_per_s": round(rate, 1)}
    machine = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print(json.dumps(figures | {"machine": machine}))


if __name__ == "__main__":
    main()
