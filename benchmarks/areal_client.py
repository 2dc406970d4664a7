"""AReaL 1.0.4's own RemoteSGLangEngine, as released on PyPI, driving an unmodified `arealite serve`.

    make areal-client && python benchmarks/areal_client.py

Generation, pause with a request in flight, weight update from disk and by gloo broadcast; after each step the server's
greedy tokens are compared with those of Hugging Face `generate` on the weights it must hold (float32). The client runs
in an environment of its own (`--side client` there); prints one line per check and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NUM_NEW_TOKENS = 16
PROMPT = [1, 4093, 314, 260, 3575, 282, 4649, 47]
START_LIMIT_S = 120.0
CLIENT_LIMIT_S = 600.0
GROUP_LIMIT_S = 60.0


class Checks:
    """What was found so far, and Hugging Face's answer to compare with."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.found: dict[str, bool] = {}

    def note(self, name: str, good: bool) -> None:
        self.found[name] = good
        print(f"{name}: {'ok' if good else 'FAILED'}", flush=True)

    def expected(self) -> list[int]:
        """The model's greedy answer."""
        import torch

        with torch.inference_mode():
            ids = self.model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        return ids[0, len(PROMPT) :].tolist()

    def change_weights(self, factor: float) -> None:
        """To others whose greedy answer differs."""
        import torch

        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "mlp.down_proj" in name:
                    parameter.mul_(factor)


def sample(engine: Any, num_new: int, **how: Any) -> Any:
    from areal.api import ModelRequest
    from areal.api.cli_args import GenerationHyperparameters

    wanted = GenerationHyperparameters(max_new_tokens=num_new, min_new_tokens=0, **how)
    return asyncio.run(engine.agenerate(ModelRequest(input_ids=list(PROMPT), gconfig=wanted)))


def pause_in_flight(engine: Any, checks: Checks) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(sample(engine, 400, temperature=1.0, ignore_eos=True)))
    thread.start()
    time.sleep(2)
    engine.pause_generation()
    time.sleep(1)
    held = not found
    engine.continue_generation()
    thread.join(CLIENT_LIMIT_S / 2)
    checks.note("resumed after a pause", held and len(found) == 1 and len(found[0].output_tokens) == 400)


def update_from_disk(engine: Any, checks: Checks) -> None:
    from areal.api import WeightUpdateMeta
    from areal.api.cli_args import NameResolveConfig
    from areal.utils import name_resolve, names

    before = checks.expected()
    checks.change_weights(0.5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight_update_v1"
        name_resolve.reconfigure(NameResolveConfig(type="nfs", nfs_record_root=folder + "/names"))
        checks.model.save_pretrained(path)
        engine.pause_generation()
        name = names.update_weights_from_disk(
            engine.config.experiment_name, engine.config.trial_name, engine.get_version()
        )
        name_resolve.add(name, str(time.time()), keepalive_ttl=120)
        engine.update_weights_from_disk(
            WeightUpdateMeta(type="disk", path=str(path), clear_checkpoint_after_load=False)
        ).result(CLIENT_LIMIT_S)
        engine.continue_generation()
    after = sample(engine, NUM_NEW_TOKENS, greedy=True).output_tokens
    checks.note("weights from disk", after == checks.expected() and after != before)


def update_by_gloo(engine: Any, checks: Checks) -> None:
    import torch
    from areal.api import ModelAllocation, ParamSpec, WeightUpdateMeta
    from areal.engine.core.distributed import init_custom_process_group

    before = checks.expected()
    checks.change_weights(3.0)
    port, name = int(os.environ["GROUP_PORT"]), "update_weight_group"
    update = WeightUpdateMeta(
        type="xccl", gen_allocation=ModelAllocation.from_str("sglang:d1"), nccl_master_address="127.0.0.1",
        nccl_master_port=port, nccl_group_name=name,
    )  # fmt: skip
    joined = engine.init_weights_update_group(update)
    group = init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=name,
        timeout=timedelta(seconds=GROUP_LIMIT_S),
    )  # fmt: skip
    joined.result(CLIENT_LIMIT_S)
    engine.pause_generation()
    parameters = list(checks.model.named_parameters())
    for start in range(0, len(parameters), 40):
        part = parameters[start : start + 40]
        specs = [ParamSpec(name, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in part]
        done = engine.update_weights_from_distributed(update, specs)
        for work in [torch.distributed.broadcast(p.data, 0, group=group, async_op=True) for _, p in part]:
            work.wait()
        done.result(CLIENT_LIMIT_S)
    engine.continue_generation()
    after = sample(engine, NUM_NEW_TOKENS, greedy=True).output_tokens
    checks.note("weights by gloo", after == checks.expected() and after != before)


def client(address: str, model_path: str) -> None:
    """The AReaL side. What it imports comes from its own environment."""
    import torch
    from areal.api.cli_args import InferenceEngineConfig
    from areal.engine.sglang_remote import RemoteSGLangEngine
    from transformers import AutoModelForCausalLM

    checks = Checks(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval())
    config = InferenceEngineConfig(
        experiment_name="arealite", trial_name=f"client-{os.getpid()}", tokenizer_path=model_path,
        consumer_batch_size=1, max_concurrent_rollouts=4, request_timeout=300, setup_timeout=60,
    )  # fmt: skip
    engine = RemoteSGLangEngine(config)
    engine.initialize(addr=address, train_data_parallel_size=1)
    answer = sample(engine, NUM_NEW_TOKENS, greedy=True)
    checks.note("greedy tokens", answer.output_tokens == checks.expected())
    checks.note("logprobs", all(-50 < p <= 0 for p in answer.output_logprobs) and len(answer.output_logprobs) > 0)
    pause_in_flight(engine, checks)
    update_from_disk(engine, checks)
    update_by_gloo(engine, checks)
    engine.destroy()
    print(json.dumps(checks.found), flush=True)
    os._exit(0)  # its executor's threads do not end by themselves


def areal_python() -> Path:
    default = Path.home() / ".cache/arealite/areal-client-1.0.4"
    return Path(os.environ.get("AREALITE_AREAL_ENV", default)) / "bin/python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a folder, or a name for `arealite fetch`")
    parser.add_argument("--side", choices=["client"], help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        client(args.address, args.model)
        return
    from arealite.models.fetch import resolve_model

    if not areal_python().exists():
        raise SystemExit(f"{areal_python()} does not exist: run `make areal-client` first")
    model = resolve_model(args.model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        group_port = free.getsockname()[1]
    words = [sys.executable, "-m", "arealite.inference.serve", "--model", model, "--dtype", "float32", "--port", "0"]
    print("server:", " ".join(words), flush=True)
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            listening = re.search(r"http://(\S+)", line)
            if listening is None:
                log.seek(0)
                raise SystemExit(f"the server did not come up:\n{log.read()[-3000:]}")
            command = [str(areal_python()), __file__, "--side", "client", "--address", listening[1], "--model", model]
            print("client:", " ".join(command), flush=True)
            env = {**os.environ, "GROUP_PORT": str(group_port), "OMP_NUM_THREADS": "1"}
            ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=CLIENT_LIMIT_S)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)
    print(ran.stdout, end="", flush=True)
    if ran.returncode or not all(json.loads(ran.stdout.splitlines()[-1]).values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
