"""What the gateway adds to a call, and whether one slow agent holds up others.

python benchmarks/gateway.py [--model smollm2-135m] [--calls 200] [--sessions 1000]

Starts `arealite serve`, and a gateway in this process. First the same request goes through the gateway and to the
server, in turns; the client's own work counts as the gateway's. Then a tenth of the sessions, a third and all of them
ask at once for a stream: first without a slow one among them, then with one that does not read before the others have
ended. Memory is this process's, client included, while the sessions are open. Ends with one JSON line: milliseconds and
seconds at the median, and memory.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import threading
import time

import aiohttp
import psutil
from surroundings import surroundings
from transformers import AutoTokenizer

from arealite.api.cli_args import GatewayConfig, GenerationHyperparameters, InferenceEngineConfig
from arealite.api.types import GenerationRequest
from arealite.gateway.server import Gateway
from arealite.models.fetch import resolve_model
from arealite.rollout.client import RemoteNativeEngine

LIMIT_S = 540.0
USER = {"role": "user", "content": "Tell me about the sea."}


async def compared(engine, gateway, num_calls: int) -> dict[str, float]:
    """Seconds of `agenerate` and of a call over HTTP that samples as many tokens from as long a prompt."""
    direct, through = [], []
    async with aiohttp.ClientSession() as client:
        for i in range(num_calls):
            session = gateway.new_session(f"compared {i}")
            body = {"messages": [USER], "max_tokens": 1}
            headers = {"Authorization": f"Bearer {session.key}"}
            begun = time.perf_counter()
            async with client.post(f"{session.base_url}/v1/chat/completions", json=body, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            through.append(time.perf_counter() - begun)
            ids = session.turns[0].added_ids
            begun = time.perf_counter()
            await engine.agenerate(GenerationRequest(f"direct {i}", ids, 1))
            direct.append(time.perf_counter() - begun)
            session.finish()
    rest = slice(num_calls // 10, None)  # the first ones open connections
    direct_ms, through_ms = (1e3 * statistics.median(times[rest]) for times in (direct, through))
    return {"direct_ms": direct_ms, "through_ms": through_ms, "overhead_ms": through_ms - direct_ms}


async def streamed(url: str, key: str, is_slow: bool, released: asyncio.Event) -> float:
    """Seconds to the end of a stream; the slow one reads nothing until the others have ended."""
    body = {"messages": [USER], "max_tokens": 8, "stream": True}
    begun = time.perf_counter()
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LIMIT_S)) as client,
        client.post(f"{url}/v1/chat/completions", json=body, headers={"x-api-key": key}) as answer,
    ):
        assert answer.status == 200, await answer.text()
        if is_slow:
            await released.wait()
        text = await answer.text()
        assert "[DONE]" in text, text[-500:]
    return time.perf_counter() - begun


async def crowd(places: list[tuple[str, str]], has_slow: bool) -> dict[str, float]:
    released = asyncio.Event()
    slow = asyncio.create_task(streamed(*places[0], has_slow, released))
    others = await asyncio.gather(*(streamed(*place, False, released) for place in places[1:]))
    figures = {"median_s": statistics.median(others), "last_s": max(others)}
    if has_slow:
        figures = {f"{name}_beside_slow": value for name, value in figures.items()}
        figures["slow_was_waiting"] = not slow.done()
    released.set()
    await slow
    return figures


def crowds(engine, gateway, num_sessions: int) -> dict[str, float]:
    """So many sessions, twice."""
    before, opened, figures = psutil.Process().memory_info().rss, [], {"num_sessions": num_sessions}
    for has_slow in (False, True):
        names = [f"crowd {num_sessions} {has_slow} {i}" for i in range(num_sessions)]
        sessions = engine.loop.call(lambda names=names: [gateway.new_session(name) for name in names], "open")
        figures |= asyncio.run(crowd([(s.base_url, s.key) for s in sessions], has_slow))
        opened += sessions
    figures["kib_per_session"] = (psutil.Process().memory_info().rss - before) / 1024 / len(opened)
    engine.loop.call(lambda: [session.finish() for session in opened], "finish")
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="gateway.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=resolve_model, default="smollm2-135m", help="its name or folder")
    parser.add_argument("--calls", type=int, default=200, help="calls that are compared")
    parser.add_argument("--sessions", type=int, default=1000, help="sessions at once")
    args = parser.parse_args()
    command = [sys.executable, "-m", "arealite.cli", "serve", "--model", args.model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        watchdog = threading.Timer(LIMIT_S, server.kill)
        watchdog.start()
        try:
            address = re.search(r"http://(\S+)", server.stdout.readline())[1]
            engine = RemoteNativeEngine(InferenceEngineConfig(max_concurrent_rollouts=args.sessions))
            engine.initialize(addresses=[address])
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            limits = GatewayConfig(max_sessions=2 * args.sessions + 1)
            gateway = Gateway(engine, tokenizer, limits, GenerationHyperparameters(max_new_tokens=64))
            engine.loop.run(gateway.start(), "start", LIMIT_S)
            figures = engine.loop.run(compared(engine, gateway, args.calls), "calls", LIMIT_S)
            sizes = [max(2, args.sessions // part) for part in (10, 3, 1)]
            found = [crowds(engine, gateway, size) for size in sizes]
            engine.loop.run(gateway.close(), "close", LIMIT_S)
            engine.destroy()
        finally:
            watchdog.cancel()
            server.kill()
    figures = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps({"benchmark": "gateway", **surroundings(), **figures, "crowds": found}))


if __name__ == "__main__":
    main()
