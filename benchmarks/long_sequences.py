"""Seconds and memory of training on sequences of very different lengths: AReaLite against padded Hugging Face training.

    python benchmarks/long_sequences.py [--steps 2] [--peer-batch 1] [--peer-dtype bfloat16] [--peer-checkpointing]

Both sides train SmolLM2-135M on the same 8 sequences of 64 to 4,096 random tokens. Ours: a GRPO update on packed
sequences, bf16 over float32 masters, activation checkpointing, in the environment that the launcher gives a trainer.
The peer: AutoModelForCausalLM with SDPA, sequences padded to the longest, `--peer-batch` at a time (one takes over
10 GB, all 8 at once more than 24: their logits alone are 6 GB in float32), cross-entropy, AdamW; weights in bf16 or,
under autocast, float32. The first step of each is warm-up. Peak memory is VmHWM of each process, loading included.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from typing import Any

from train_step import peer_env, run_ours, run_side, say, say_peak, summarise, trainer_env

LENGTHS = (1024, 64, 4096, 256, 2048, 128, 3072, 512)
NUM_PROMPT = 16
SETTINGS = {"max_tokens_per_mb": 4096, "gradient_checkpointing": "full"}


def make_sequences() -> list[dict[str, Any]]:
    import numpy as np

    rng = np.random.default_rng(0)
    rows = [rng.integers(1000, 49000, length).tolist() for length in LENGTHS]
    return [{"prompt": r[:NUM_PROMPT], "answer": r[NUM_PROMPT:], "reward": i % 2.0} for i, r in enumerate(rows)]


def run_padded(model: str, args: argparse.Namespace) -> None:
    """The peer's side, in its own process."""
    import torch
    from transformers import AutoModelForCausalLM

    weights = torch.bfloat16 if args.peer_dtype == "bfloat16" else torch.float32
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=weights, attn_implementation="sdpa").train()
    if args.peer_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    longest = max(LENGTHS)
    tokens, seen = torch.zeros(2, len(LENGTHS), longest, dtype=torch.int64)
    for i, sequence in enumerate(make_sequences()):
        row = torch.tensor(sequence["prompt"] + sequence["answer"])
        tokens[i, : len(row)], seen[i, : len(row)] = row, 1
    labels = torch.where((seen == 1) & (torch.arange(longest) >= NUM_PROMPT), tokens, -100)
    for _ in range(args.steps):
        started = time.perf_counter()
        for at in range(0, len(LENGTHS), args.peer_batch):
            part = slice(at, at + args.peer_batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.peer_dtype == "float32"):
                out = policy(input_ids=tokens[part], attention_mask=seen[part], labels=labels[part], use_cache=False)
            out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(step_s=time.perf_counter() - started)
    say_peak()


def compare(model: str, args: argparse.Namespace) -> None:
    common = ["--model", model, "--steps", str(args.steps)]
    ours = summarise(run_side(__file__, "ours", common, trainer_env(model)))
    peer_flags = ["--peer-batch", str(args.peer_batch), "--peer-dtype", args.peer_dtype]
    peer_flags += ["--peer-checkpointing"] * args.peer_checkpointing
    peer = summarise(run_side(__file__, "padded", common + peer_flags, peer_env()))
    print(f"\n{'':22}{'AReaLite':>12}{'padded':>12}")
    for key in ("step_s", "peak_gib"):
        print(f"{key:22}{ours[key]:12.2f}{peer[key]:12.2f}")
    figures = {"benchmark": "long_sequences", "ratio": round(peer["step_s"] / ours["step_s"], 2)}
    figures |= {"memory": round(ours["peak_gib"] / peer["peak_gib"], 2), "ours": ours, "padded": peer}
    figures |= {"peer_batch": args.peer_batch, "peer_dtype": args.peer_dtype}
    figures |= {"peer_checkpointing": args.peer_checkpointing, "lengths": LENGTHS}
    machine = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print(json.dumps(figures | {"machine": machine}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("both", "ours", "padded"), default="both", help=argparse.SUPPRESS)
    parser.add_argument("--model", default=None, help="a Hugging Face folder; smollm2-135m if not given")
    parser.add_argument("--steps", type=int, default=2, help="steps of each side, the first is warm-up")
    parser.add_argument("--peer-batch", type=int, default=1, help="sequences that the peer computes together")
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--peer-checkpointing", action="store_true", help="the peer recomputes its activations")
    args = parser.parse_args()
    from arealite.models.fetch import fetch

    model = args.model or str(fetch("smollm2-135m", None))
    if args.side == "ours":
        run_ours(model, make_sequences(), len(LENGTHS), args.steps, **SETTINGS)
    elif args.side == "padded":
        run_padded(model, args)
    else:
        compare(model, args)


if __name__ == "__main__":
    main()
