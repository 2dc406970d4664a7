"""The sections about the life of a run, whatever it trains: checkpoints, evaluation, recovery, records, machines.

Parts of RunConfig (cli_args.py). Seconds end in `_s`, counts start with `num_` or `max_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from arealite.api.sections import Section, setting


@dataclass
class FrequencyConfig(Section):
    """When something happens; any of the three, and the end of the run."""

    freq_steps: int | None = setting(None, "every so many steps", low=1)
    freq_epochs: int | None = setting(None, "every so many epochs", low=1)
    freq_s: float | None = setting(None, "every so many seconds", low=0)


@dataclass
class SaverConfig(FrequencyConfig):
    """Hugging Face checkpoints: the last weights always, and others at a frequency."""

    num_kept: int | None = setting(None, "newest checkpoints kept; all if not given", low=1)


@dataclass
class EvaluatorConfig(FrequencyConfig):
    """Evaluation on held-out tasks during training."""

    at_start: bool = setting(True, "evaluate before the first step")
    at_end: bool = setting(True, "evaluate after the last step")


@dataclass
class RecoverConfig(FrequencyConfig):
    """Recovery points, at a frequency, at the end and when the run is stopped, and what to do with them."""

    mode: Literal["auto", "fresh", "off"] = setting(
        "auto", "auto: go on in a used folder; fresh: refuse one; off: refuse one, and write no points"
    )
    freq_s: float | None = setting(300.0, "every so many seconds, at the end of a step", low=0)
    num_kept: int = setting(2, "newest recovery points kept", low=1)
    max_restarts: int = setting(3, "times the launcher restarts a run whose trainer died, or one server", low=0)


@dataclass
class StatsLoggerConfig(Section):
    """What is written about each step."""

    tensorboard: bool = setting(True, "TensorBoard events in the run folder")
    save_rollouts: bool = setting(True, "one JSONL file of rollouts per step")
    timeline: int = setting(0, "a Chrome trace of the first and of every so many-th step; 0 is never", low=0)
    probe_every_steps: int = setting(10, "steps between comparisons of trainer and server logprobs; 0 is never", low=0)
    mismatch_warn: float = setting(0.05, "mean |logprob difference| above which a warning is given", low=0)
    mismatch_stop: float | None = setting(None, "mean |logprob difference| above which the run stops", low=0)


@dataclass
class WatchdogConfig(Section):
    """Limits of waits."""

    heartbeat_s: float = setting(1.0, "how often each process reports its waits", low=0.05)
    stall_s: float = setting(300.0, "a wait or a silent process older than this is a stall", low=1)
    action: Literal["stop", "restart"] = setting(
        "stop", "on a stall of a trainer: stop with the report, or kill it and recover; a server is started again alone"
    )


@dataclass
class ClusterSpecConfig(Section):
    """The machines."""

    fileroot: str = setting("runs", "folder that holds all runs (shared by all nodes)", is_path=True)
    num_nodes: int = setting(1, "nodes", low=1)
    num_gpus_per_node: int | None = setting(None, "GPUs per node; what is found if not given", low=0)
    num_cores_per_node: int | None = setting(None, "CPU cores per node; what is found if not given", low=1)
    sbatch: dict[str, Any] = setting(
        dict, "Slurm: options of the job, such as partition: gpu, time: 04:00:00; false takes one away"
    )
    server_sbatch: dict[str, Any] | None = setting(
        None, "Slurm: those of the nodes that have servers alone, where they are nodes of another kind"
    )
    job_setup: list[str] = setting(list, "Slurm: lines of shell at the beginning of the job, such as module load gcc")


@dataclass
class RayConfig(Section):
    """The Ray cluster that a run has its nodes from, with launcher.type ray."""

    address: str | None = setting(None, "host:port of the cluster; RAY_ADDRESS, or that of this machine, if not given")


@dataclass
class LauncherConfig(Section):
    """How processes are started."""

    type: Literal["local", "slurm", "ray", "print"] = setting(
        "local",
        "who has the nodes: local, this machine and agents that come to it; slurm, a job; ray, a Ray cluster;"
        " print, others, for whom it is written down (docs/clusters.md)",
    )
    pin_cores: bool = setting(True, "give each process its own cores on CPU-only machines")
    env: dict[str, str] = setting(dict, "further environment variables of all processes")
    stop_grace_s: float = setting(
        10.0, "time from SIGTERM to SIGKILL; trainers that are stopped end their step first", low=0
    )
    startup_timeout_s: float = setting(600.0, "longest wait for servers to come up", low=1)
    node_timeout_s: float = setting(
        300.0, "longest wait for the agents of all nodes, and for a lost one without which the run cannot go on", low=1
    )
    node_silence_s: float = setting(
        30.0, "head and agents that have not heard of each other for so long are lost to each other", low=0.5
    )
