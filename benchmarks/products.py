"""Matrix products with a model's weights: by the compiled CPU kernels, and by PyTorch in the ways that it has.

    taskset -c 0,1 python benchmarks/products.py [--rows 1 8 64 512] [--rounds 5]

The weights are those of SmolLM2-135M by shape (30 layers and the head, random bf16), so that each round reads all of
them from memory, as a decode step does. As many threads as there are cores allowed: choose cores, not two threads of
one. PyTorch's ways are F.linear in bf16, oneDNN's packed weights where the CPU has them, and F.linear in float32. The
last line is one JSON object: milliseconds by rows, and ours against the best of PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from arealite.kernels import build, cpu

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)] * 30 + [(49152, 576)]


def ways(weights: list[torch.Tensor]) -> dict[str, Callable[[dict[int, torch.Tensor]], Any]]:
    """Each computes all products; the inputs are by width, bf16."""
    found: dict[str, Callable[[dict[int, torch.Tensor]], Any]] = {}
    kernels = cpu.load()
    if kernels is not None:
        own = [(kernels.pack([w]), *w.shape) for w in weights]
        found["ours"] = lambda x: [kernels.product(x[k], packed, None, n) for packed, n, k in own]
    if build.has_bf16_products():
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, None) for w in weights]
        of = torch.ops.mkldnn._linear_pointwise
        found["oneDNN packed"] = lambda x: [
            of(x[w.shape[1]], p, None, "none", [], "") for w, p in zip(weights, packed, strict=True)
        ]
        found["F.linear bf16"] = lambda x: [linear(x[w.shape[1]], w) for w in weights]
    wide = [w.float() for w in weights]
    found["F.linear float32"] = lambda x: [linear(x[w.shape[1]].float(), w) for w in wide]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    num_flops = 2 * sum(w.numel() for w in weights)
    print(f"{build.description()}, {torch.get_num_threads()} threads")
    runs, results = ways(weights), dict[int, dict[str, float]]()
    for rows in args.rows:
        x = {k: torch.randn(rows, k, generator=generator).bfloat16() for k in {k for _, k in SHAPES}}
        times: dict[str, list[float]] = {}
        for _ in range(args.rounds + 1):  # the ways by turns, so that other load falls on all of them
            for name, run in runs.items():
                began = time.perf_counter()
                run(x)
                times.setdefault(name, []).append(time.perf_counter() - began)
        results[rows] = {name: 1e3 * statistics.median(found[1:]) for name, found in times.items()}
        for name, ms in results[rows].items():
            print(f"{rows:5} rows  {name:17} {ms:8.1f} ms  {rows * num_flops / ms / 1e6:7.0f} GFLOP/s")
    best = {r: min(ms for name, ms in found.items() if name != "ours") for r, found in results.items()}
    ratios = {r: round(found["ours"] / best[r], 2) for r, found in results.items() if "ours" in found}
    kind = {"kernels": build.description(), "threads": torch.get_num_threads()}
    print(json.dumps({**kind, "ms": results, "ours_to_best": ratios}))


if __name__ == "__main__":
    main()
