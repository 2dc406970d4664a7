"""Where everything of one run lies on disk: one name per file or folder of the run folder.

Called by every process of a run (launcher, servers, trainer ranks) and by readers of finished runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arealite.api.cli_args import RunConfig

RUN_DIR_VARIABLE = "AREALITE_RUN_DIR"
ATTEMPT_VARIABLE = "AREALITE_ATTEMPT"


class _Place:
    """A file or folder of the run folder, by its path under the root."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.root / self._path


@dataclass(frozen=True)
class RunFolder:
    """The run folder under `root`. Paths are only named here; whoever writes creates what it needs."""

    root: Path

    config_yaml = _Place("config.yaml")
    plan_json = _Place("plan.json")
    identity = _Place("identity.json")  # the configuration of the run that it belongs to, see claim.py
    state_json = _Place("run_state.json")  # {state, reason, attempt}, written by the launcher: note_state
    servers = _Place("servers")  # addresses of the inference servers, one a line; the client follows it
    servers_asked = _Place("servers_asked")  # to be added or drained, by `arealite servers`, one a line
    servers_json = _Place("servers.json")  # each of them, as the client sees it
    metrics = _Place("metrics.jsonl")
    ledger = _Place("ledger.jsonl")
    summary_json = _Place("summary.json")
    reward_png = _Place("reward.png")
    rollouts_dir = _Place("rollouts")
    agents_dir = _Place("agents")  # a folder for each agent's program that runs
    evaluation_dir = _Place("evaluation")
    logs_dir = _Place("logs")
    slurm_job = _Place("slurm_job")  # id of the Slurm job that runs it, or ran it last
    slurm_log = _Place("logs/slurm.log")  # what its agents say, of all its jobs
    waits_dir = _Place("waits")
    stacks_dir = _Place("stacks")
    stalls_dir = _Place("stalls")
    checkpoints_dir = _Place("checkpoints")
    recover_dir = _Place("recover")
    tensorboard_dir = _Place("tensorboard")
    timeline_dir = _Place("timeline")
    prove_json = _Place("prove.json")

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """The configured folder, fileroot/experiment_name/trial_name; AREALITE_RUN_DIR goes first when it is set."""
        given = os.environ.get(RUN_DIR_VARIABLE)
        if given:
            return cls(Path(given))
        return cls(Path(config.cluster.fileroot).absolute() / config.experiment_name / config.trial_name)

    def create(self) -> RunFolder:
        """Make the root folder (its parents too); a folder that exists is fine."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    def log(self, name: str, attempt: str = "") -> Path:
        """The log of a process, of a start of the run, which are counted from 1."""
        return self.logs_dir / (f"attempt_{attempt}" if attempt else "") / f"{name}.log"

    def num_attempts(self) -> int:
        """Starts of the run so far."""
        return max((int(p.name.partition("_")[2]) for p in self.logs_dir.glob("attempt_[0-9]*")), default=0)

    def rollouts(self, step: int) -> Path:
        """The rollouts that step `step` trained on; steps count from 0."""
        return self.rollouts_dir / f"step_{step:06d}.jsonl"

    def evaluation(self, step: int) -> Path:
        """The held-out answers given after `step` steps."""
        return self.evaluation_dir / f"step_{step:06d}.jsonl"

    def owed_evaluation(self, step: int) -> Path:
        """A note that the evaluation after `step` steps has begun; it is there until the result is."""
        return self.evaluation_dir / f"step_{step:06d}.owed"

    def checkpoint(self, step: int) -> Path:
        """The Hugging Face folder saved after `step` steps."""
        return self.checkpoints_dir / f"step_{step:06d}"

    def recovery_point(self, step: int) -> Path:
        """The recovery point of `step` finished steps."""
        return self.recover_dir / f"point_{step:06d}"
