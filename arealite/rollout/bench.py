"""`arealite bench serve`: throughput and latency of running inference servers, in a closed loop. Called by cli.py.

Requests go through the wire formats that rollouts use, so what is measured is what a training run gets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from arealite.api.errors import ArealiteError, ConfigError
from arealite.api.types import GenerationRequest
from arealite.rollout.backends.protocol import Backend
from arealite.rollout.backends.sglang import NativeBackend, SGLangBackend
from arealite.rollout.backends.vllm import VLLMBackend
from arealite.rollout.router import Address, Transport, addresses_of

BACKENDS: dict[str, type[Backend]] = {"native": NativeBackend, "sglang": SGLangBackend, "vllm": VLLMBackend}
FIRST_TOKEN_ID = 100  # below are special tokens in most vocabularies
PERCENTILES = (50, 90, 99)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="arealite bench serve",
        description="Measure inference servers: N clients, each sending its next request when its last is answered.",
        epilog="example: arealite bench serve --address 127.0.0.1:30000 --concurrency 64 --output-tokens 16-512",
    )
    add = parser.add_argument
    add("--address", action="append", required=True, metavar="HOST:PORT", help="a server; may be given several times")
    add("--backend", default="native", choices=sorted(BACKENDS), help="the servers' kind")
    add("--concurrency", type=int, default=64, help="requests in flight")
    add("--num-requests", type=int, help="requests measured; default: 4 per client")
    add("--num-warmup", type=int, help="requests sent before; default: one per client")
    add("--prompt-tokens", default="40", help="a number, a uniform range such as 16-512, or a JSONL file")
    add("--output-tokens", default="64", help="the same; a file's lines have prompt_tokens and output_tokens")
    add("--group-size", type=int, default=1, help="requests that share one prompt, sent one after the other")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--vocab-size", type=int, default=30000, help="prompts are random token ids below it")
    add("--stop-at-eos", action="store_true", help="answers may end early; else each has its full length")
    add("--seed", type=int, default=0, help="of lengths and prompts")
    add("--limit-s", type=float, default=3600.0, help="longest time for one request")
    add("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)
    for name in ("concurrency", "num_requests", "group_size"):
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    if args.vocab_size <= FIRST_TOKEN_ID:
        parser.error(f"--vocab-size is {args.vocab_size}; expected more than {FIRST_TOKEN_ID}")
    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json is {args.json}; its folder does not exist")
    return args


def lengths(spec: str, key: str, rng: random.Random) -> Iterator[int]:
    """Endless lengths in tokens: of a number, a range LOW-HIGH, or `key` in the lines of a JSONL file.

    Raises:
        ConfigError: none of the three, a line without the key, or a length below 1.
    """
    low, dash, high = spec.partition("-")
    if low.isdigit() and (high.isdigit() or not dash):
        bounds = int(low), int(high or low)
        if not 1 <= bounds[0] <= bounds[1]:
            raise ConfigError(f"{key}: expected a number of at least 1 or a rising range, found {spec}")
        while True:
            yield rng.randint(*bounds)
    try:
        listed = [json.loads(line)[key] for line in Path(spec).read_text().splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{spec!r} is no number, no range such as 16-512, and no JSONL file with {key} in each line:"
            f" {type(error).__name__}: {error}"
        ) from error
    if not listed or not all(type(n) is int and n >= 1 for n in listed):
        raise ConfigError(f"{spec}: expected lines with {key} of at least 1")
    while True:
        yield from listed


def workload(args: argparse.Namespace, num: int, seed: int) -> list[GenerationRequest]:
    """`num` requests; the members of a group follow each other."""
    rng = random.Random(seed)
    prompt_lengths, output_lengths = (
        lengths(spec, key, rng)
        for spec, key in ((args.prompt_tokens, "prompt_tokens"), (args.output_tokens, "output_tokens"))
    )
    requests: list[GenerationRequest] = []
    while len(requests) < num:
        prompt = [rng.randrange(FIRST_TOKEN_ID, args.vocab_size) for _ in range(next(prompt_lengths))]
        group = uuid.UUID(int=rng.getrandbits(128)).hex
        requests += [
            GenerationRequest(
                rid=f"{group}.{member}",
                input_ids=prompt,
                max_new_tokens=next(output_lengths),
                temperature=args.temperature,
                ignore_eos=not args.stop_at_eos,
                group_id=group,
            )
            for member in range(args.group_size)
        ]
    return requests[:num]


async def closed_loop(
    args: argparse.Namespace, transport: Transport, requests: list[GenerationRequest]
) -> tuple[list[tuple[float, int, int]], list[str], float]:
    """Clients that share one list of requests; a group stays on the server that was least busy when it began.

    Returns, of each that was answered, how long it took and the tokens of its prompt and its answer; the messages of
    what failed; and the seconds from the first sending to the last answer.

    Consumes: the requests. Produces: timings. Waits for: each request's answer, at most `--limit-s`.
    Unblocked by: the server, or the limit.
    """
    backend, num_busy = BACKENDS[args.backend](), dict.fromkeys(addresses_of(args.address), 0)
    home: dict[str, Address] = {}
    timings: list[tuple[float, int, int]] = []
    errors: list[str] = []
    rest = iter(requests)

    async def client() -> None:
        for request in rest:
            server = home.setdefault(request.group_id, min(num_busy, key=num_busy.__getitem__))
            num_busy[server] += 1
            call, sent = backend.generate_call(request, request.rid, []), time.perf_counter()
            try:
                async with asyncio.timeout(args.limit_s):
                    answer = await transport.stream(server, call, lambda _: None)
                num_output = len(backend.parse_part(answer, server.id).token_ids)
                timings.append((time.perf_counter() - sent, len(request.input_ids), num_output))
            except TimeoutError:
                errors.append(f"{server.id} gave no answer within {args.limit_s:g} s")
            except ArealiteError as error:
                errors.append(str(error))
            finally:
                num_busy[server] -= 1

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(args.concurrency)))
    return timings, errors, time.perf_counter() - began


def figures(timings: list[tuple[float, int, int]], wall_s: float, num_failed: int) -> dict[str, Any]:
    """Totals, rates per second, and percentiles of latency (seconds) and of seconds per output token."""
    latency_s, num_prompt, num_output = np.reshape(timings, (-1, 3)).T
    report: dict[str, Any] = {
        "num_requests": len(timings),
        "num_failed": num_failed,
        "wall_s": wall_s,
        "num_prompt_tokens": int(num_prompt.sum()),
        "num_output_tokens": int(num_output.sum()),
        "output_tokens_per_s": num_output.sum() / wall_s,
        "total_tokens_per_s": (num_output + num_prompt).sum() / wall_s,
        "requests_per_s": len(timings) / wall_s,
    }
    some = num_output > 0
    for name, values in (("latency_s", latency_s), ("per_output_token_s", latency_s[some] / num_output[some])):
        for percent in PERCENTILES if len(values) else ():
            report[f"{name}_p{percent}"] = np.percentile(values, percent, method="higher")
    return {key: round(float(value), 6) if isinstance(value, float) else value for key, value in report.items()}


async def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The figures of one run, and the failures' messages."""
    num_warmup, transport = args.concurrency if args.num_warmup is None else args.num_warmup, Transport()
    try:
        # Whatever is wrong while it warms up shows again in what is measured.
        await closed_loop(args, transport, workload(args, num_warmup, args.seed + 1))
        requests = workload(args, args.num_requests or 4 * args.concurrency, args.seed)
        timings, errors, wall_s = await closed_loop(args, transport, requests)
    finally:
        await transport.close()
    return figures(timings, wall_s, len(errors)), errors


def main(argv: list[str]) -> int:
    """Prints a table and, as the last line, the figures as JSON. Returns 1 when a request failed, else 0."""
    args = parse_arguments(argv)
    found, errors = asyncio.run(measure(args))
    settings = ("backend", "concurrency", "prompt_tokens", "output_tokens", "group_size", "temperature")
    report = {**{name: vars(args)[name] for name in settings}, "num_servers": len(args.address), **found}
    width = max(map(len, report))
    print("\n".join(f"{name:{width}}  {value}" for name, value in report.items()))
    if errors:
        print(f"{len(errors)} requests failed; the first: {errors[0]}")
    line = json.dumps(report)
    print(line, flush=True)
    if args.json:
        Path(args.json).write_text(line + "\n")
    return 1 if errors else 0
