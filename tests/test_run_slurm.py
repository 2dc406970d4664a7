"""Whole runs as jobs of a real Slurm: the steps of a run on one machine, also when it is queued again."""

import pytest
from support.nodes import HEAD_ENV
from test_run_nodes import Quickstart, losses

JOB = (
    "launcher.type=slurm", "cluster.num_nodes=2", "cluster.num_gpus_per_node=0", "cluster.num_cores_per_node=2",
    "cluster.sbatch={mem: 6G}", "launcher.node_silence_s=15",
)  # fmt: skip


@pytest.fixture
def addressed(monkeypatch):
    """All nodes are this machine."""
    monkeypatch.setenv(*next(iter(HEAD_ENV.items())))


def test_a_job_makes_the_steps_of_a_run_on_one_machine_through_a_requeue(tmp_path, tiny_llama, slurm, addressed):
    with Quickstart(tmp_path / "one", tiny_llama, "weight_update=distributed", "total_train_steps=6") as one:
        one.succeed()
    with Quickstart(tmp_path / "job", tiny_llama, *JOB, "total_train_steps=6") as job:
        job.until(lambda: len(job.metrics()) >= 2, "two steps")
        slurm("scontrol", "requeue", (job.folder / "slurm_job").read_text())
        job.succeed()
    assert "server-0 on " in job.text() and "after 1 requeues" in job.text()
    assert losses(job) == pytest.approx(losses(one), rel=1e-5) and len(losses(job)) == 6
