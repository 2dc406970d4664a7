"""AReaLite: reinforcement learning from verifiable rewards, one script and one YAML from a laptop to a cluster.

The public names below are imported when they are asked for, so that `import arealite` and `import arealite.<part>` cost
what they use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

PUBLIC = {
    "GRPOConfig": "api.cli_args",
    "SFTConfig": "api.cli_args",
    "RWConfig": "api.cli_args",
    "load_config": "api.load_config",
    "Task": "api.types",
    "Trajectory": "api.types",
    "RolloutWorkflow": "api.protocols",
    "PPOTrainer": "trainer",
    "SFTTrainer": "supervised",
    "RWTrainer": "supervised",
    "Run": "run",
    "RLVRWorkflow": "workflow.rlvr",
    "FSDPPPOActor": "engine.ppo.actor",
    "grpo_loss_fn": "engine.ppo.actor",
    "FSDPPPOCritic": "engine.ppo.critic",
}
__all__ = ["__version__", *PUBLIC]

if TYPE_CHECKING:
    from arealite.api.cli_args import GRPOConfig, RWConfig, SFTConfig
    from arealite.api.load_config import load_config
    from arealite.api.protocols import RolloutWorkflow
    from arealite.api.types import Task, Trajectory
    from arealite.engine.ppo.actor import FSDPPPOActor, grpo_loss_fn
    from arealite.engine.ppo.critic import FSDPPPOCritic
    from arealite.run import Run
    from arealite.supervised import RWTrainer, SFTTrainer
    from arealite.trainer import PPOTrainer
    from arealite.workflow.rlvr import RLVRWorkflow


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'arealite' has no attribute {name!r}; public names: {', '.join(PUBLIC)}")
    return getattr(import_module(f"arealite.{PUBLIC[name]}"), name)
