"""Times of the Triton kernels on a GPU, in shapes of Qwen2.5-1.5B and 7B, beside what the card copies in that time.

python benchmarks/gpu_kernels.py [--only decode]

A row: median of runs with a cold cache, as parts of a CUDA graph, so that launching is not counted; the rate of bytes
that have to be read and written at least, and its share of a copy's. Launch options of decode are tried one by one. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.testing import do_bench

from arealite.kernels import functions, gpu
from arealite.kernels.cpu import Scores

TOKENS, VOCABULARY = 16384, 151936
Case = tuple[str, int, Callable[[], Any]]  # its name, bytes, and the call


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def time_ms(call: Callable[[], Any]) -> float:
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    took: float = do_bench(graph.replay, return_mode="median")
    return took


def of_modules(lib: gpu.GpuKernels) -> Iterator[Case]:
    for shape in ((TOKENS, 1536), (TOKENS, 3584), (TOKENS, 12, 128)):
        x, weight = normal(*shape), normal(shape[-1])
        yield f"norm {shape}", 2 * x.nbytes, lambda: lib.rms_norm(x, weight, 1e-6, False)  # noqa: B023
        yield f"sum and norm {shape}", 4 * x.nbytes, lambda: lib.add_rms_norm(x, x, weight, 1e-6, False)  # noqa: B023
        yield f"norm grad {shape}", 3 * x.nbytes, lambda: lib.rms_norm_grad(x, weight, x, 1e-6, False)  # noqa: B023
    gate, up = normal(TOKENS, 8960), normal(TOKENS, 8960)
    yield "gated unit", 3 * gate.nbytes, lambda: lib.silu_times(gate, up)
    yield "gated unit grad", 5 * gate.nbytes, lambda: lib.silu_times_grad(gate, up, gate)
    x = normal(1, TOKENS, 12, 128).transpose(1, 2)
    cos, sin = normal(2, 1, TOKENS, 128)
    yield "rotation", 2 * x.nbytes + 2 * cos.nbytes, lambda: lib.rotate(x, cos, sin, x)


def of_the_head(lib: gpu.GpuKernels) -> Iterator[Case]:
    row = torch.arange(TOKENS + 1, device="cuda")
    targets = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    scores = Scores(row, targets, *(torch.zeros(TOKENS, device="cuda") for _ in range(5)))
    logits, part = normal(1024, VOCABULARY, dtype=torch.float32), normal(TOKENS, 9472, dtype=torch.float32)
    out = torch.empty_like(part, dtype=torch.bfloat16)
    for block in (2048, 4096, 8192):
        gpu.SCORE_BLOCK = block
        yield f"logprobs, blocks of {block}", logits.nbytes, lambda: lib.score(logits, 0, scores, 1.0)
    gpu.SCORE_BLOCK = 4096
    for block in (1024, 2048, 4096):
        gpu.SLOPE_BLOCK = block
        wanted = part.nbytes + out.nbytes
        yield f"logprobs grad, blocks of {block}", wanted, lambda: lib.score_grad(part, 0, scores, 1.0, out)
    gpu.SLOPE_BLOCK = 2048
    hidden, weight = normal(1024, 1536), normal(VOCABULARY, 1536)
    yield "head product", weight.nbytes + logits.nbytes, lambda: functions.head_product(hidden, weight)
    yield "head product in bf16", weight.nbytes + logits.nbytes // 2, lambda: hidden @ weight.t()


def of_sampling(lib: gpu.GpuKernels) -> Iterator[Case]:
    for num in (1, 64, 256):
        logits, temperature = normal(num, VOCABULARY, dtype=torch.float32), torch.ones(num, device="cuda")
        uniform = torch.rand(num, device="cuda", dtype=torch.float64)
        yield f"sample {num} rows", logits.nbytes, lambda: lib.sample(logits, temperature, uniform)  # noqa: B023


def of_decode(lib: gpu.GpuKernels) -> Iterator[Case]:
    plain = gpu.SPLIT, gpu.KEYS, gpu.DECODE
    tried = [(split, 64, warps, 3) for split in (256, 512, 1024) for warps in (4, 8)]
    tried += [(512, 64, 4, 2), (512, 64, 4, 4), (512, 32, 4, 3), (512, 32, 2, 4), (512, 128, 8, 3)]
    for heads, kv_heads in ((12, 2), (28, 4)):
        for num, keys in ((64, 1024), (256, 1024), (64, 4096), (8, 16384)):
            pages = num * keys // 16
            pool = normal(2, kv_heads, pages, 16, 128)
            tables = torch.randperm(pages, device="cuda").view(num, -1).int()
            lens = torch.full((num,), keys, device="cuda", dtype=torch.int32)
            q, k, v = normal(num, heads + 2 * kv_heads, 128).split([heads, kv_heads, kv_heads], 1)
            for split, block, warps, stages in tried:
                gpu.SPLIT, gpu.KEYS, gpu.DECODE = split, block, {"num_warps": warps, "num_stages": stages}
                settings = f"split {split} keys {block} warps {warps} stages {stages}"
                yield (
                    f"decode {heads}/{kv_heads} heads {num} x {keys}, {settings}",
                    pool.nbytes,
                    lambda: lib.decode(q, k, v, pool, tables, lens, 0, 0.1, keys),  # noqa: B023
                )
    gpu.SPLIT, gpu.KEYS, gpu.DECODE = plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"modules": of_modules, "head": of_the_head, "sampling": of_sampling, "decode": of_decode}
    parser.add_argument("--only", choices=parts, help="these kernels alone")
    args = parser.parse_args()
    lib = gpu.GpuKernels(torch.device("cuda"))
    source, target = torch.zeros(2, 1 << 30, dtype=torch.uint8, device="cuda")
    copied = 2 * source.nbytes / time_ms(lambda: target.copy_(source)) / 1e6
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "copy_gb_per_s": round(copied)}
    print(found)
    for name in [args.only] if args.only else parts:
        for label, num_bytes, call in parts[name](lib):
            try:
                took = time_ms(call)
            except Exception as error:  # one that does not fit this card: the others are still of interest
                found[label] = str(error)[:200]
                print(label, found[label], flush=True)
                continue
            rate = num_bytes / took / 1e6
            found[label] = {"us": round(took * 1e3, 1), "gb_per_s": round(rate), "of_copy": round(rate / copied, 2)}
            print(f"{took * 1e3:9.1f} us {rate:6.0f} GB/s {rate / copied:5.0%}  {label}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
