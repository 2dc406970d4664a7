"""The ring turns: real launcher, server and trainer ranks, a tiny model; asynchronous, synchronous, colocated."""

import json
import os

import pytest
from runs import Run

WIRINGS = {
    "asynchronous": [],
    "synchronous": ["rollout.max_head_offpolicyness=0"],
    "colocated": ["allocation_mode=native:d1|fsdp:d1"],
    "by_broadcast": ["weight_update=distributed"],
    "two_ranks_by_disk": ["allocation_mode=native:d1+fsdp:d2", "weight_update=disk"],
    "adapters_on_context_ranks": ["allocation_mode=native:d1+fsdp:c2", "actor.lora.rank=4", "gconfig.min_new_tokens=2"],
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_wiring_trains_and_leaves_its_records(wiring, tmp_path, tiny_llama):
    with Run(tmp_path, tiny_llama, *WIRINGS[wiring]) as run:
        summary = run.succeed()
    assert summary["steps"] == 4
    assert summary["staleness_max"] <= (0 if wiring == "synchronous" else 1)
    assert summary["mismatch_mean"] < 1e-4
    assert {"accuracy_before", "accuracy_after", "train_s", "tokens_per_s"} <= summary.keys()
    steps = [line for line in run.metrics() if "step_s" in line]
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    rollouts = sorted((run.folder / "rollouts").glob("step_*.jsonl"))
    assert len(rollouts) == 4
    rows = [json.loads(line) for line in rollouts[0].read_text().splitlines()]
    assert len(rows) == 16 and {"prompt", "completion", "reward", "versions", "finish_reason"} <= rows[0].keys()
    assert (run.folder / "reward.png").stat().st_size > 1000 and (run.folder / "config.yaml").exists()
    assert list((run.folder / "tensorboard").iterdir()) and list((run.folder / "checkpoints").iterdir())
    assert run.pids() == {}


def test_ledger_of_a_finished_run_has_no_violation(tmp_path, tiny_llama):
    from arealite.rollout.ledger import audit

    with Run(tmp_path, tiny_llama) as run:
        run.succeed()
    report = audit(run.folder / "ledger.jsonl")
    assert not report.violations
    assert sum(state == "trained" for state in report.states.values()) == 16


def test_sigterm_ends_every_process(tmp_path, tiny_llama):
    with Run(tmp_path, tiny_llama, "total_train_steps=1000") as run:
        run.until(lambda: len(run.metrics()) >= 1, "first step")
        pids = run.pids()
        assert {"trainer-0", "server-0"} <= pids.keys()
        run.process.terminate()
        assert run.wait(60) == 143
        for name, pid in pids.items():
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
                pytest.fail(f"{name} ({pid}) still lives")
