"""The ring turns: real launcher, server and trainer ranks, a tiny model; asynchronous, synchronous, colocated."""

import json
import os

import pytest
from runs import Run

from arealite.rollout.ledger import audit

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


def test_the_loop_gives_each_update_what_it_needs(tmp_path, tiny_llama):
    """A reference that stays, two updates a step, a temperature, and a schedule over all updates of the run."""
    changes = ["ref.path=${actor.path}", "ref.dtype=float32", "actor.kl_weight=0.01", "actor.entropy_weight=0.1"]
    changes += ["actor.ppo_n_minibatches=2", "gconfig.temperature=0.7"]
    changes += ["actor.optimizer.lr_scheduler=linear", "actor.optimizer.lr=1e-4"]
    with Run(tmp_path, tiny_llama, *changes) as run:
        summary = run.succeed()
    assert summary["mismatch_mean"] < 1e-4  # servers and trainer score at the same temperature
    steps = [line for line in run.metrics() if "step_s" in line]
    assert [line["lr"] for line in steps] == pytest.approx([1e-4 * (1 - i / 8) for i in (1, 3, 5, 7)])
    # The first update of the run is made at the reference; later ones, ever smaller, go on from where it was left.
    assert steps[0]["kl"] < 0.5 * steps[3]["kl"]
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
