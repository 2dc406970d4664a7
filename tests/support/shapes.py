"""Run in a process of its own, which has an accelerator without numbers from then on: `support/shapes.py FOLDER` prints
one line of JSON, what ranks of the model there take and what is refused."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from arealite import devices
from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Dims
from arealite.engine import micro_batch
from arealite.launcher.memory_estimate import trainer_parts
from arealite.prove.dry_run import KIND, accelerator, run_rank

LAYOUTS = [Dims(), Dims(d=2, t=2, c=2, p=2)]
EXPERT_LAYOUTS = [Dims(), Dims(d=4, e=2)]


def main(folder: str) -> None:
    config = GRPOConfig()
    config.actor.path, config.server.context_length, config.gconfig.max_new_tokens = folder, 128, 64
    found: dict[str, object] = {}
    for dims in LAYOUTS:
        of_stages = [
            run_rank(folder, config, "actor", config.actor, dims, i * dims.size // dims.p) for i in range(dims.p)
        ]
        estimated = {p.name: p.num_bytes for p in trainer_parts(config, of_stages[0][1], dims, None, on_gpu=True)}
        found[str(dims)] = {"estimated": estimated, "ranks": [(run.num_layers, run.parts) for run, _ in of_stages]}
    here = devices.accelerator()
    assert here == accelerator()[0] and devices.num_accelerators() == 1 and devices.device_of(None) == here
    assert devices.collective_backend(here) == KIND and devices.device_of(f"{KIND}:0") == here
    try:
        run_rank(folder, config, "actor", config.actor, Dims(t=3), 0)
    except ConfigError as error:
        found["refused"] = str(error)
    config.actor.offload = "all"
    found["offloaded"] = run_rank(folder, config, "actor", config.actor, Dims(), 0)[0].parts
    config.actor.offload = "none"
    with_experts = Path(folder) / "experts"
    with_experts.mkdir()
    kind = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 64}
    experts = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    told = json.loads((Path(folder) / "config.json").read_text()) | kind | experts
    (with_experts / "config.json").write_text(json.dumps(told))
    runs = [run_rank(str(with_experts), config, "actor", config.actor, dims, 0)[0] for dims in EXPERT_LAYOUTS]
    found["experts"] = [run.parts for run in runs]
    ref, _ = run_rank(folder, config, "ref", config.actor, Dims(d=2), 0)
    found["ref"] = ref.parts
    try:  # an index that was left on the CPU
        with patch.object(micro_batch, "on_device", lambda x, _: torch.from_numpy(x)):
            run_rank(folder, config, "actor", config.actor, Dims(), 0)
    except Exception as error:  # its class depends on torch's release
        found["mixed up"] = str(error)
    print(json.dumps(found))


main(sys.argv[1])
