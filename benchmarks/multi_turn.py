"""Conversations against single turns on a built-in server, one very long conversation, and many at once.

    python benchmarks/multi_turn.py [--sessions 32] [--turns 8] [--long-turns 300] [--burst 1000]
        [--model smollm2-135m]

turns: tokens per second of so many sessions of 8 turns (24 tokens asked, 32 sampled), and of as many single turns,
alternating. long: one session of 300 turns; prompt tokens that were computed per token that it has, and seconds of
early and late turns. burst: 1,000 sessions of two turns begin at once, one of which pauses for 10 s between its turns:
when the others are done. In bf16 on this machine's cores. Ends with one JSON line.
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

from serving import ServerProcess, servers

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.types import GenerationRequest
from arealite.models.fetch import resolve_model
from arealite.rollout.client import RemoteNativeEngine

NUM_ASKED, NUM_SAMPLED = 24, 32
LONG_ASKED, LONG_SAMPLED = 4, 2  # 300 turns of them fit a context of 2,048
SLOW_S = 10.0


async def converse(
    engine: RemoteNativeEngine, name: str, num_turns: int, asked: int, sampled: int, pause_s: float = 0.0
) -> list[float]:
    """One session: each turn's prompt is all tokens so far and some more. Returns the seconds of each turn."""
    rng, tokens, took = random.Random(name), [], []
    for turn in range(num_turns):
        tokens += [rng.randrange(1000, 40000) for _ in range(asked)]
        began = time.monotonic()
        request = GenerationRequest(f"{name}.{turn}", tokens, sampled, ignore_eos=True, group_id=name)
        tokens = [*tokens, *(await engine.agenerate(request)).token_ids]
        took.append(time.monotonic() - began)
        await asyncio.sleep(pause_s)
    return took


def all_of(engine: RemoteNativeEngine, *sessions: Any) -> tuple[float, list[list[float]]]:
    """Seconds until all have ended, and those of each session's turns."""

    async def together() -> list[list[float]]:
        return await asyncio.gather(*sessions)

    began = time.monotonic()
    took = engine._live.run(together(), "benchmark")
    return time.monotonic() - began, took


def measure_turns(engine: RemoteNativeEngine, num_sessions: int, num_turns: int) -> dict[str, float]:
    rates: dict[str, list[float]] = {"multi": [], "single": []}
    for k in range(2):
        for kind in rates:
            # Single: as many at a time, one after the other without a common prefix.
            async def singles(i: int, k: int = k) -> list[float]:
                return [
                    (await converse(engine, f"s{k}.{i}.{turn}", 1, NUM_ASKED, NUM_SAMPLED))[0]
                    for turn in range(num_turns)
                ]

            async def turns(i: int, k: int = k) -> list[float]:
                return await converse(engine, f"m{k}.{i}", num_turns, NUM_ASKED, NUM_SAMPLED)

            seconds, _ = all_of(engine, *map(turns if kind == "multi" else singles, range(num_sessions)))
            rates[kind].append(num_sessions * num_turns * NUM_SAMPLED / seconds)
    multi, single = (statistics.median(rates[kind]) for kind in ("multi", "single"))
    return {
        "multi_tokens_per_s": round(multi, 1),
        "single_tokens_per_s": round(single, 1),
        "ratio": round(multi / single, 3),
    }


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
    for name, default in (("sessions", 32), ("turns", 8), ("long-turns", 300), ("burst", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    model, cores = resolve_model(args.model), sorted(os.sched_getaffinity(0))
    engine = RemoteNativeEngine(InferenceEngineConfig(consumer_batch_size=1))
    with servers(model, ("native", cores)) as [server]:
        engine.initialize(addresses=[server.url])
        try:
            figures = {
                "benchmark": "multi_turn", "model": args.model, "cores": len(cores),
                "turns": measure_turns(engine, args.sessions, args.turns),
                "long": measure_long(engine, server, args.long_turns),
                "burst": measure_burst(engine, server, args.burst),
            }  # fmt: skip
        finally:
            engine.destroy()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
