"""Memory of ranks without numbers against what a card measured, and a table of allocations that documents name.

    python benchmarks/dry_run.py [--measured benchmarks/results/nvidia-h200.jsonl]

Each case is a process of its own. The first ones are those of the card's update of a model of Qwen2.5-1.5B's shape
(benchmarks/gpu_train.py), 16,384 tokens in one micro-batch, by checkpointing; then the first and the last stage of each
allocation. A line of JSON for each, with what `arealite check` estimates beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from surroundings import surroundings

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config_file
from arealite.launcher.allocation import trainer_dims
from arealite.launcher.memory_estimate import trainer_parts

CONFIG = "examples/arealite/gsm8k_grpo.yaml"
ALLOCATIONS = {
    "Qwen/Qwen2.5-1.5B": ["native:d1|fsdp:d1", "native:d2+fsdp:d2", "sglang.d4p1t1+d2p2t1", "sglang:d4+fsdp:d4",
                          "sglang:d4+fsdp:d8", "sglang:d4+fsdp:d2c2"],
    "Qwen/Qwen2.5-7B": ["sglang:d4t2+fsdp:d8", "sglang:d4t2+fsdp:d4t2", "sglang:d4t2+fsdp:d4t2c2"],
    "Qwen/Qwen2.5-32B": ["sglang:d16t4+fsdp:d4p4t4", "sglang.d16t4p1+d4p4m4", "sglang:d8t8+fsdp:d8t8",
                         "sglang:d16t4+fsdp:d32p1t2"],
    "Qwen/Qwen3-30B-A3B": ["sglang:d2t4+fsdp:(attn:d4t2|ffn:d4e2)", "sglang:d2t4+fsdp:d2t2e2", "sglang:d2t4+fsdp:d8e8"],
}  # fmt: skip
OFFLOAD = "Qwen/Qwen2.5-7B", "sglang:d4t2+fsdp:d8"
LIMIT_S = 580.0


def run(overrides: list[str]) -> list[dict[str, Any]]:
    """The first and the last stage."""
    from arealite.models.public import folder_of
    from arealite.prove.dry_run import run_rank

    config = load_config_file(CONFIG, overrides, GRPOConfig)
    dims, found = trainer_dims(config), []
    with tempfile.TemporaryDirectory() as written:
        folder = folder_of(config.actor.path, Path(written))
        for stage in sorted({0, dims.p - 1}):
            ran, shape = run_rank(folder, config, "actor", config.actor, dims, stage * (dims.size // dims.p))
            parts = {name: round(num_bytes / 2**30, 2) for name, num_bytes in ran.parts.items()}
            found.append({"rank": ran.rank, "layers": ran.num_layers, "peak_gib": ran.peak / 2**30, "parts": parts})
    estimated = trainer_parts(config, shape, dims, None, on_gpu=True)
    own = sum(part.num_bytes for part in estimated if part.name not in ("program", "allocator")) / 2**30
    return [{**rank, "estimate_gib": own} for rank in found]


def told(overrides: list[str]) -> Any:
    command = [sys.executable, __file__, "--one", *overrides]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout)


def main(measured: Path) -> None:
    lengths = ["server.context_length=2049", "gconfig.max_new_tokens=1025", "actor.max_tokens_per_mb=16400"]
    one = [*lengths, "gconfig.n_samples=8", "train_dataset.batch_size=1", "actor.share_prompts=false"]
    one += ["actor.path=Qwen/Qwen2.5-1.5B"]
    one += ["train_dataset.path=none", "train_dataset.max_prompt_tokens=1024", "allocation_mode=native:d1|fsdp:d1"]
    lines = [json.loads(line) for line in measured.read_text().splitlines()]
    cases = [
        case for line in lines if line["check"] == "train" for case in line["results"] if case.get("sequences") == 8
    ]
    for case in {case["checkpointing"]: case for case in cases if case["case"].startswith("1.5B")}.values():
        [found] = told([*one, f"actor.gradient_checkpointing={case['checkpointing']}"])
        ratio = found["peak_gib"] / case["peak_gib"]
        print(
            json.dumps(
                {"case": case["case"], "measured_gib": case["peak_gib"], **found, "ratio": round(ratio, 3)}
                | surroundings()
            )
        )
    chosen = [(model, mode, "none") for model, modes in ALLOCATIONS.items() for mode in modes]
    for model, mode, offload in [*chosen, (*OFFLOAD, "optimizer"), (*OFFLOAD, "all")]:
        where = [f"actor.path={model}", f"allocation_mode={mode}", f"actor.offload={offload}"]
        ranks = told([*lengths, *where, "cluster.num_gpus_per_node=8"])
        peak = max(rank["peak_gib"] for rank in ranks)
        case = {"model": model, "allocation": mode, "offload": offload, "ranks": ranks}
        case["estimate_over_dry_run"] = round(ranks[0]["estimate_gib"] / peak, 3)
        print(json.dumps(case | surroundings()), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run(sys.argv[2:])))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        results = Path(__file__).parent / "results" / "nvidia-h200.jsonl"
        parser.add_argument("--measured", type=Path, default=results, help="a card's lines")
        main(parser.parse_args().measured)
