"""Where everything of one run lies on disk: one property per file or folder of the run folder.

Called by every process of a run (launcher, servers, trainer ranks) and by readers of finished runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arealite.api.cli_args import GRPOConfig

RUN_DIR_VARIABLE = "AREALITE_RUN_DIR"


@dataclass(frozen=True)
class RunFolder:
    """The run folder under `root`. Paths are only named here; whoever writes creates what it needs."""

    root: Path

    @classmethod
    def of(cls, config: GRPOConfig) -> RunFolder:
        """The configured folder, fileroot/experiment_name/trial_name; AREALITE_RUN_DIR goes first when it is set."""
        given = os.environ.get(RUN_DIR_VARIABLE)
        if given:
            return cls(Path(given))
        return cls(Path(config.cluster.fileroot).absolute() / config.experiment_name / config.trial_name)

    def create(self) -> RunFolder:
        """Make the root folder (its parents too); a folder that exists is fine."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    @property
    def config_yaml(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan_json(self) -> Path:
        return self.root / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def summary_json(self) -> Path:
        return self.root / "summary.json"

    @property
    def reward_png(self) -> Path:
        return self.root / "reward.png"

    @property
    def rollouts_dir(self) -> Path:
        return self.root / "rollouts"

    @property
    def evaluation_dir(self) -> Path:
        return self.root / "evaluation"

    @property
    def logs_dir(self) -> Path:
        return self.root / "logs"

    @property
    def waits_dir(self) -> Path:
        return self.root / "waits"

    @property
    def stacks_dir(self) -> Path:
        return self.root / "stacks"

    @property
    def stalls_dir(self) -> Path:
        return self.root / "stalls"

    @property
    def checkpoints_dir(self) -> Path:
        return self.root / "checkpoints"

    @property
    def recover_dir(self) -> Path:
        return self.root / "recover"

    @property
    def tensorboard_dir(self) -> Path:
        return self.root / "tensorboard"

    def rollouts(self, step: int) -> Path:
        """The rollouts that step `step` trained on; steps count from 0."""
        return self.rollouts_dir / f"step_{step:06d}.jsonl"

    def evaluation(self, step: int) -> Path:
        """The held-out answers given after `step` optimiser steps."""
        return self.evaluation_dir / f"step_{step:06d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """The Hugging Face folder saved after `step` optimiser steps."""
        return self.checkpoints_dir / f"step_{step:06d}"

    def recovery_point(self, step: int) -> Path:
        """The recovery point of `step` finished optimiser steps."""
        return self.recover_dir / f"point_{step:06d}"
