"""What a GPU does in a training step: milliseconds of the parts, MFU, and peak memory against the estimate.

    python benchmarks/gpu_train.py [--shape 1.5B 0.5B] [--device cuda] [--steps 3] [--tokens 16384] [--profile]
    python benchmarks/gpu_train.py --device cpu        (from start to end with a tiny shape)

Models have Qwen2.5's shapes and random weights. An update is `--tokens` tokens in one micro-batch, as sequences of an
eighth of them and as one, under each setting of activation checkpointing. Timed: the whole update (median after one
warm-up), and by themselves forward and backward of the model, of the head on random hidden states, norms with
clipping and the optimizer's step, and a pass for logprobs alone. MFU is against the maker's sheet, and against a square
product measured here ("of product"). Then prompt sharing, on and off: groups of 16 answers, of which the ratio of times
should be near the ratio of FLOPs. A case that fails is told, and the next one begins. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from arealite.api.cli_args import OptimizerConfig, PPOActorConfig, SFTConfig
from arealite.api.types import Batch, Dims
from arealite.engine.logprobs import token_logprobs
from arealite.engine.optim import clip_gradients, gradient_norms
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.launcher.memory_estimate import trainer_parts
from arealite.models.rank_memory import ModelShape

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
CHECKPOINTING = ("none", "selective", "full")
NUM_SEQUENCES = (8, 1)  # that the tokens of an update are cut into
NUM_ANSWERS = 16  # of a group, where prompts are shared
Result = dict[str, Any]


def make_model(shape: str, folder: str, device: torch.device) -> str:
    """A folder of random bf16 weights without a tokenizer."""
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=True)
    with device:
        model = Qwen2ForCausalLM(config).bfloat16()
    path = Path(folder) / shape
    model.save_pretrained(path)
    del model
    free_memory(device)
    return str(path)


def make_batch(prompts: list[int], answer: int, num_answers: int, vocabulary: int) -> Batch:
    """A group of `num_answers` answers of `answer` random tokens for each prompt of so many."""
    rng = np.random.default_rng(0)
    starts = [rng.integers(1, vocabulary, size) for size in prompts]
    rows = [
        np.concatenate([start, rng.integers(1, vocabulary, answer)]) for start in starts for _ in range(num_answers)
    ]
    mask = np.concatenate([np.arange(len(row)) >= len(row) - answer for row in rows])
    return Batch(
        tokens=np.concatenate(rows),
        loss_mask=mask,
        logprobs=np.where(mask, -np.log(vocabulary), 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        cu_seqlens=np.cumsum([0, *map(len, rows)]),
        group_ids=np.repeat(np.arange(len(prompts)), num_answers),
        sample_ids=np.arange(len(rows)),
        rewards=np.arange(len(rows)) % 2.0,
        truncated=np.zeros(len(rows), bool),
        num_groups=len(prompts),
        task_ids=[str(i // num_answers) for i in range(len(rows))],
        advantages=np.where(mask, np.resize([1.0, -1.0], len(mask)), 0).astype(np.float32),
    )


class Bench:
    """`device`, and how to time work on it; `profiles`: whether one update is watched kernel by kernel."""

    def __init__(self, device: torch.device, steps: int, profiles: bool = False) -> None:
        self.device, self.steps, self.profiles = device, steps, profiles

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def median_s(self, run: Callable[[], Any]) -> float:
        """Of `steps` calls, after one to warm up."""
        times = []
        for _ in range(self.steps + 1):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def product_flops(self) -> float:
        """FLOP/s of a product of square matrices."""
        size, dtype = (8192, torch.bfloat16) if self.device.type == "cuda" else (512, torch.float32)
        a, b = torch.randn(2, size, size, device=self.device, dtype=dtype)
        return 2 * size**3 * 10 / self.median_s(lambda: [a @ b for _ in range(10)])


def profiled(bench: Bench, run: Callable[[], Any]) -> Result:
    """Milliseconds of the kernels on the card and of the host in one call (watching slows it); shows the longest."""
    with torch.profiler.profile() as watched:
        run()
        bench.wait()
    found = watched.key_averages()
    on_card = bench.device.type == "cuda"
    print(found.table(sort_by=f"self_{'cuda' if on_card else 'cpu'}_time_total", row_limit=30))
    card = [e for e in found if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    card_us, host_us = sum(e.self_device_time_total for e in card), sum(e.self_cpu_time_total for e in found)
    return {"kernels_ms": card_us / 1e3, "host_ms": host_us / 1e3}


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def training(path: str, device: torch.device, **settings: Any) -> Iterator[FSDPPPOActor]:
    optimizer = OptimizerConfig(lr=1e-9, max_grad_norm=1e9)
    actor = FSDPPPOActor(PPOActorConfig(path=path, optimizer=optimizer, **settings))
    try:
        actor.initialize()
        yield actor
    finally:
        actor.destroy()
        vars(actor).clear()
        free_memory(device)


def flops_of(actor: FSDPPPOActor, batch: Batch) -> float:
    return sum(actor.sharded.flops.count(micro) for micro in actor._micro_batches(batch, "benchmark"))


def update(actor: FSDPPPOActor, batch: Batch) -> None:
    stats = actor.grpo_update(batch)
    assert not stats["skipped"], stats


def parts(bench: Bench, actor: FSDPPPOActor, batch: Batch) -> Result:
    """Milliseconds of what an update is made of, one after the other."""
    [micro] = actor._micro_batches(batch, "benchmark")
    times: dict[str, list[float]] = {"forward_ms": [], "backward_ms": [], "norms_ms": [], "optimizer_ms": []}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        bench.wait()
        started = time.perf_counter()
        found = run()
        bench.wait()
        times[name].append(1e3 * (time.perf_counter() - started))
        return found

    def norms() -> None:
        total = sum(gradient_norms(actor.sharded.parameters, actor.ranks.group).values())
        clip_gradients(actor.sharded.parameters.values(), 1e9, total)

    assert actor.sharded.optimizer is not None
    for _ in range(bench.steps + 1):
        logp, entropy = timed("forward_ms", lambda: actor.sharded.model(micro, 1.0))
        timed("backward_ms", (logp.mean() + 0 * entropy.sum()).backward)
        del logp, entropy
        timed("norms_ms", norms)
        timed("optimizer_ms", actor.sharded.placement.step)
        actor.sharded.optimizer.zero_grad(set_to_none=True)
        for module in actor.sharded.modules:
            module.reshard()
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def head_ms(bench: Bench, actor: FSDPPPOActor, num_tokens: int) -> float:
    """Milliseconds of the head, forward and backward, without the model before it."""
    config = actor.sharded.hf_model.config
    made = {"device": bench.device, "dtype": actor.sharded.dtype, "requires_grad": True}
    hidden, weight = (torch.randn(n, config.hidden_size, **made) for n in (num_tokens, config.vocab_size))
    row_of = torch.arange(num_tokens, device=bench.device)
    targets = row_of % config.vocab_size

    def run() -> None:
        logp, _ = token_logprobs(hidden, weight, row_of, targets, 1.0, actor.config.logprob_chunk_tokens)
        logp.mean().backward()

    return 1e3 * bench.median_s(run)


def estimate_gib(path: str, num_sequences: int, num_tokens: int, checkpointing: str) -> float:
    """What launcher/memory_estimate.py says of such a trainer, the program apart, which is no memory of a GPU."""
    config = SFTConfig(kind="sft")
    config.model.gradient_checkpointing, config.model.max_tokens_per_mb = checkpointing, num_tokens
    config.train_dataset.batch_size, config.train_dataset.max_length = num_sequences, num_tokens // num_sequences
    shape = ModelShape.read(path)
    assert shape is not None
    found = trainer_parts(config, shape, Dims(), None, on_gpu=True)
    return sum(part.num_bytes for part in found if part.name != "program") / 2**30


def measure(bench: Bench, path: str, num_tokens: int, checkpointing: str, peak_flops: float) -> Iterator[Result]:
    """One engine: updates of the same tokens as several sequences and as one."""
    with training(path, bench.device, max_tokens_per_mb=num_tokens, gradient_checkpointing=checkpointing) as actor:
        for num_sequences in NUM_SEQUENCES:
            # One token more than is computed: from the last one nothing is predicted.
            vocabulary = actor.sharded.hf_model.config.vocab_size
            batch = make_batch([1] * num_sequences, num_tokens // num_sequences, 1, vocabulary)
            free_memory(bench.device)
            update_s = bench.median_s(lambda: update(actor, batch))  # noqa: B023
            found: Result = {"sequences": num_sequences, "checkpointing": checkpointing, "update_ms": 1e3 * update_s}
            if bench.device.type == "cuda":
                found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
                found["estimate_gib"] = estimate_gib(path, num_sequences, num_tokens, checkpointing)
            found["mfu_sheet"] = actor.grpo_update(batch).get("mfu")
            flops = flops_of(actor, batch)
            found |= {"tflop": flops / 1e12, "of_product": flops / update_s / peak_flops}
            found |= parts(bench, actor, batch)
            found["logp_ms"] = 1e3 * bench.median_s(lambda: actor.compute_logp(batch))  # noqa: B023
            if checkpointing == "none" and num_sequences == NUM_SEQUENCES[0]:
                found["head_ms"] = head_ms(bench, actor, num_tokens)
                if bench.profiles:
                    found |= profiled(bench, lambda: update(actor, batch))  # noqa: B023
            yield found


def measure_sharing(bench: Bench, path: str, num_tokens: int, num_groups: int) -> Result:
    """Groups of 16 answers, each half as long as their prompt; computed once per prompt, and once per sequence."""
    prompt = num_tokens // 16
    with training(path, bench.device, max_tokens_per_mb=num_tokens, gradient_checkpointing="selective") as actor:
        batch = make_batch([prompt] * num_groups, prompt // 2, NUM_ANSWERS, actor.sharded.hf_model.config.vocab_size)
        found: Result = {}
        for name, is_shared in (("shared", True), ("alone", False)):
            actor.config.share_prompts = is_shared
            found[f"{name}_tflop"] = flops_of(actor, batch) / 1e12
            found[f"{name}_ms"] = 1e3 * bench.median_s(lambda: update(actor, batch))
    found["time_ratio"] = found["alone_ms"] / found["shared_ms"]
    return found | {"flop_ratio": found["alone_tflop"] / found["shared_tflop"]}


def show(results: list[Result]) -> None:
    """All columns that any of the results has, in a table."""
    names = list(dict.fromkeys(name for result in results for name in result))
    table = Table(*names)
    for result in results:
        cells = [result.get(name) for name in names]
        table.add_row(*("" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells))
    Console(width=220).print(table)


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.cuda.is_available = lambda: False  # the engine takes a GPU where there is one
    bench = Bench(device, args.steps, args.profile)
    is_small = device.type == "cpu"
    num_tokens = args.tokens or (256 if is_small else 16384)
    peak = bench.product_flops()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    told: Result = {"device": name, "torch": torch.__version__, "tokens": num_tokens, "product_tflops": peak / 1e12}
    results: list[Result] = []
    failed: list[str] = []

    def attempt(case: str, run: Callable[[], Iterator[Result]]) -> None:
        started = time.perf_counter()
        try:
            for found in run():
                results.append({"case": case, **found})
                print(json.dumps(results[-1]), flush=True)
        except Exception as error:  # boundary of a case: the others are measured all the same
            failed.append(f"{case}: {type(error).__name__}: {str(error)[:500]}")
            print(failed[-1], flush=True)
        free_memory(device)  # what an error held
        print(f"{case}: {time.perf_counter() - started:.0f} s with loading", flush=True)

    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for shape in args.shape or (["tiny"] if is_small else ["1.5B", "0.5B"]):
            path = make_model(shape, folder, device)
            for kind in args.checkpointing:
                attempt(f"{shape} {kind}", lambda: measure(bench, path, num_tokens, kind, peak))  # noqa: B023
            num_groups = 2 if is_small else 8
            attempt(f"{shape} sharing", lambda: iter([measure_sharing(bench, path, num_tokens, num_groups)]))  # noqa: B023
    show([r for r in results if "update_ms" in r])
    show([r for r in results if "time_ratio" in r])
    print(json.dumps({**told, "results": results, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES))
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING, default=CHECKPOINTING)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="computed per update (default: 16384; on a CPU 256)")
    parser.add_argument("--profile", action="store_true", help="an update of the first case, kernel by kernel")
    raise SystemExit(main(parser.parse_args()))
