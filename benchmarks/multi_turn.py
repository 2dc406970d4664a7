"""Conversations against single turns on a built-in server, one very long conversation, and many at once.

    python benchmarks/multi_turn.py [--sessions 32] [--turns 8] [--rounds 3] [--long-turns 300] [--burst 1000]
        [--model smollm2-135m]

turns: so many sessions at a time, each of 8 turns (24 tokens asked, 32 sampled), and three kinds of single turns,
alternating; tokens sampled per second, and per second of the server's CPU time, each as the median ratio over rounds.

    alike   the honest comparison: as many requests, one after the other in each of the 32 places, that sample as many
            tokens behind as many others, of which as many are new. What comes before those is one text that all have in
            common and that is computed beforehand, where a conversation has its own history
    whole   all that a session asks as one prompt, and all that it samples as one answer: the same tokens without
            turns, but sampled behind longer contexts (320 tokens in the mean, not 236)
    short   as `alike` without anything before: contexts of 40 tokens in the mean. What is attended to costs time too

in_flight: the share of the time in which a session has a request at the server; the rest is the client's.
long: one session of 300 turns; prompt tokens that were computed per token that it has, and seconds of early and late
turns. burst: 1,000 sessions of two turns begin at once, one of which pauses for 10 s between its turns: when the others
are done. In bf16 on this machine's cores. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from typing import Any

import psutil
from serving import ServerProcess, servers
from surroundings import surroundings

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.types import GenerationRequest
from arealite.models.fetch import resolve_model
from arealite.rollout.client import RemoteNativeEngine

NUM_ASKED, NUM_SAMPLED = 24, 32
LONG_ASKED, LONG_SAMPLED = 4, 2  # 300 turns of them fit a context of 2,048
SLOW_S = 10.0


async def ask(engine: RemoteNativeEngine, name: str, group: str, tokens: list[int], num: int) -> list[int]:
    request = GenerationRequest(name, tokens, num, ignore_eos=True, group_id=group)
    return (await engine.agenerate(request)).token_ids


def words(name: str, num: int) -> list[int]:
    """So many tokens that nobody else has."""
    rng = random.Random(name)
    return [rng.randrange(1000, 40000) for _ in range(num)]


async def converse(
    engine: RemoteNativeEngine, name: str, num_turns: int, asked: int, sampled: int, pause_s: float = 0.0
) -> list[float]:
    """One session: each turn's prompt is all tokens so far and some more. Returns the seconds of each turn."""
    tokens, took = list[int](), []
    for turn in range(num_turns):
        tokens += words(f"{name}.{turn}", asked)
        began = time.monotonic()
        tokens = [*tokens, *await ask(engine, f"{name}.{turn}", name, tokens, sampled)]
        took.append(time.monotonic() - began)
        await asyncio.sleep(pause_s)
    return took


async def single(engine: RemoteNativeEngine, name: str, prompts: list[list[int]], sampled: int) -> list[float]:
    """Requests one after the other that have nothing to do with each other. Returns the seconds of each."""
    took = []
    for i, prompt in enumerate(prompts):
        began = time.monotonic()
        await ask(engine, f"{name}.{i}", "", prompt, sampled)
        took.append(time.monotonic() - began)
    return took


def all_of(engine: RemoteNativeEngine, *sessions: Any) -> tuple[float, list[list[float]]]:
    """Seconds until all have ended, and those of each session's turns."""
    began = time.monotonic()
    took = engine.loop.run_all(sessions, "benchmark")
    return time.monotonic() - began, took


def measure_turns(
    engine: RemoteNativeEngine, server: ServerProcess, num_sessions: int, num_turns: int, num_rounds: int
) -> dict[str, Any]:
    step, places = NUM_ASKED + NUM_SAMPLED, range(num_sessions)

    def sessions(kind: str, name: str) -> list[Any]:
        if kind == "multi":
            return [converse(engine, f"{name}.{i}", num_turns, NUM_ASKED, NUM_SAMPLED) for i in places]
        if kind == "whole":
            asked = num_turns * NUM_ASKED
            return [
                single(engine, f"{name}.{i}", [words(f"{name}.{i}", asked)], num_turns * NUM_SAMPLED) for i in places
            ]
        before = words(name, (num_turns - 1) * step) if kind == "alike" else []
        lengths = range(step, len(before) + 1, step)  # one by one: a page is found by the whole of what it holds
        all_of(engine, single(engine, f"{name}.before", [before[:length] for length in lengths], 1))
        prompts = [
            [before[: turn * step] + words(f"{name}.{i}.{turn}", NUM_ASKED) for turn in range(num_turns)]
            for i in places
        ]
        return [single(engine, f"{name}.{i}", prompts[i], NUM_SAMPLED) for i in places]

    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in ("multi", "alike", "whole", "short")}
    process, num_tokens = psutil.Process(server.process.pid), num_sessions * num_turns * NUM_SAMPLED
    for k in range(num_rounds):
        for kind, runs in found.items():
            work, cpu, own_cpu = sessions(kind, f"{kind}{k}"), process.cpu_times(), time.process_time()
            seconds, took = all_of(engine, *work)
            cpu_s = sum(process.cpu_times()[:2]) - sum(cpu[:2])
            runs.append(
                {
                    "tokens_per_s": num_tokens / seconds,
                    "tokens_per_server_cpu_s": num_tokens / cpu_s,
                    "client_cpu_ms_per_request": 1e3 * (time.process_time() - own_cpu) / sum(map(len, took)),
                    "in_flight": sum(map(sum, took)) / (seconds * num_sessions),
                }
            )
            print(f"round {k}: {kind} {runs[-1]}", flush=True)
    figures: dict[str, Any] = {
        kind: {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
        for kind, runs in found.items()
    }
    for place, name in (("ratio", "tokens_per_s"), ("ratio_by_server_cpu", "tokens_per_server_cpu_s")):
        for kind, runs in found.items():
            if kind != "multi":
                pairs = zip(found["multi"], runs, strict=True)
                figures[f"{place}_to_{kind}"] = round(statistics.median(a[name] / b[name] for a, b in pairs), 3)
    return figures


def measure_long(engine: RemoteNativeEngine, server: ServerProcess, num_turns: int) -> dict[str, float]:
    before = server.state()["num_prefill_tokens"]
    _, [took] = all_of(engine, converse(engine, "long", num_turns, LONG_ASKED, LONG_SAMPLED))
    computed, part = server.state()["num_prefill_tokens"] - before, max(1, num_turns // 6)
    return {
        "turns": num_turns,
        "prompt_tokens_computed_per_token": round(computed / (num_turns * (LONG_ASKED + LONG_SAMPLED)), 3),
        "early_turn_ms": round(1e3 * statistics.median(took[:part])),
        "late_turn_ms": round(1e3 * statistics.median(took[-part:])),
    }  # fmt: skip


def measure_burst(engine: RemoteNativeEngine, server: ServerProcess, num_sessions: int) -> dict[str, float]:
    before, ends = server.state()["num_prefill_tokens"], []

    async def one(i: int) -> list[float]:
        took = await converse(engine, f"b{i}", 2, 16, 4, pause_s=SLOW_S if i == 0 else 0.0)
        ends.append((time.monotonic(), i))
        return took

    rss_mb, began = server.rss_mb(), time.monotonic()
    all_of(engine, *map(one, range(num_sessions)))
    computed = server.state()["num_prefill_tokens"] - before
    others = [at - began for at, i in ends if i != 0]
    return {
        "sessions": num_sessions, "others_done_s": round(max(others), 1),
        "median_done_s": round(statistics.median(others), 1),
        "slow_done_s": round(next(at for at, i in ends if i == 0) - began, 1),
        "prompt_tokens_computed_per_token": round(computed / (num_sessions * 2 * (16 + 4)), 3),
        "server_grew_mb": round(server.rss_mb() - rss_mb, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sessions", 32), ("turns", 8), ("rounds", 3), ("long-turns", 300), ("burst", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    model, cores = resolve_model(args.model), sorted(os.sched_getaffinity(0))
    engine = RemoteNativeEngine(InferenceEngineConfig(consumer_batch_size=1))
    with servers(model, ("native", cores)) as [server]:
        engine.initialize(addresses=[server.url])
        try:
            figures = {
                "benchmark": "multi_turn", "model": args.model, "command": server.command, **surroundings(),
                "turns": measure_turns(engine, server, args.sessions, args.turns, args.rounds),
                "long": measure_long(engine, server, args.long_turns),
                "burst": measure_burst(engine, server, args.burst),
            }  # fmt: skip
        finally:
            engine.destroy()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
