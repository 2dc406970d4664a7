"""The ring turns: real launcher, server and trainer ranks, a tiny model. Here colocated, and by broadcast with all that
a step can have; runs of other wirings are in the other test_run_*.py."""

import pytest
from support.runs import Run


def test_a_colocated_run_leaves_its_records(tmp_path, tiny_llama):
    with Run(tmp_path, tiny_llama, "allocation_mode=native:d1|fsdp:d1") as run:
        run.check_records(run.succeed(), num_steps=4)


def test_the_loop_gives_each_update_what_it_needs(tmp_path, tiny_llama):
    """A reference that stays, two updates a step, a temperature, and a schedule over all updates of the run."""
    changes = ["ref.path=${actor.path}", "ref.dtype=float32", "actor.kl_weight=0.01", "actor.entropy_weight=0.1"]
    changes += ["actor.ppo_n_minibatches=2", "gconfig.temperature=0.7", "weight_update=distributed"]
    changes += ["actor.optimizer.lr_scheduler=linear", "actor.optimizer.lr=1e-4"]
    with Run(tmp_path, tiny_llama, *changes) as run:
        summary = run.succeed()
    run.check_records(summary, num_steps=4)  # with a mismatch as small: both sides score at the same temperature
    steps = run.steps()
    assert [line["lr"] for line in steps] == pytest.approx([1e-4 * (1 - i / 8) for i in (1, 3, 5, 7)])
    # The first update of the run is made at the reference; later ones, ever smaller, go on from where it was left.
    assert steps[0]["kl"] < 0.5 * steps[3]["kl"]
