"""Samples per second of a whole GRPO step: AReaLite against TRL's GRPOTrainer, one after the other in one run.

    pip install -e .[bench] && python benchmarks/grpo_vs_trl.py [--steps 3] [--max-new-tokens 64]

Same model (SmolLM2-135M-Instruct), prompts (examples/arealite/addition), prompts per step (16), group size (8), token
limit, temperature 1, learning rate, clipping and no KL on both sides; the first step of each is warm-up. TRL runs with
its usual CPU settings in its fastest type (`--peer-dtype float32` keeps float32 masters, as AReaLite always does, with
autocast where the CPU has products of bf16). Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arealite.kernels import build

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "examples/arealite/addition/train.jsonl"
NUM_PROMPTS, GROUP_SIZE, LEARNING_RATE = 16, 8, 1e-6


def run_trl(model: str, steps: int, max_new_tokens: int, dtype: str) -> None:
    """The peer's side, in its own process: one JSON line per step on standard output."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from arealite.reward.number import number_reward

    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    rows = (rows * (1 + steps * NUM_PROMPTS // len(rows)))[: (steps + 1) * NUM_PROMPTS]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in rows]
    )
    lengths: list[int] = []

    def reward(completions, answer, completion_ids, **_):  # type: ignore[no-untyped-def]
        lengths.extend(len(ids) for ids in completion_ids)
        texts = [c[0]["content"] for c in completions]
        return [float(number_reward("", t, [], [], answer=a)) for t, a in zip(texts, answer, strict=True)]

    class Clock(TrainerCallback):
        started = time.perf_counter()

        def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            now = time.perf_counter()
            print(json.dumps({"step_s": now - Clock.started, "num_tokens": sum(lengths)}), flush=True)
            lengths.clear()
            Clock.started = time.perf_counter()

        def on_train_begin(self, *_, **__):  # type: ignore[no-untyped-def]
            Clock.started = time.perf_counter()

    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    autocast = dtype == "float32" and build.has_bf16_products()
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=autocast, report_to="none", save_strategy="no",
        per_device_train_batch_size=16, gradient_accumulation_steps=NUM_PROMPTS * GROUP_SIZE // 16,
        num_generations=GROUP_SIZE, max_completion_length=max_new_tokens, temperature=1.0, beta=0.0,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_steps=steps, gradient_checkpointing=False,
        dataloader_pin_memory=False, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=weights),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward, args=config, train_dataset=data, callbacks=[Clock()],
    ).train()  # fmt: skip


def measure_trl(model: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-P", __file__, "--side", "trl", "--model", model, "--steps", str(args.steps),
               "--max-new-tokens", str(args.max_new_tokens), "--peer-dtype", args.peer_dtype]  # fmt: skip
    print("peer:", " ".join(command), flush=True)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    out = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=3600).stdout
    return summarise([json.loads(line) for line in out.splitlines() if line.startswith('{"step_s"')])


def measure_arealite(model: str, args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "arealite.cli", "run", str(ROOT / "examples/arealite/quickstart.py"),
            "--config", str(ROOT / "examples/arealite/quickstart.yaml"), f"cluster.fileroot={folder}",
            f"actor.path={model}", f"train_dataset.batch_size={NUM_PROMPTS}", f"gconfig.n_samples={GROUP_SIZE}",
            f"gconfig.max_new_tokens={args.max_new_tokens}", f"actor.optimizer.lr={LEARNING_RATE}",
            f"total_train_steps={args.steps + 1}", "valid_dataset=null", "evaluator.freq_steps=null",
            "saver.freq_steps=null", "recover.freq_steps=null", "recover.mode=off", *args.override,
        ]  # fmt: skip
        print("ours:", " ".join(command), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, timeout=3600)
        lines = [json.loads(line) for line in next(Path(folder).rglob("metrics.jsonl")).read_text().splitlines()]
    steps = [line for line in lines if "step_s" in line]
    figures = summarise([{"step_s": s["step_s"], "num_tokens": s["num_generated_tokens"]} for s in steps])
    for part in ("rollout_wait_s", "train_s", "sync_s", "reward_s"):
        figures[part] = sum(s.get(part) or 0.0 for s in steps[1:]) / len(steps[1:])
    return figures


def summarise(steps: list[dict[str, float]]) -> dict[str, float]:
    """Means over all steps but the first, which warms up."""
    steady = steps[1:]
    seconds = sum(s["step_s"] for s in steady) / len(steady)
    return {
        "step_s": seconds,
        "samples_per_s": NUM_PROMPTS * GROUP_SIZE / seconds,
        "tokens_per_answer": sum(s["num_tokens"] for s in steady) / len(steady) / (NUM_PROMPTS * GROUP_SIZE),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("both", "trl"), default="both", help=argparse.SUPPRESS)
    parser.add_argument("--model", default=None, help="a Hugging Face folder; smollm2-135m if not given")
    parser.add_argument("--steps", type=int, default=3, help="steps of TRL, the first is warm-up; ours makes one more")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    fastest = "bfloat16" if build.has_bf16_products() else "float32"
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default=fastest)
    parser.add_argument("override", nargs="*", help="key=value for our run, such as rollout.max_head_offpolicyness=0")
    args = parser.parse_args()
    if args.side == "trl":
        run_trl(args.model, args.steps, args.max_new_tokens, args.peer_dtype)
        return
    from arealite.models.fetch import fetch

    model = args.model or str(fetch("smollm2-135m", None))
    ours = measure_arealite(model, args)
    peer = measure_trl(model, args)
    ratio = ours["samples_per_s"] / peer["samples_per_s"]
    print(f"\n{'':22}{'AReaLite':>12}{'TRL':>12}")
    for key in ("step_s", "samples_per_s", "tokens_per_answer"):
        print(f"{key:22}{ours[key]:12.2f}{peer[key]:12.2f}")
    print("ours, seconds of a step:", {k: round(v, 2) for k, v in ours.items() if k.endswith("_s")})
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    figures = {"benchmark": "grpo_vs_trl", "ratio": round(ratio, 2), "ours": ours, "trl": peer}
    figures |= {"peer_dtype": args.peer_dtype, "max_new_tokens": args.max_new_tokens, "machine": machine}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
