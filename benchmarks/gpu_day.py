"""One card, all answers: is every part of this package right on a GPU, and how fast is it.

    python benchmarks/gpu_day.py [--phase a,b,c] [--only NAME,...] [--device cuda] [--model DIR] [--out DIR]

Each check is a process of its own with a time limit, in a group that is ended whole, so that no check can harm the next
one. Phase a asks what is right, on tiny random models; phase b asks the same of a pretrained model (`--model`, fetched
if not given), with the quickstart; phase c asks how fast. A check is left out where one that it `needs` has failed.
One JSON line per check goes to OUT/gpu_day.jsonl at once; a table and one JSON line come last. With `--device cpu` all
of it runs on a machine without a card.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
Numbers = dict[str, Any]
VOCABULARY = 512
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
FLOAT32, BFLOAT16 = 1e-4, 0.02  # mean differences of logprobs allowed


def environment(args: argparse.Namespace) -> Numbers:
    """Versions, and the rates that everything else is held against."""
    import torch
    import transformers

    found: Numbers = {"python": platform.python_version(), "torch": torch.__version__, "cpu": _cpu()}
    found |= {"transformers": transformers.__version__, "cores": os.cpu_count()}
    if args.device == "cpu":
        return found
    import triton

    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True)
    found |= {
        "card": torch.cuda.get_device_name(),
        "driver": driver.stdout.decode().strip(),
        "triton": triton.__version__,
    }
    x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    found["copy_tb_per_s"] = 2 * x.nbytes / _seconds(lambda: y.copy_(x)) / 1e12
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found["matmul_tflops"] = 2 * 8192**3 / _seconds(lambda: a @ b) / 1e12
    for name, host in (("pageable", torch.empty(1 << 28)), ("pinned", torch.empty(1 << 28).pin_memory())):
        there = torch.empty_like(host, device="cuda")
        found[f"{name}_to_card_gb_per_s"] = host.nbytes / _seconds(lambda: there.copy_(host), 3) / 1e9  # noqa: B023
        found[f"{name}_from_card_gb_per_s"] = host.nbytes / _seconds(lambda: host.copy_(there), 3) / 1e9  # noqa: B023
    one = torch.ones(1, device="cuda")
    found["launch_us"] = _seconds(lambda: [one.add_(1) for _ in range(1000)]) * 1e3
    return found


def _tiny(folder: Path, family: str, **changes: Any) -> str:
    """A random model of `family`, heads of 64 wide, whose logprobs are far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 64, "num_key_value_heads": 2}
    where = {"max_position_embeddings": 2048, "vocab_size": VOCABULARY, "initializer_range": 0.06}
    config = AutoConfig.for_model(family, **{**sizes, **special, **where, **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
    return str(folder / family)


def _step(model: str, dtype: str, **changes: Any) -> Any:
    """A training step in this process, as prove.step.Step; the weights stay as they are."""
    from support.batches import actor_config, random_batch

    from arealite.engine.ppo.actor import FSDPPPOActor
    from arealite.prove.step import proof_config, take_step

    actor = FSDPPPOActor(proof_config(actor_config(model, **changes), dtype))
    actor.initialize()
    try:
        return take_step(actor, random_batch(6, 8, 40, 60, vocabulary=VOCABULARY))
    finally:
        actor.destroy()


def _references(folder: Path) -> None:
    """The step of each family in float32 on the CPU, in a process that sees no card."""
    import torch

    for family in FAMILIES:
        torch.save(_step(str(folder / family), "float32"), folder / f"{family}.pt")


def trainer(args: argparse.Namespace) -> Numbers:
    """A step of each family on the card, in both types and in every setting, against float32 on the CPU."""
    import numpy as np
    import torch

    found: Numbers = {"ok": True}
    settings: list[Numbers] = [{"gradient_checkpointing": kind} for kind in ("selective", "full")]
    settings += [{"share_prompts": False}, {"max_tokens_per_mb": 300}, {"offload": "optimizer"}, {"offload": "all"}]
    cases: list[tuple[str, str, Numbers]] = [(f, dtype, {}) for f in FAMILIES for dtype in ("float32", "bfloat16")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {family: _tiny(folder, family) for family in FAMILIES}
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, __file__, "--references", scratch], env=env, check=True, timeout=100)
        for family, dtype, changes in cases + [("llama", "bfloat16", each) for each in settings]:
            name = f"{family} {dtype} {' '.join(f'{k}={v}' for k, v in changes.items())}".strip()
            try:
                got = _step(models[family], dtype, **changes)
            except Exception:
                traceback.print_exc()
                found |= {name: "failed", "ok": False}
                continue
            wanted = torch.load(folder / f"{family}.pt", weights_only=False)
            norm = sum(float(g.double().square().sum()) for g in wanted.gradients.values()) ** 0.5
            apart = [got.gradients[n].double() - g.double() for n, g in wanted.gradients.items()]
            gradient = sum(float(x.square().sum()) for x in apart) ** 0.5 / norm
            logp = float(np.abs(got.logp - wanted.logp)[wanted.logp != 0].mean())
            limits = (FLOAT32, 1e-3) if dtype == "float32" else (BFLOAT16, 0.1)
            is_good = logp <= limits[0] and gradient <= limits[1]
            found[name] = {"logp": logp, "gradient": gradient, "loss": abs(got.loss - wanted.loss), "ok": is_good}
            found["ok"] &= is_good
            print(name, found[name], flush=True)
    return found


def server(args: argparse.Namespace) -> Numbers:
    """Logprobs of the served model in decode, of many requests at once, against its prefill and the trainer's."""
    import numpy as np
    import torch
    from support.batches import actor_config

    from arealite.engine.ppo.actor import FSDPPPOActor
    from arealite.inference.core.served_model import ServedModel

    found: Numbers = {"ok": True}
    with tempfile.TemporaryDirectory() as scratch:
        models = [args.model] if args.model else [_tiny(Path(scratch), family) for family in FAMILIES]
        for path, dtype in [(path, dtype) for path in models for dtype in ("float32", "bfloat16")]:
            served = ServedModel.load(path, getattr(torch, dtype), torch.device(args.device), None, False)
            batch, prefill = _answers(served)
            actor = FSDPPPOActor(actor_config(path, dtype=dtype))
            actor.initialize()
            trained = actor.compute_logp(batch)[batch.loss_mask]
            actor.destroy()
            decode = batch.logprobs[batch.loss_mask]
            apart = {"decode_prefill": decode[: len(prefill)] - prefill, "decode_trainer": decode - trained}
            means = {name: float(np.abs(x).mean()) for name, x in apart.items()}
            is_good = max(means.values()) <= (FLOAT32 if dtype == "float32" else BFLOAT16)
            found[f"{Path(path).name} {dtype}"] = means | {
                "worst": float(np.abs(decode - trained).max()),
                "ok": is_good,
            }
            found["ok"] &= is_good
            print(path, dtype, means, flush=True)
    return found


def _answers(served: Any) -> tuple[Any, Any]:
    """What a server samples for 32 prompts at once, as a Batch; and the logprobs of the first 8 answers by prefill."""
    import numpy as np
    from support.inference import LocalServer

    from arealite.api.types import Batch, Group, Task, Trajectory

    rng, length = np.random.default_rng(1), 40
    prompts = [rng.integers(3, VOCABULARY, n).tolist() for n in (1, 5, 16, 17, 33, 100, 300, 640)] * 4
    sampling = {"max_new_tokens": length, "temperature": 1.0, "ignore_eos": True}

    with LocalServer(served, 64, 1 << 15) as local:

        def ask(tokens: list[int], params: Numbers, start: int) -> Any:
            body = {"input_ids": tokens, "sampling_params": params, "return_logprob": True, "logprob_start_len": start}
            status, answer = local.post("/generate", body)
            assert status == 200, answer
            return answer["meta_info"]

        answers = list(local.pool.map(lambda prompt: ask(prompt, sampling, -1), prompts))
        sampled = [[(x[0], x[1]) for x in answer["output_token_logprobs"]] for answer in answers]
        rows = [[*prompt, *(token for _, token in pairs)] for prompt, pairs in zip(prompts, sampled, strict=True)]
        again = [ask(row, {"max_new_tokens": 0}, 0)["input_token_logprobs"][-length:] for row in rows[:8]]
    groups = []
    for i, (row, prompt, pairs) in enumerate(zip(rows, prompts, sampled, strict=True)):
        mask, versions = [at >= len(prompt) for at in range(len(row))], [-1] * len(prompt) + [0] * length
        logp = [0.0] * len(prompt) + [value for value, _ in pairs]
        groups.append(Group(Task(str(i)), i, [Trajectory(str(i), 0, row, mask, logp, versions, 0.0, "length")]))
    return Batch.pack(groups), np.asarray([x[0] for row in again for x in row])


def quickstart(args: argparse.Namespace) -> Numbers:
    """The quickstart as it is, its processes sharing the card: accuracy, mismatch, and where a step's time goes."""
    with tempfile.TemporaryDirectory() as scratch:
        mode = "native:d1|fsdp:d1" if args.device != "cpu" else "native:d1+fsdp:d1"
        path = ROOT / "examples/arealite/quickstart"
        command = [sys.executable, "-m", "arealite.cli", "run", f"{path}.py", "--config", f"{path}.yaml"]
        command += [f"allocation_mode={mode}", f"cluster.fileroot={scratch}", *args.overrides.split()]
        command += [f"actor.path={args.model}"] if args.model else []
        began = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, timeout=_limit_s("quickstart", args) - 10, check=False).returncode
        took = time.perf_counter() - began
        [run] = Path(scratch).glob("quickstart/*")
        summary = json.loads((run / "summary.json").read_text())
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step_s", "rollout_wait_s", "train_s", "sync_s")
    found = {"run_s": took} | {key: statistics.median(step[key] for step in steps) for key in keys}
    kept = ("accuracy_before", "accuracy_after", "mismatch_mean", "mismatch_max", "train_s", "time_shares")
    found |= {f"run {key}": summary[key] for key in kept}
    is_good = code == 0 and summary["mismatch_mean"] < BFLOAT16 and (summary["accuracy_after"] or 0) >= 0.9
    return {**found, "ok": is_good}


def _command(*words: str, hides_card: bool = False, ends_in_json: bool = False) -> Callable[..., Numbers]:
    def run(args: argparse.Namespace) -> Numbers:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} | (
            {"CUDA_VISIBLE_DEVICES": ""} if hides_card else {}
        )
        filled = [word.format(device=args.device, model=args.model or "smollm2-135m") for word in words]
        ran = subprocess.Popen([sys.executable, *filled], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        assert ran.stdout is not None
        last = ""
        for line in ran.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        code = ran.wait()
        is_good = code == 0 or (code == ALL_SKIPPED and args.device == "cpu")
        return {**(json.loads(last) if ends_in_json and code == 0 else {"last": last}), "ok": is_good}

    return run


CPU_TESTS = ("tests/test_kernels.py", "tests/test_training_kernels.py")
PROVE = ("-m", "arealite.cli", "prove", "--quick", "examples/arealite/quickstart.yaml")
ALL_SKIPPED = 5  # pytest's exit status where not even a file of tests could be read
PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Check:
    phase: str
    limit_s: float
    run: Callable[[argparse.Namespace], Numbers]
    needs: tuple[str, ...] = ()


CHECKS = {
    "environment": Check("a", 60, environment),
    "engine": Check("a", 150, _command(*PYTEST, "tests/test_gpu_training.py")),
    "kernels": Check("a", 150, _command(*PYTEST, "tests/test_gpu_kernels.py")),
    "trainer": Check("a", 240, trainer, ("engine",)),
    "server": Check("a", 150, server, ("engine",)),
    "cpu kernels": Check("a", 150, _command(*PYTEST, *CPU_TESTS, hides_card=True)),
    "quickstart": Check("b", 300, quickstart),
    "prove": Check("b", 200, _command(*PROVE, "actor.path={model}")),
    "decode": Check("c", 200, _command("benchmarks/gpu_decode.py", "--device", "{device}", ends_in_json=True)),
    "train": Check("c", 200, _command("benchmarks/gpu_train.py", "--device", "{device}", ends_in_json=True)),
}  # fmt: skip


def _seconds(call: Callable[[], Any], times: int = 10) -> float:
    """The median of `times` on the card."""
    import torch

    call()
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found)[times // 2]


def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    return " ".join([name, *(flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {flag}" in text)])


def _limit_s(name: str, args: argparse.Namespace) -> float:
    return CHECKS[name].limit_s * (4 if args.device == "cpu" else 1)


def _in_child(name: str, args: argparse.Namespace, folder: Path) -> Numbers:
    """Run one check in a process group of its own; its output goes to a file, the end of it here if it fails."""
    began = time.perf_counter()
    limit_s = _limit_s(name, args)
    result = folder / f"{name.replace(' ', '-')}.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--check", name, "--result", str(result)]
    log = folder / f"{name.replace(' ', '-')}.log"
    with open(log, "wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        error = ""
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            error = f"took longer than {limit_s:.0f} s"
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    numbers: Numbers = json.loads(result.read_text()) if result.exists() else {}
    words = log.read_text(errors="replace").splitlines()
    if not numbers and not error:
        error = f"exit status {child.returncode}"
    is_good = not error and bool(numbers.pop("ok", True))
    if not is_good:
        print(f"---- {name}: {error}", *words[-args.tail :], sep="\n", flush=True)
    return {"check": name, "ok": is_good, "seconds": round(time.perf_counter() - began, 1), "error": error, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--phase", default="a,b,c")
    add("--only", default="", help="names of checks, by commas")
    add("--device", default="cuda")
    add("--model", help="folder of a pretrained model; without it, phase a takes random ones")
    add("--overrides", default="", help="of the quickstart's configuration, such as total_train_steps=2")
    add("--tail", type=int, default=25, help="lines that are shown of a check that fails")
    add("--out", default="outputs/gpu_day")
    add("--check", help=argparse.SUPPRESS)
    add("--result", help=argparse.SUPPRESS)
    add("--references", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.references:
        return _references(Path(args.references))
    if args.check:
        Path(args.result).write_text(json.dumps(CHECKS[args.check].run(args)))
        return None
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = args.only.split(",") if args.only else [n for n, c in CHECKS.items() if c.phase in args.phase.split(",")]
    done: dict[str, Numbers] = {}
    for name in chosen:
        failed = [need for need in CHECKS[name].needs if need in done and not done[need]["ok"]]
        done[name] = (
            {"check": name, "ok": False, "error": f"left out: {', '.join(failed)}"}
            if failed
            else _in_child(name, args, folder)
        )
        with open(folder / "gpu_day.jsonl", "a") as file:
            file.write(json.dumps(done[name]) + "\n")
    for name, found in done.items():
        print(f"{name:14} {'pass' if found['ok'] else 'FAIL'} {found.get('seconds', 0):7.1f} s  {found['error']}")
    print(json.dumps({"passed": sum(f["ok"] for f in done.values()), "of": len(done)}))
    return None


if __name__ == "__main__":
    main()
