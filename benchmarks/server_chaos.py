"""Three built-in servers under load: one killed every few seconds and started again, one frozen for a while.

    python benchmarks/server_chaos.py [--model DIR] [--seconds S] [--kill-every-s S] [--frozen-s S]

Greedy requests in fp32 go to one server that is left alone, and then, over and over for `--seconds`, to three that are
not: one is stopped (SIGSTOP) and continued later, and at random one is killed (kill -9) and started again under its old
address, without a pause in the load. Compared are the token ids of every request, all of them, and their logprobs (the
largest difference; other batches round otherwise). Without --model: a random two-layer Llama. Loopback only. Ends with
one JSON line; exit code 1 when a request was lost, answered twice, or answered with other tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.types import Completion, GenerationRequest
from arealite.rollout.client import RemoteNativeEngine

START_LIMIT_S = 120.0
NUM_SERVERS = 3
GROUP_SIZE = 4
TOP_TOKEN = 200  # prompts are of ids below: every vocabulary has them


def random_model(folder: str) -> str:
    """A Llama of two layers without a tokenizer; its weights are wide, so that the likeliest token is clear."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Servers:
    """Processes of `arealite serve` on fixed ports. `start` of a dead one takes its old address."""

    def __init__(self, model: str, count: int) -> None:
        self.model = model
        self.ports = [0] * count
        self.processes: list[subprocess.Popen[str] | None] = [None] * count
        self.num_ready = 0
        for i in range(count):
            self.start(i)

    def start(self, i: int) -> None:
        """Returns when it listens."""
        command = [sys.executable, "-m", "arealite.inference.serve", "--model", self.model, "--dtype", "float32"]
        command += ["--port", str(self.ports[i]), "--max-running-requests", "32", "--context-length", "1024"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.processes[i] = process
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_LIMIT_S)
        line = process.stdout.readline() if ready else ""
        while line and "listening on" not in line:
            line = process.stdout.readline()
        if not line:
            raise SystemExit(f"server {i} did not start within {START_LIMIT_S:.0f} s")
        self.ports[i] = int(line.strip().rpartition(":")[2])

    def signal(self, i: int, number: int) -> None:
        process = self.processes[i]
        if process is not None and process.poll() is None:
            process.send_signal(number)

    def kill(self, i: int) -> None:
        process = self.processes[i]
        if process is not None:
            process.kill()
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()

    def close(self) -> None:
        for i in range(len(self.processes)):
            self.kill(i)


class Load:
    """Sends `requests` through a client, so many at a time, and notes every answer."""

    def __init__(self, addresses: list[str], concurrency: int) -> None:
        config = InferenceEngineConfig(request_retries=20, server_silence_s=2.0, setup_timeout_s=START_LIMIT_S)
        self.concurrency = concurrency
        self.sent: list[str] = []
        self.answers: list[tuple[str, Completion]] = []
        self.engine = RemoteNativeEngine(config)
        self.engine.initialize(addresses=addresses)

    async def _all(self, requests: Iterator[GenerationRequest]) -> None:
        async def worker() -> None:
            for request in requests:
                self.sent.append(request.rid)
                self.answers.append((request.rid, await self.engine.agenerate(request)))

        await asyncio.gather(*(worker() for _ in range(self.concurrency)))

    def run(self, requests: Iterator[GenerationRequest], limit_s: float) -> None:
        self.engine._live.run(self._all(requests), "server_chaos", limit_s)


def rounds(requests: list[GenerationRequest], seconds: float) -> Iterator[GenerationRequest]:
    """The requests again and again, under names of their own, until the time is over."""
    end = time.monotonic() + seconds
    for number in itertools.count():
        for request in requests:
            if time.monotonic() > end:
                return
            yield replace(request, rid=f"{number}/{request.rid}", group_id=f"{number}/{request.group_id}")


def make_requests(count: int, num_tokens: int, choose: random.Random) -> list[GenerationRequest]:
    """Groups that share a prompt of 20 to 60 tokens; lengths from a quarter of `num_tokens` up to it."""
    requests = []
    for group in range(-(-count // GROUP_SIZE)):
        prompt = [choose.randrange(3, TOP_TOKEN) for _ in range(choose.randint(20, 60))]
        for member in range(GROUP_SIZE):
            length = choose.randint(num_tokens // 4, num_tokens)
            name = f"g{group}"
            requests.append(
                GenerationRequest(f"{name}.{member}", prompt, length, temperature=0.0, ignore_eos=True, group_id=name)
            )
    return requests[:count]


def disturb(servers: Servers, done: threading.Event, args: argparse.Namespace, log: Counter[str]) -> None:
    """Freeze a server, kill others meanwhile and after, until `done`. One is always left alone.

    Consumes: time. Produces: faults. Waits for: the next one, at most kill_every_s. Unblocked by: `done`.
    """
    choose = random.Random(args.seed)
    frozen = choose.randrange(NUM_SERVERS)
    servers.signal(frozen, signal.SIGSTOP)
    log["frozen"] += 1
    print(f"--- froze server {frozen}", flush=True)
    wakes = time.monotonic() + args.frozen_s
    starts: dict[int, threading.Thread] = {}
    while not done.wait(args.kill_every_s):
        if time.monotonic() >= wakes and frozen >= 0:
            servers.signal(frozen, signal.SIGCONT)
            print(f"--- server {frozen} goes on", flush=True)
            frozen = -1
        well = [i for i in range(NUM_SERVERS) if i != frozen and not (i in starts and starts[i].is_alive())]
        if len(well) < 2:
            continue
        victim = choose.choice(well)
        servers.kill(victim)
        log["killed"] += 1
        print(f"--- killed server {victim}", flush=True)
        starts[victim] = threading.Thread(target=servers.start, args=(victim,))
        starts[victim].start()
    servers.signal(frozen, signal.SIGCONT)
    for start in starts.values():
        start.join(START_LIMIT_S)


def undisturbed(model: str, requests: list[GenerationRequest], args: argparse.Namespace) -> dict[str, Completion]:
    servers = Servers(model, 1)
    try:
        load = Load([f"127.0.0.1:{servers.ports[0]}"], args.concurrency)
        load.run(iter(requests), args.limit_s)
        load.engine.destroy()
        return dict(load.answers)
    finally:
        servers.close()


def compare(load: Load, expected: dict[str, Completion]) -> dict[str, Any]:
    times = Counter(rid for rid, _ in load.answers)
    pairs = [(done, expected[rid.partition("/")[2]]) for rid, done in load.answers]
    equal = [(done, wanted) for done, wanted in pairs if done.token_ids == wanted.token_ids]
    gaps = [abs(x - y) for done, wanted in equal for x, y in zip(done.logprobs, wanted.logprobs, strict=True)]
    return {
        "requests": len(load.sent),
        "answered_once": sum(times[rid] == 1 for rid in load.sent),
        "lost": sum(times[rid] == 0 for rid in load.sent),
        "answered_twice": sum(times[rid] > 1 for rid in load.sent),
        "greedy_equal": len(equal),
        "tokens_compared": sum(len(done.token_ids) for done, _ in pairs),
        "max_logprob_gap": max(gaps, default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder; default: a random Llama")
    parser.add_argument("--seconds", type=float, default=60.0, help="that new requests are sent for")
    parser.add_argument("--requests", type=int, default=64, help="different ones")
    parser.add_argument("--tokens", type=int, default=256, help="of the longest answer")
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--kill-every-s", type=float, default=4.0)
    parser.add_argument("--frozen-s", type=float, default=10.0)
    parser.add_argument("--limit-s", type=float, default=300.0, help="of each of the two runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    requests = make_requests(args.requests, args.tokens, random.Random(args.seed))
    log: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or random_model(str(Path(folder) / "model"))
        expected = undisturbed(model, requests, args)
        servers = Servers(model, NUM_SERVERS)
        done = threading.Event()
        trouble = threading.Thread(target=disturb, args=(servers, done, args, log))
        try:
            load = Load([f"127.0.0.1:{port}" for port in servers.ports], args.concurrency)
            started = time.monotonic()
            trouble.start()
            load.run(rounds(requests, args.seconds), args.seconds + args.limit_s)
            wall_s = time.monotonic() - started
            stats = load.engine.stats()
            load.engine.destroy()
        finally:
            done.set()
            trouble.join(START_LIMIT_S)
            servers.close()
    told = ("num_server_failures", "num_requests_moved", "num_request_failures", "num_servers_alive")
    figures = compare(load, expected) | log | {name: int(stats[name]) for name in told}
    print(json.dumps({"benchmark": "server_chaos", **figures, "wall_s": round(wall_s, 1)}))
    sys.exit(0 if figures["answered_once"] == figures["greedy_equal"] == figures["requests"] else 1)


if __name__ == "__main__":
    main()
