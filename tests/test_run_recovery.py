"""Kill any process at a random moment: the run recovers, loses no checkpoint, and trains each sample exactly once."""

import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from support.runs import Run

from arealite.rollout.ledger import audit

MIXED = [
    "train_dataset.path=",
    "train_dataset.mixture.sums={path: examples/arealite/addition/train.jsonl, num_rows: 3}",
    "train_dataset.mixture.letters={path: 'reasoning_gym:letter_counting', num_rows: 2, curriculum: 0, weight: 5}",
    "train_dataset.rest_epochs=1",
]
DETERMINISTIC = ["rollout.max_head_offpolicyness=0", "server.deterministic=true"]


def test_killed_processes_cost_no_sample(tmp_path, tiny_llama):
    choose, num_steps = random.Random(0), 9
    with Run(tmp_path, tiny_llama, f"total_train_steps={num_steps}") as run:
        kill(run, "server-0", 1 + choose.random())
        run.until(lambda: len(run.steps()) >= 5, "steps with the new server")
        assert "the run stopped" not in run.text()  # a server costs the trainer nothing but time
        kill(run, "trainer-0", 5 + choose.random())
        kill(run, "launcher", 7 + choose.random())
        assert "the run stopped" in run.text()
        run.start()
        run.check_records(run.succeed(), num_steps)


def kill(run: Run, victim: str, moment: float) -> None:
    """Kills it after so many steps."""
    run.until(lambda: len(run.steps()) >= int(moment) and victim in {*run.pids(), "launcher"}, "some steps")
    time.sleep(moment % 1)
    if victim != "launcher":
        os.kill(run.pids()[victim], signal.SIGKILL)
        return
    others = run.pids()
    run.process.kill()
    run.wait(30)
    for pid in others.values():  # they die with the launcher, without being told
        wait_until_gone(pid)


def wait_until_gone(pid: int, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} still lives {limit_s} s after its launcher was killed")


def test_resumed_synchronous_run_equals_the_straight_one(tmp_path, tiny_llama):
    """With data of every kind: a mixture, a curriculum, and prompts that rest."""
    final, trained_at = {}, {}
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
        with Run(tmp_path / name, tiny_llama, *DETERMINISTIC, *MIXED) as run:
            if name == "resumed":
                run.until(lambda: len(run.metrics()) >= 2, "two steps")
                os.kill(run.pids()["trainer-0"], signal.SIGKILL)
            run.check_records(run.succeed(), num_steps=4, staleness_max=0)
        trained_at[name] = audit(run.folder / "ledger.jsonl").trained_at
        final[name] = load_file(run.folder / "checkpoints/step_000004/model.safetensors")
    assert trained_at["straight"] == trained_at["resumed"]
    assert final["straight"].keys() == final["resumed"].keys()
    for name, tensor in final["straight"].items():
        assert torch.equal(tensor, final["resumed"][name]), name
