"""What a decode step of the native server costs, and what share of it goes where: no HTTP, one process, on the CPU.

    python benchmarks/decode_step.py [--model FOLDER] [--rows 8,64] [--threads 1] [--no-kernels]

Prompts of 40 random tokens; every step gives each row one token. Shares are CPU time of the engine's thread, so that
other programs hardly change them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from arealite.inference.core import batcher, layout
from arealite.inference.core.batcher import Batcher
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.core.sequence import Sequence
from arealite.inference.core.served_model import ServedModel
from arealite.kernels import build, cpu, linears
from arealite.kernels.cpu import Kernels
from arealite.models.fetch import resolve_model

NUM_PROMPT, NUM_WARM_STEPS, NUM_STEPS = 40, 16, 32
# What one calls of another counts for the other. Without the compiled kernels, norms and element-wise operations count
# as operations in the model.
TIMED: list[tuple[Any, str, str]] = [
    (Kernels, "product", "matrix products"),
    (linears._OneDnn, "product", "matrix products"),
    (linears._Float32, "product", "matrix products"),
    (torch.nn.functional, "linear", "matrix products"),
    (Kernels, "attention", "attention"),
    (layout, "paged_attention", "attention"),
    (Kernels, "rms_norm", "norms and element-wise"),
    (Kernels, "silu_times", "norms and element-wise"),
    (Kernels, "rotate", "norms and element-wise"),
    (batcher, "sample", "sampling"),
    (ServedModel, "forward", "Python and other operations in the model"),
]
REST = "Python around the model"


def timed(function: Callable[..., Any], spent_s: dict[str, float], share: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time() - sum(spent_s.values())
        result = function(*args, **kwargs)
        spent_s[share] += time.thread_time() - sum(spent_s.values()) - start
        return result

    return call


def measure(model: ServedModel, num_rows: int, spent_s: dict[str, float]) -> dict[str, Any]:
    """Median step, tokens per second and CPU milliseconds of each share."""
    num_new = NUM_WARM_STEPS + NUM_STEPS + 2
    engine = Batcher(model, num_rows, num_rows * 2 * (NUM_PROMPT + num_new), "0")
    chance = random.Random(0)
    for row in range(num_rows):
        prompt = [chance.randrange(model.vocab_size) for _ in range(NUM_PROMPT)]
        engine.add(Sequence(GenerateRequest(str(row), prompt, SamplingParams(num_new, ignore_eos=True))))
    with torch.inference_mode():
        while any(sequence.num_output < NUM_WARM_STEPS for sequence in engine.in_flight()):
            engine.step()
        spent_s.clear()
        steps_s = []
        cpu_s = time.thread_time()
        for _ in range(NUM_STEPS):
            start = time.perf_counter()
            engine.step()
            steps_s.append(time.perf_counter() - start)
        cpu_s = time.thread_time() - cpu_s
    median_s = statistics.median(steps_s)
    shares = {name: 1e3 * seconds / NUM_STEPS for name, seconds in spent_s.items()}
    shares[REST] = 1e3 * cpu_s / NUM_STEPS - sum(shares.values())
    return {"rows": num_rows, "step_ms": 1e3 * median_s, "tokens_per_s": num_rows / median_s, "shares_ms": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a folder, or a name for `arealite fetch`")
    parser.add_argument("--rows", default="8,64")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int)
    parser.add_argument("--no-kernels", action="store_true", help="the path of machines without compiled kernels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.no_kernels:
        cpu.load = lambda: None
    spent_s: dict[str, float] = defaultdict(float)
    for owner, name, share in TIMED:
        setattr(owner, name, timed(getattr(owner, name), spent_s, share))
    model = ServedModel.load(resolve_model(args.model), torch.bfloat16, torch.device("cpu"), None, False)
    results = [measure(model, int(rows), spent_s) for rows in args.rows.split(",")]
    for result in results:
        print(f"{result['rows']} rows: {result['step_ms']:.1f} ms a step, {result['tokens_per_s']:.0f} tokens/s")
        total = sum(result["shares_ms"].values())
        for share, ms in sorted(result["shares_ms"].items(), key=lambda pair: -pair[1]):
            print(f"  {share:40} {ms:6.1f} ms {ms / total:6.1%}")
    print(
        json.dumps(
            {"threads": args.threads, "kernels": build.description() if cpu.load() else "off", "results": results}
        )
    )


if __name__ == "__main__":
    main()
