"""Seconds, memory and MFU of a GRPO training step, rollout excluded: AReaLite against TRL's GRPOTrainer.

    pip install -e .[bench] && python benchmarks/train_step.py [--steps 3] [--peer-dtype bfloat16]

Both sides train SmolLM2-135M on the very same 128 sequences: 16 prompts of examples/arealite/addition, 8 fixed random
answers each (15 to 39 tokens). Timed is what follows generation and rewards, up to the optimizer's step; the first step
of each is warm-up. Ours (with the computation of advantages) runs in bf16 over float32 masters, in the environment that
the launcher gives a trainer. TRL runs in batches of 16: by default over float32 masters with bf16 autocast, as we do
(without autocast on CPUs that have no products of bf16, where it is many times slower); `--peer-dtype bfloat16` trains
bf16 weights without masters, its fastest type where there are such products. Peak memory is VmHWM of each process,
loading included. MFU: the FLOPs that the computed tokens need (recomputation not counted) per second, over what bf16
products of the same shapes reach on this machine. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_vs_trl import GROUP_SIZE, LEARNING_RATE, NUM_PROMPTS, PROMPTS, ROOT

from arealite.kernels import build

ANSWER_TOKENS = (15, 39)  # shortest and longest answer
FIRST_WORD = 1000  # ids below are special tokens and single characters
PEER_BATCH = 16


def make_sequences(model: str) -> list[dict[str, Any]]:
    """Prompt ids, answer ids and reward of every sequence, group by group."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = np.random.default_rng(0)
    sequences = []
    for line in PROMPTS.read_text().splitlines()[:NUM_PROMPTS]:
        message = {"role": "user", "content": json.loads(line)["prompt"]}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        for member in range(GROUP_SIZE):
            answer = rng.integers(FIRST_WORD, len(tokenizer), rng.integers(ANSWER_TOKENS[0], ANSWER_TOKENS[1] + 1))
            sequences.append({"prompt": prompt, "answer": answer.tolist(), "reward": float(member % 3 == 0)})
    return sequences


def as_batch(sequences: list[dict[str, Any]], group_size: int) -> Any:
    """The sequences as AReaLite's trainer gets them."""
    import numpy as np

    from arealite.api.types import Batch

    rows = [s["prompt"] + s["answer"] for s in sequences]
    mask = np.concatenate([np.arange(len(row)) >= len(s["prompt"]) for s, row in zip(sequences, rows, strict=True)])
    num_groups = len(sequences) // group_size
    return Batch(
        tokens=np.concatenate(rows).astype(np.int64),
        loss_mask=mask,
        logprobs=np.where(mask, -10, 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        cu_seqlens=np.cumsum([0, *map(len, rows)]),
        group_ids=np.repeat(np.arange(num_groups), group_size),
        sample_ids=np.arange(len(sequences)),
        rewards=np.asarray([s["reward"] for s in sequences]),
        truncated=np.zeros(len(rows), bool),
        num_groups=num_groups,
        task_ids=[str(i // group_size) for i in range(len(rows))],
    )


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def say_peak() -> None:
    """The most memory that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    say(peak_gib=int(found[1]) / 2**20)


def run_ours(model: str, sequences: list[dict[str, Any]], group_size: int, steps: int, **settings: Any) -> None:
    """Our side, in its own process: JSON lines with step_s, the peak, and what a step computes."""
    from arealite.api.cli_args import OptimizerConfig, PPOActorConfig
    from arealite.engine.micro_batch import cut
    from arealite.engine.ppo.actor import FSDPPPOActor

    actor = FSDPPPOActor(PPOActorConfig(path=model, optimizer=OptimizerConfig(lr=LEARNING_RATE), **settings))
    actor.initialize()
    batch = as_batch(sequences, group_size)
    for _ in range(steps):
        started = time.perf_counter()
        actor.compute_advantages(batch)
        stats = actor.grpo_update(batch)
        say(step_s=time.perf_counter() - started, loss=stats["loss"], grad_norm=stats["grad_norm"])
    say_peak()
    micro = cut(batch, actor.config.max_tokens_per_mb, actor.mesh.device)
    say(
        num_nodes=sum(len(m.tokens) for m in micro),
        num_rows=sum(len(m.predicting) for m in micro),
        num_pairs=sum(int(m.positions.sum()) + len(m.positions) for m in micro),
    )
    actor.destroy()


def run_trl(model: str, sequences: list[dict[str, Any]], steps: int, dtype: str) -> None:
    """The peer's side, in its own process: its own trainer, to which generation hands the fixed answers."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    groups = [sequences[i : i + GROUP_SIZE] for i in range(0, len(sequences), GROUP_SIZE)]
    reward_of = {tuple(s["answer"]): s["reward"] for s in sequences}

    class Fixed(GRPOTrainer):  # type: ignore[misc]
        preparing_s = 0.0
        started = 0.0

        def _tokenize_prompts(self, prompts):  # type: ignore[no-untyped-def]
            return [groups[int(index)][0]["prompt"] for index in prompts], None, {}

        def _generate_single_turn(self, prompt_ids, *_, **__):  # type: ignore[no-untyped-def]
            rows = [s for group in groups for s in group]
            assert prompt_ids == [s["prompt"] for s in rows]
            return [s["answer"] for s in rows], None

        def _prepare_inputs(self, generation_batch):  # type: ignore[no-untyped-def]
            started = time.perf_counter()
            inputs = super()._prepare_inputs(generation_batch)
            self.preparing_s += time.perf_counter() - started
            return inputs

        def training_step(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            if not self.started:
                self.started, self.preparing_s = time.perf_counter(), 0.0
            return super().training_step(*args, **kwargs)

        def log(self, *_, **__):  # type: ignore[no-untyped-def]
            pass

        def _maybe_log_save_evaluate(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            if self.started:  # the first call after the optimizer's step
                say(step_s=time.perf_counter() - self.started - self.preparing_s)
                self.started = 0.0
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    autocast = dtype == "float32" and build.has_bf16_products()
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=autocast, report_to="none", save_strategy="no",
        per_device_train_batch_size=PEER_BATCH, gradient_accumulation_steps=len(sequences) // PEER_BATCH,
        num_generations=GROUP_SIZE, max_completion_length=ANSWER_TOKENS[1], temperature=1.0, beta=0.0,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_steps=steps, gradient_checkpointing=False,
        dataloader_pin_memory=False, disable_tqdm=True, logging_strategy="no", shuffle_dataset=False,
    )  # fmt: skip
    trainer = Fixed(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=weights),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=lambda completion_ids, **_: [reward_of[tuple(ids)] for ids in completion_ids],
        args=config, train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(groups))]),
    )  # fmt: skip
    trainer.train()
    say_peak()


def layer_shapes(model: str) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int]]:
    """(outputs, inputs) of every product of all layers, of the head; then layers and width of all heads together."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(model)
    wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    hidden, inner = c.hidden_size, c.intermediate_size
    one = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide)]
    one += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return one * c.num_hidden_layers, (c.vocab_size, hidden), (c.num_hidden_layers, wide)


def useful_flops(model: str, num_nodes: int, num_rows: int, num_pairs: int) -> float:
    """Of forward and backward: 6 per weight and token, 6 per head weight and predicting row, and 12 per channel of
    attention and pair of tokens that see each other."""
    products, head, (num_layers, wide) = layer_shapes(model)
    weights = sum(n * k for n, k in products)
    return 6.0 * weights * num_nodes + 6.0 * head[0] * head[1] * num_rows + 12.0 * num_layers * wide * num_pairs


def run_rate(model: str, num_rows: int, repeats: int = 5) -> None:
    """FLOP/s of PyTorch's products (bf16, or float32 where that is faster), forward and both backward ones, in the mix
    of shapes of one step."""
    import torch

    from arealite.kernels.functions import matmul

    products, (vocabulary, hidden), _ = layer_shapes(model)
    chunk = 1024  # rows of logits at one time
    cases = [(num_rows, n, k, products.count((n, k))) for n, k in dict.fromkeys(products)]
    cases.append((chunk, vocabulary, hidden, num_rows // chunk))
    seconds = flops = 0.0
    for rows, n, k, count in cases:
        x, w, y = (torch.randn(shape).bfloat16() for shape in ((rows, k), (n, k), (rows, n)))
        for run in (lambda: matmul(x, w.t()), lambda: matmul(y, w), lambda: matmul(y.t(), x)):  # noqa: B023
            taken = []
            for _ in range(repeats + 1):
                started = time.perf_counter()
                run()
                taken.append(time.perf_counter() - started)
            seconds += min(taken) * count
            flops += 2.0 * rows * n * k * count
    say(flops_per_s=flops / seconds)


def trainer_env(model: str) -> dict[str, str]:
    """What the launcher gives a trainer that has all cores of this machine while it trains."""
    from arealite.api.cli_args import GRPOConfig
    from arealite.launcher.machine import Machine
    from arealite.launcher.plan import make_plan

    config = GRPOConfig(allocation_mode="native:d1|fsdp:d1")
    plan = make_plan(config, [Machine.local(config.cluster)], model, ["script.py"])
    return {**os.environ, **plan.trainers[0].env, "MASTER_PORT": "0"}


def peer_env() -> dict[str, str]:
    """As `trainer_env` where it helps the peer; with our allocator settings it is no faster and takes more memory."""
    num_cores = len(os.sched_getaffinity(0))
    usual = {"OMP_NUM_THREADS": str(num_cores), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **usual}


def run_side(script: str, side: str, arguments: list[str], env: dict[str, str]) -> list[dict[str, Any]]:
    """The JSON lines of `script` in a process of its own."""
    command = [sys.executable, "-P", script, "--side", side, *arguments]
    print(f"{side}:", " ".join(command), flush=True)
    env = {**env, "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}
    out = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=3600).stdout
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def summarise(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of all steps but the first; whatever else the lines tell."""
    seconds = [line["step_s"] for line in lines if "step_s" in line][1:]
    figures = {key: value for line in lines for key, value in line.items()}
    return figures | {"step_s": sum(seconds) / len(seconds), "steps": seconds}


def compare(model: str, args: argparse.Namespace) -> None:
    common = ["--model", model, "--steps", str(args.steps), "--peer-dtype", args.peer_dtype]
    ours = summarise(run_side(__file__, "ours", common, trainer_env(model)))
    num_nodes, num_rows, num_pairs = (int(ours.pop(name)) for name in ("num_nodes", "num_rows", "num_pairs"))
    [rate] = run_side(__file__, "rate", ["--model", model, "--rows", str(num_nodes)], trainer_env(model))
    peer = summarise(run_side(__file__, "trl", common, peer_env()))
    reached = useful_flops(model, num_nodes, num_rows, num_pairs) / ours["step_s"]
    print(f"\n{'':22}{'AReaLite':>12}{'TRL':>12}")
    for key in ("step_s", "peak_gib"):
        print(f"{key:22}{ours[key]:12.2f}{peer[key]:12.2f}")
    print(f"{num_nodes} tokens computed, {num_rows} predicting; {reached / 1e12:.3f} TFLOP/s useful, products reach"
          f" {rate['flops_per_s'] / 1e12:.3f}")  # fmt: skip
    figures = {"benchmark": "train_step", "ratio": round(peer["step_s"] / ours["step_s"], 2)}
    figures |= {"mfu": round(reached / rate["flops_per_s"], 3), "ours": ours, "trl": peer}
    figures |= {"kernels": build.expectation(), "peer_dtype": args.peer_dtype}
    figures |= {"num_nodes": num_nodes, "flops_per_s": rate["flops_per_s"]}
    machine = f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print(json.dumps(figures | {"machine": machine}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("both", "ours", "trl", "rate"), default="both", help=argparse.SUPPRESS)
    parser.add_argument("--model", default=None, help="a Hugging Face folder; smollm2-135m if not given")
    parser.add_argument("--steps", type=int, default=8, help="steps of each side, the first is warm-up")
    parser.add_argument("--peer-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=4096, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from arealite.models.fetch import fetch

    model = args.model or str(fetch("smollm2-135m", None))
    if args.side == "ours":
        run_ours(model, make_sequences(model), GROUP_SIZE, args.steps)
    elif args.side == "trl":
        run_trl(model, make_sequences(model), args.steps, args.peer_dtype)
    elif args.side == "rate":
        run_rate(model, args.rows)
    else:
        compare(model, args)


if __name__ == "__main__":
    main()
