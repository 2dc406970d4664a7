"""Kill any process at a random moment: the run recovers, loses no checkpoint, and trains each sample exactly once."""

import os
import random
import signal

import pytest
import torch
from runs import Run
from safetensors.torch import load_file

from arealite.rollout.ledger import audit

DETERMINISTIC = ["rollout.max_head_offpolicyness=0", "server.deterministic=true"]


def check_exactly_once(run: Run, num_trained: int) -> None:
    report = audit(run.folder / "ledger.jsonl")
    assert not report.violations
    assert sum(state == "trained" for state in report.states.values()) == num_trained


@pytest.mark.parametrize("victim", ["trainer-0", "server-0", "launcher"])
def test_killed_process_costs_no_sample(victim, tmp_path, tiny_llama):
    steps = 6
    moment = random.Random(victim).randint(1, 3)
    with Run(tmp_path, tiny_llama, f"total_train_steps={steps}") as run:
        run.until(lambda: len(run.metrics()) >= moment, "some steps")
        if victim == "launcher":
            others = run.pids()
            run.process.kill()
            run.wait(30)
            run_again = run.start
            for pid in others.values():  # they die with the launcher, without being told
                wait_until_gone(pid)
            run_again()
        else:
            os.kill(run.pids()[victim], signal.SIGKILL)
        summary = run.succeed()
    assert summary["steps"] == steps
    assert ("the run stopped" in run.text()) == (victim == "trainer-0")  # a server costs the trainer nothing but time
    check_exactly_once(run, steps * 4)
    assert len(list((run.folder / "checkpoints").iterdir())) >= 1


def wait_until_gone(pid: int, limit_s: float = 20.0) -> None:
    import time

    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} still lives {limit_s} s after its launcher was killed")


def test_resumed_synchronous_run_equals_the_straight_one(tmp_path, tiny_llama):
    final = {}
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
        with Run(tmp_path / name, tiny_llama, *DETERMINISTIC) as run:
            if name == "resumed":
                run.until(lambda: len(run.metrics()) >= 2, "two steps")
                os.kill(run.pids()["trainer-0"], signal.SIGKILL)
            run.succeed()
        final[name] = load_file(run.folder / "checkpoints/step_000004/model.safetensors")
    assert final["straight"].keys() == final["resumed"].keys()
    for name, tensor in final["straight"].items():
        assert torch.equal(tensor, final["resumed"][name]), name
