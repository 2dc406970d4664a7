"""How long a weight update pauses generation, and how fast it is, by every way, beside a plain copy of the same bytes.

    python benchmarks/weight_update.py [--model DIR] [--links shm,distributed,disk] [--updates 3] [--servers 4]

Native servers (`arealite serve`, bf16) under load, and this process as the trainer. "paused" is the time of the swap
(it holds the end of the step that runs, in which tokens are still made); "whole" runs from the first byte written to
the verified end.
Prints one line per link and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.types import GenerationRequest
from arealite.models.fetch import resolve_model
from arealite.rollout.client import RemoteNativeEngine
from arealite.weights.link import WeightLink, verify

LINKS = ("shm", "distributed", "disk")
NUM_REQUESTS = 16
START_LIMIT_S = 300.0


@contextmanager
def server(model: str) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "arealite.inference.serve", "--model", model, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and "listening on" not in line:
            line = process.stdout.readline()
        yield line.strip().rpartition("//")[2]
    finally:
        process.terminate()
        process.wait(60)


def memcpy_s(tensors: dict[str, torch.Tensor]) -> float:
    """Seconds of one plain copy of all tensors into memory that has been touched."""
    places = {name: tensor.clone() for name, tensor in tensors.items()}
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Load:
    """Requests that keep the server busy."""

    def __init__(self, engine: RemoteNativeEngine) -> None:
        self._engine = engine
        self._is_over = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()

    def _run(self) -> None:
        live: Any = self._engine._live

        async def one(slot: int) -> None:
            number = 0
            while not self._is_over:
                number += 1
                request = GenerationRequest(f"load-{slot}-{number}", [1 + slot] * 40, 64, ignore_eos=True)
                await self._engine.agenerate(request)

        async def every() -> None:
            await asyncio.gather(*(one(slot) for slot in range(NUM_REQUESTS)))

        live.run(every(), "load", 3600.0)


def watch_swaps(engine: RemoteNativeEngine, swaps: list[float]) -> None:
    """Note how long each swap takes, from the client's call to the server's answer."""
    fleet: Any = engine._live.fleet
    ask = fleet.ask

    async def timed(server: Any, call: Any, limit_s: float | None = None) -> Any:
        start = time.perf_counter()
        answer = await ask(server, call, limit_s)
        if call.path == "/end_weight_update":
            swaps.append(time.perf_counter() - start)
        return answer

    fleet.ask = timed


def measure(
    kind: str, engine: RemoteNativeEngine, model: Any, num_updates: int, first: int, folder: str
) -> dict[str, float]:
    link, pauses, wholes = WeightLink(kind, Path(folder)), [], []
    watch_swaps(engine, pauses)
    tensors = dict(model.named_parameters())
    previous = None
    for version in range(first, first + num_updates + 1):  # the first is not counted: it makes memory and the group
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.mul_(1.01)
        start = time.perf_counter()
        engine.prepare_update()
        meta = link.publish(tensors.items(), version)
        assert meta is not None
        verify(meta, engine.update_weights(meta, link), previous, must_differ=True)
        wholes.append(time.perf_counter() - start)
        previous = meta
    link.close()
    return {
        "paused_s": statistics.median(pauses[1:]),
        "paused_max_s": max(pauses[1:]),
        "whole_s": statistics.median(wholes[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a folder, or a name for `arealite fetch`")
    parser.add_argument("--links", default=",".join(LINKS))
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--idle", action="store_true", help="no requests meanwhile")
    args = parser.parse_args()
    args.model = resolve_model(args.model)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    copy_s = memcpy_s(tensors)
    found: dict[str, Any] = {"num_bytes": num_bytes, "memcpy_s": copy_s, "memcpy_gb_per_s": num_bytes / copy_s / 1e9}
    print(f"{num_bytes / 1e6:.0f} MB; plain copy {copy_s:.3f} s, {found['memcpy_gb_per_s']:.2f} GB/s", flush=True)
    for index, kind in enumerate(args.links.split(",")):
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            addresses = [stack.enter_context(server(args.model)) for _ in range(args.servers)]
            engine = RemoteNativeEngine(InferenceEngineConfig(setup_timeout_s=START_LIMIT_S))
            engine.initialize(addresses=addresses)
            if args.idle:
                row = measure(kind, engine, model, args.updates, 100 * index + 1, folder)
            else:
                with Load(engine):
                    row = measure(kind, engine, model, args.updates, 100 * index + 1, folder)
            engine.destroy()
        row["gb_per_s"] = num_bytes / row["whole_s"] / 1e9
        row["paused_over_memcpy"] = row["paused_s"] / copy_s
        found[kind] = row
        print(
            f"{kind:12} paused {row['paused_s']:.3f} s ({row['paused_over_memcpy']:.1f} plain copies; longest"
            f" {row['paused_max_s']:.3f} s), whole {row['whole_s']:.3f} s, {row['gb_per_s']:.2f} GB/s",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
