"""What a weight update costs: the adapter of LoRA training against all weights; trainer and server on one host.

    python benchmarks/lora_upload.py [--model DIR] [--rank 16] [--repeats 5]

Prints one JSON line per way: megabytes that travel, and seconds of `upload_weights` (the least of the repeats), from
gathering the weights to the servers' confirmed checksums. The server is idle.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from arealite.api.cli_args import InferenceEngineConfig, LoRAConfig, PPOActorConfig
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.models.fetch import resolve_model
from arealite.rollout.client import RemoteNativeEngine
from arealite.weights.link import WeightLink


def move(actor: FSDPPPOActor) -> None:
    """As an optimiser step would, so that the update has something to say."""
    with torch.no_grad():
        for parameter in actor.sharded.parameters.values():
            parameter.add_(0.01)
    actor.version += 1
    assert actor._upload is not None
    actor._upload.is_changed = True


def measure(model: str, address: str, kind: str, rank: int | None, repeats: int) -> dict[str, float | str]:
    lora = None if rank is None else LoRAConfig(rank=rank, alpha=2 * rank)
    actor = FSDPPPOActor(PPOActorConfig(path=model, lora=lora))
    actor.initialize()
    rollout = RemoteNativeEngine(InferenceEngineConfig())
    rollout.initialize(addresses=[address])
    with tempfile.TemporaryDirectory() as folder:
        actor.connect_engine(rollout, WeightLink(kind, folder))
        actor.upload_weights()
        seconds = []
        for _ in range(repeats):
            move(actor)
            started = time.perf_counter()
            actor.upload_weights()
            seconds.append(time.perf_counter() - started)
        megabytes = sum(tensor.nbytes for _, tensor in actor.named_full_tensors()) / 1e6
        rollout.destroy()
        actor.destroy()
    way = kind if rank is None else f"adapter of rank {rank}"
    return {"way": way, "megabytes": round(megabytes, 1), "upload_s": round(min(seconds), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = str(Path(resolve_model(args.model)))
    command = [sys.executable, "-m", "arealite.inference.serve", "--model", model, "--port", "0"]
    server = subprocess.Popen([*command, "--dtype", "bfloat16"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(line for line in server.stdout if "listening on" in line).strip().rpartition("//")[2]
        for kind, rank in (("disk", args.rank), ("shm", None), ("disk", None)):
            print(json.dumps(measure(model, address, kind, rank, args.repeats)), flush=True)
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
