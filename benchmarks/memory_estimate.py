"""Estimated against measured memory of a trainer rank: peak resident memory of real updates on this machine's CPU.

    python benchmarks/memory_estimate.py [CASE ...]

Each case starts the ranks of its allocation with the launcher's allocator settings, trains two steps on prompts of the
configuration's data set with random answers of full length, writes the weights out as for the servers, and reads the
peak that the kernel counted (the largest of the ranks). `arealite check` shows the same estimate. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config_file
from arealite.launcher.allocation import AllocationMode
from arealite.launcher.memory_estimate import trainer_parts
from arealite.launcher.plan import ALLOCATOR_ENV
from arealite.models.fetch import resolve_model
from arealite.models.rank_memory import ModelShape

QUICKSTART = "examples/arealite/quickstart.yaml"
LONGER = ["train_dataset.batch_size=4", "gconfig.max_new_tokens=128", "actor.max_tokens_per_mb=4096"]
CASES = {
    "quickstart": [],
    "float32": ["actor.dtype=float32"],
    "small micro-batches": ["actor.max_tokens_per_mb=512"],
    "longer answers": LONGER,
    "longer answers, 1024 tokens": [*LONGER, "actor.max_tokens_per_mb=1024"],
    "longer answers, checkpointing full": [*LONGER, "actor.gradient_checkpointing=full"],
    "longer answers, checkpointing selective": [*LONGER, "actor.gradient_checkpointing=selective"],
    "one long group": ["train_dataset.batch_size=1", "gconfig.n_samples=4", "gconfig.max_new_tokens=700",
                       "server.context_length=1024"],
    "no sharing of prompts": ["actor.share_prompts=false"],
    "adafactor": ["actor.optimizer.kind=adafactor"],
    "lora": ["actor.lora.rank=16"],
    "reference": ["ref.path=smollm2-135m", "actor.kl_weight=0.1"],
    "d2": ["allocation_mode=native:d1+fsdp:d2"],
    "p2": ["allocation_mode=native:d1+fsdp:p2"],
    "wide model": ["WIDE"],
    "wide model, t2": ["WIDE", "allocation_mode=native:d1+fsdp:t2"],
    "wide model, c2": ["WIDE", "allocation_mode=native:d1+fsdp:c2"],
}  # fmt: skip
LIMIT_S = 900.0


def wide_model(folder: Path) -> Path:
    """A random model whose embedding is small beside its layers, with heads that divide by two: 105 M parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=768, intermediate_size=3072, num_hidden_layers=7, num_attention_heads=12,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("smollm2-135m")).save_pretrained(folder)
    return folder


def train(overrides: list[str], folder: str) -> None:
    """One rank: prints its peak in bytes."""
    from transformers import AutoTokenizer

    from arealite.api.types import Batch
    from arealite.dataset.loader import load_tasks
    from arealite.engine.fsdp_engine import FSDPEngine
    from arealite.engine.ppo.actor import FSDPPPOActor
    from arealite.weights.link import WeightLink

    config = load_config_file(QUICKSTART, overrides, GRPOConfig)
    component = AllocationMode.parse(config.allocation_mode).train
    assert component is not None
    actor = FSDPPPOActor(config.actor, component.dims)
    actor.initialize()
    ref = None
    if config.ref is not None:
        ref = FSDPEngine(config.ref, trainable=False, dims=component.dims)
        ref.initialize()
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.actor.path))
    tasks = load_tasks(config.train_dataset, tokenizer, config.seed)[: config.train_dataset.batch_size]
    rng, rows, masks, groups = np.random.default_rng(0), [], [], []
    for group, task in enumerate(tasks):
        prompt = tokenizer.apply_chat_template(task.messages, add_generation_prompt=True)["input_ids"]
        for _ in range(config.gconfig.n_samples):
            rows.append(np.concatenate([prompt, rng.integers(0, len(tokenizer), config.gconfig.max_new_tokens)]))
            masks.append(np.arange(len(rows[-1])) >= len(prompt))
            groups.append(group)
    mask = np.concatenate(masks)
    batch = Batch(
        tokens=np.concatenate(rows).astype(np.int64), loss_mask=mask,
        logprobs=np.where(mask, -9, 0).astype(np.float32), versions=np.where(mask, 0, -1).astype(np.int32),
        cu_seqlens=np.cumsum([0, *map(len, rows)]), group_ids=np.asarray(groups), sample_ids=np.arange(len(rows)),
        rewards=rng.normal(size=len(rows)), truncated=np.ones(len(rows), bool), num_groups=len(tasks),
        task_ids=[str(g) for g in groups],
    )  # fmt: skip
    mine = batch.select(np.flatnonzero(batch.group_ids % component.dims.d == actor.mesh.share))
    link = WeightLink("shm", Path(folder))
    for version in range(3):
        link.publish(actor.named_full_tensors(device=link.device), version, writer=actor.collective.rank == 0)
        if version:
            step = replace(mine)
            if ref is not None:
                step.ref_logp = ref.compute_logp(step)
            actor.compute_advantages(step)
            actor.grpo_update(step)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)
    actor.collective.barrier("end")
    link.close()
    os._exit(0)


def measure(overrides: list[str], world_size: int, folder: str) -> int:
    """The largest peak of the ranks, in bytes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ranks = []
    try:
        for rank in range(world_size):
            env = {**os.environ, **ALLOCATOR_ENV, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, __file__, "--rank", folder, *overrides]
            ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        outputs = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
        return max(json.loads(text.strip().splitlines()[-1])["peak"] for text in outputs)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main(names: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or CASES:
            overrides = list(CASES[name])
            if "WIDE" in overrides:
                overrides[overrides.index("WIDE")] = f"actor.path={wide_model(Path(folder) / 'wide')}"
            config = load_config_file(QUICKSTART, overrides, GRPOConfig)
            component = AllocationMode.parse(config.allocation_mode).train
            shape = ModelShape.read(resolve_model(config.actor.path))
            ref = None if config.ref is None else ModelShape.read(resolve_model(config.ref.path))
            assert component is not None and shape is not None
            parts = trainer_parts(config, shape, component.engine_dims, ref)
            estimate = sum(part.num_bytes for part in parts)
            measured = measure(overrides, component.world_size, folder)
            found[name] = round(estimate / measured, 3)
            print(
                f"{name:<40} {estimate / 2**30:6.2f} GiB estimated {measured / 2**30:6.2f} measured {found[name]:6.2f}"
            )
            print("    " + ", ".join(f"{part.name} {part.num_bytes / 2**30:.2f}" for part in parts), flush=True)
    worst = max(found.values(), key=lambda ratio: abs(np.log(ratio)))
    print(json.dumps({"benchmark": "memory_estimate", "estimate_over_measured": found, "worst": worst}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        train(sys.argv[3:], sys.argv[2])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("case", nargs="*", metavar="CASE", help=f"default: all, which are {'; '.join(CASES)}")
        cases = parser.parse_args().case
        if unknown := [case for case in cases if case not in CASES]:
            parser.error(f"there is no case {unknown[0]!r}; there are {'; '.join(CASES)}")
        main(cases)
