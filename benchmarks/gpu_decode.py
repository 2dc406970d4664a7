"""Decode and prefill of the built-in server's engine, in this process, with random weights: ms per step, tokens per
second, the host's part of a step, and how near all that is to what reading weights and KV cache once would take.

    python benchmarks/gpu_decode.py [--device cuda] [--shape 0.5B 1.5B 7B] [--rows 64 256] [--context 256 1024 4096]
                                    [--steps 32] [--profile]
    python benchmarks/gpu_decode.py --device cpu       (from start to end with a tiny shape)

The roofline is (weights + keys and values) / the rate at which this card copies, measured in the same run. `eager` is
the same step without CUDA graphs (as with AREALITE_GRAPHS=0). A table comes first and one JSON line last; what has no
room on the card is left out and says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from arealite import devices
from arealite.inference.core.batcher import Batcher
from arealite.inference.core.cache import pages_for
from arealite.inference.core.graphs import Started
from arealite.inference.core.layout import ATTENTION_NAME
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.core.sequence import Sequence
from arealite.inference.core.served_model import ServedModel

# layers, width, width of the gated unit, query and key heads, vocabulary, whether head and embedding are one
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 512, True),
    "0.5B": (24, 896, 4864, 14, 2, 151936, True),
    "1.5B": (28, 1536, 8960, 12, 2, 151936, True),
    "7B": (28, 3584, 18944, 28, 4, 152064, False),
}
CASES = ["0.5B", "1.5B", "7B"], [64, 256], [256, 1024, 4096]  # shapes, rows, contexts
CPU_CASES = ["tiny"], [4], [64]
WARM_UP = 6  # steps before the clock: graphs are captured in the first ones
PREFILL = 8192
ROOM_BYTES = 6 << 30  # for the work of a step
Row = dict[str, Any]


def make_model(shape: str, device: torch.device) -> ServedModel:
    layers, width, gated, heads, kv_heads, vocabulary, is_tied = SHAPES[shape]
    config = Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=gated,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=is_tied,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION_NAME)
    return ServedModel(module.requires_grad_(False), None, shape)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Any, device: torch.device, times: int = 5) -> float:
    """The best of some."""
    best = float("inf")
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def rates(device: torch.device) -> Row:
    """Bytes per second read and written by a copy, and bf16 operations per second of a large product."""
    size = 1 << (30 if device.type == "cuda" else 22)
    x, n = torch.ones(size, dtype=torch.bfloat16, device=device), 8192 if device.type == "cuda" else 256
    y, a = torch.empty_like(x), torch.ones(n, n, dtype=torch.bfloat16, device=device)
    copy, product = seconds(lambda: y.copy_(x), device), seconds(lambda: a @ a, device)
    return {"copy_tb_per_s": 2 * x.nbytes / copy / 1e12, "product_tflops": 2 * n**3 / product / 1e12}


def weight_bytes(model: ServedModel) -> int:
    """Read by each step: all but an embedding that is not the head."""
    embedding = model.module.get_input_embeddings().weight
    is_head = embedding is model.module.get_output_embeddings().weight
    total = sum({p.data_ptr(): p.nbytes for p in model.module.parameters()}.values())
    return total if is_head else total - embedding.nbytes


def begin(batcher: Batcher, num_rows: int, context: int, max_new_tokens: int) -> None:
    """Requests that run, as if prompts of `context` tokens had just been computed."""
    for i in range(num_rows):
        params = SamplingParams(max_new_tokens, ignore_eos=True)
        sequence = Sequence(GenerateRequest(f"{i}", [1 + i % 100] * context, params))
        sequence.tokens.append(2)
        sequence.logprobs.append(0.0)
        sequence.pages = array("i", batcher.scheduler.pool.take(pages_for(context + 1)))
        sequence.num_computed, sequence.seed = context, i
        batcher.scheduler.running.append(sequence)


@contextmanager
def waiting_counted(total: list[float]) -> Iterator[None]:
    """Adds the time that steps wait for tokens."""
    plain = Started.wait

    def timed(self: Started) -> Any:
        start = time.perf_counter()
        try:
            return plain(self)
        finally:
            total[0] += time.perf_counter() - start

    Started.wait = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Started.wait = plain  # type: ignore[method-assign]


def time_steps(model: ServedModel, num_rows: int, context: int, steps: int, has_graphs: bool) -> tuple[float, float]:
    """Milliseconds per step, and those of them that the host works."""
    room = num_rows * (pages_for(context + WARM_UP + steps + 2) + 1) * 16
    batcher = Batcher(model, num_rows, room, "0")
    if not has_graphs:
        batcher._graphs = None
    begin(batcher, num_rows, context, WARM_UP + steps + 4)
    with torch.inference_mode():
        for _ in range(WARM_UP):
            batcher.step()
        waited = [0.0]
        with waiting_counted(waited):
            wait(model.device)
            start = time.perf_counter()
            for _ in range(steps):
                batcher.step()
            batcher.catch_up()
            wait(model.device)
            took = time.perf_counter() - start
    assert batcher.counters.num_nan_requests == 0 and len(batcher.scheduler.running) == num_rows
    return took / steps * 1e3, (took - waited[0]) / steps * 1e3


def decode(model: ServedModel, num_rows: int, context: int, steps: int, rate: float) -> Row:
    found: Row = {"shape": model.path, "rows": num_rows, "context": context}
    kv_bytes = num_rows * context * model.kv_bytes_per_token
    if model.device.type == "cuda" and torch.cuda.mem_get_info()[0] < kv_bytes * 1.1 + ROOM_BYTES:
        return found | {"left_out": f"no room for {kv_bytes / 2**30:.0f} GiB of keys and values"}
    took, host = time_steps(model, num_rows, context, steps, has_graphs=True)
    eager, _ = time_steps(model, num_rows, context, max(4, steps // 4), has_graphs=False)
    ideal = (weight_bytes(model) + kv_bytes) / rate * 1e3
    return found | {
        "ms": took,
        "host_ms": host,
        "eager_ms": eager,
        "tokens_per_s": num_rows / took * 1e3,
        "roofline_ms": ideal,
        "roofline_share": ideal / took,
    }


def prefill(model: ServedModel, cached: int, num: int, rate: float) -> Row:
    """`num` tokens of one prompt, after `cached` that have been computed."""
    batcher = Batcher(model, 4, 4 * (cached + num + 32), "0", step_tokens=num)
    config = model.config
    products = sum(p.numel() for name, p in model.module.named_parameters() if ".layers." in name)
    seen = num * (cached + num / 2)
    flops = 2 * products * num + 4 * config.num_hidden_layers * config.hidden_size * seen

    def once() -> None:
        request = GenerateRequest("p", [7] * (cached + num), SamplingParams(1, ignore_eos=True))
        sequence = Sequence(request)
        sequence.pages = array("i", batcher.scheduler.pool.take(pages_for(cached + num)))
        sequence.num_computed = cached
        batcher.scheduler.running.append(sequence)
        batcher.step()
        batcher.catch_up()
        assert sequence.future.done() and sequence.finish_reason == {"type": "length", "length": 1}
        batcher.scheduler.prefix.clear()

    with torch.inference_mode():
        once()
        took = seconds(once, model.device, 3)
    return {
        "shape": model.path,
        "prefill": num,
        "cached": cached,
        "ms": took * 1e3,
        "tokens_per_s": num / took,
        "tflops": flops / took / 1e12,
        "product_share": flops / took / rate,
    }


def profile(model: ServedModel, num_rows: int, context: int) -> str:
    """Where the time of eager steps goes, kernel by kernel."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if model.device.type == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as found:
        time_steps(model, num_rows, context, 4, has_graphs=False)
    return found.key_averages().table(sort_by=f"self_{model.device.type}_time_total", row_limit=25)


def show(rows: list[Row]) -> None:
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs="+", choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--context", nargs="+", type=int)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="kernels of eager steps, of the first rows and context")
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes, rows, contexts = CPU_CASES if device.type == "cpu" else CASES
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        devices.use(device)
    found: Row = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", **rates(device)}
    show([found])
    results: list[Row] = []
    num = PREFILL if device.type == "cuda" else 64
    for shape in args.shape or shapes:
        model = make_model(shape, device)
        for num_rows in args.rows or rows:
            for context in args.context or contexts:
                results.append(decode(model, num_rows, context, args.steps, found["copy_tb_per_s"] * 1e12))
                show(results[-1:])
        for cached in (0, num):
            results.append(prefill(model, cached, num, found["product_tflops"] * 1e12))
            show(results[-1:])
        if args.profile:
            print(profile(model, (args.rows or rows)[0], (args.context or contexts)[0]), flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    results = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in results]
    print(json.dumps({"benchmark": "gpu_decode", **found, "results": results}))


if __name__ == "__main__":
    main()
