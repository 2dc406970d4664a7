"""Seconds of a PPO step with the critic on the policy's rank, and on a rank of its own, one core each.

    python benchmarks/roles_apart.py [--model FOLDER] [--steps 3]

Two processes, each pinned to a core of its own. "colocated": one of them has both models, the other is idle. "apart":
policy on the first, critic on the second. Both train on the very same batches of random tokens; the first step is
warm-up. `parts_s` are the parts of a colocated step (logprobs, values, both updates), `sum_s` is their sum; `cpu_s` is
the processor time that a step costs the busier process: its seconds where nothing else runs on the cores. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any

from surroundings import surroundings

WORLD_SIZE = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", choices=("apart", "colocated"), help=argparse.SUPPRESS)
    return parser.parse_args()


def random_batch(num_groups: int = 4, size: int = 2, prompt: int = 32, answer: int = 32) -> Any:
    import numpy as np

    from arealite.api.types import Batch

    rng, length = np.random.default_rng(0), prompt + answer
    num = num_groups * size
    mask = np.tile(np.arange(length) >= prompt, num)
    return Batch(
        tokens=rng.integers(1000, 40000, num * length),
        loss_mask=mask,
        logprobs=np.where(mask, -9, 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        cu_seqlens=np.arange(num + 1) * length,
        group_ids=np.repeat(np.arange(num_groups), size),
        sample_ids=np.arange(num),
        rewards=rng.integers(0, 2, num).astype(np.float64),
        truncated=np.zeros(num, bool),
        num_groups=num_groups,
        task_ids=[f"task-{i // size}" for i in range(num)],
    )


def rank(model: str, num_steps: int, is_apart: bool) -> dict[str, Any]:
    """Median seconds of the steps, and of their parts, as this rank sees them."""
    import torch

    from arealite.api.cli_args import PPOActorConfig, PPOCriticConfig
    from arealite.api.types import Dims
    from arealite.engine.ppo.actor import FSDPPPOActor
    from arealite.engine.ppo.critic import FSDPPPOCritic
    from arealite.engine.roles import Critic

    torch.set_num_threads(1)
    second = Dims(first=1)
    layouts = (Dims(), second)  # colocated, nothing is on the second
    actor = FSDPPPOActor(PPOActorConfig(path=model, ppo_n_minibatches=2), Dims(), layouts=layouts)
    actor.initialize()
    critic_engine = FSDPPPOCritic(PPOCriticConfig(path=model), second if is_apart else Dims(), layouts)
    critic_engine.initialize()
    critic, ranks = Critic(actor, critic_engine), actor.collective
    steps: list[dict[str, float]] = []
    for _ in range(num_steps + 1):
        batch = random_batch()
        ranks.barrier("step")
        marks, cpu = [time.perf_counter()], time.process_time()

        def timed(result: Any, marks: list[float] = marks) -> Any:
            marks.append(time.perf_counter())
            return result

        batch.prox_logp = timed(actor.compute_logp(batch))
        batch.values = timed(critic.compute_values(batch))
        actor.compute_advantages(batch)
        timed(actor.grpo_update(batch))
        timed(critic.ppo_update(batch))
        ranks.barrier("end")
        parts = [end - begin for begin, end in pairwise(marks)]
        names = ("actor_inf", "critic_inf", "actor_train", "critic_train")
        cpu = max(ranks.gather(time.process_time() - cpu))
        steps.append({"cpu": cpu, "step": time.perf_counter() - marks[0], **dict(zip(names, parts, strict=True))})
    return {f"{name}_s": round(median(step[name] for step in steps[1:]), 3) for name in steps[0]}


def measure(kind: str, model: str, num_steps: int) -> dict[str, Any]:
    """What rank 0 says of a world of two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    processes = []
    for number in range(WORLD_SIZE):
        env = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(WORLD_SIZE)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--model", model, "--steps", str(num_steps), "--rank", kind]
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(process.pid, {cores[number % len(cores)]})
        processes.append(process)
    try:
        told = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found: dict[str, Any] = json.loads(told[0].splitlines()[-1])
    return found


def main() -> None:
    args = arguments()
    if args.rank is not None:
        print(json.dumps(rank(args.model, args.steps, args.rank == "apart")), flush=True)
        os._exit(0)  # groups of the two may wait for each other in their destructors
    colocated, apart = (measure(kind, args.model, args.steps) for kind in ("colocated", "apart"))
    parts = {name: value for name, value in colocated.items() if name not in ("step_s", "cpu_s")}
    total = round(sum(parts.values()), 3)
    print(f"colocated: a step {colocated['step_s']} s; apart: {apart['step_s']} s; sum of the parts: {total} s")
    figures = {"colocated": colocated, "apart": apart, "sum_s": total, "share": round(apart["step_s"] / total, 3)}
    cpu_share = round(apart["cpu_s"] / colocated["cpu_s"], 3)
    print(json.dumps({"model": args.model, **figures, "cpu_share": cpu_share, "parts_s": parts} | surroundings()))


if __name__ == "__main__":
    main()
