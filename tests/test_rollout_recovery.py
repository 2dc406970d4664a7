"""The ledger, what a failed reward costs, and recovery from a point: every task is trained exactly once."""

import asyncio
import json

import pytest
from support.rollout import Episodes, MembersWorkflow, Source, ordinals, quick_config, simulate, trajectory

from arealite.api.errors import RecoveryError, WorkflowError
from arealite.api.types import Task
from arealite.rollout.counters import Counters
from arealite.rollout.executor import RolloutExecutor
from arealite.rollout.ledger import Ledger, audit
from arealite.rollout.staleness import StalenessBound


def run_steps(engine, source, workflow, first, last, save_at=()):
    """Trains; returns {step: (recovery state, data position)} and the ordinals of each step."""
    points, batches = {}, {}
    for step in range(first, last):
        engine.prepare_batch(source, workflow)
        batches[step] = ordinals(engine)
        engine.mark_trained(step)
        engine.server.version = step + 1
        engine.set_version(step + 1)
        if step + 1 in save_at:
            points[step + 1] = json.loads(json.dumps([engine.state_dict(), source.state_dict()]))
    return points, batches


def kill(engine):
    """End the head as kill -9 would, as far as its ledger can tell: nothing is written any more."""
    engine._connection.call(engine._connection.executor.ledger.close, "test.kill")
    engine.destroy()


@pytest.mark.parametrize("eta", [0, 2])
def test_recovery_trains_every_task_exactly_once(head, tmp_path, eta):
    workflow = MembersWorkflow(num_members=2, max_new_tokens=5)
    engine, source = head(max_head_offpolicyness=eta), Source()
    points, straight = run_steps(engine, source, workflow, 0, 6, save_at=(3,))
    state, position = points[3]
    kill(engine)

    resumed, source = head(max_head_offpolicyness=eta), Source()
    source.load_state_dict(position)
    resumed.load_state_dict(state)
    assert resumed.get_version() == 3
    _, again = run_steps(resumed, source, workflow, 3, 8)
    if eta == 0:
        assert all(again[step] == straight[step] for step in range(3, 6))
    resumed.destroy()

    report = audit(tmp_path / "ledger.jsonl")
    assert not report.violations
    assert report.num_recoveries == 1
    assert report.counts["trained"] == 8 * 4
    drawn = {f"e0-r{i}" for i in range(source.position)}
    assert set(report.states) == drawn  # no task was lost


def test_finished_groups_survive_a_recovery_without_being_run_again(head):
    workflow = Episodes()
    engine, source = head(max_head_offpolicyness=1), Source()
    engine.prepare_batch(source, workflow)  # consumed, not trained: belongs to the point
    state = json.loads(json.dumps(engine.state_dict()))
    assert {r["group"]["ordinal"] for r in state["ready"]} >= {0, 1, 2, 3}
    assert state["num_consumed"] == 0

    resumed, fresh = head(max_head_offpolicyness=1), Episodes()
    resumed.load_state_dict(state)
    resumed.prepare_batch(source, fresh)
    assert ordinals(resumed) == [0, 1, 2, 3]
    assert not fresh.tries.keys() & {"e0-r0", "e0-r1", "e0-r2", "e0-r3"}


def test_a_restart_without_a_recovery_point_voids_the_old_ledger(head, tmp_path):
    for _ in range(2):
        run_steps(head(max_head_offpolicyness=1), Source(), Episodes(), 0, 2)
    report = audit(tmp_path / "ledger.jsonl")
    assert not report.violations and report.counts["trained"] == 8


def test_what_a_step_did_not_train_on_is_dropped_with_the_reason(head, tmp_path):
    engine = head()
    batch = engine.prepare_batch(Source(), Episodes())
    engine.mark_trained(0, {batch.task_ids[1]: "not finite", batch.task_ids[2]: "cut off", "unknown": "lost"})
    report = audit(tmp_path / "ledger.jsonl")
    dropped = [task for task, state in report.states.items() if state == "dropped"]
    assert dropped == batch.task_ids[1:3] and not report.violations
    assert report.reasons == {"not finite": 1, "cut off": 1}
    assert report.trained_at == dict.fromkeys(batch.task_ids[::3], 0)
    assert engine.stats()["num_untrained"] == 2


def test_new_weights_imply_that_the_batch_before_was_trained(head, tmp_path):
    engine, source = head(), Source()
    for step in range(2):
        engine.prepare_batch(source, Episodes())
        engine.set_version(step + 1)
    report = audit(tmp_path / "ledger.jsonl")
    assert sorted(report.trained_at.values()) == [0] * 4 + [1] * 4 and not report.violations


def test_what_ends_after_the_head_is_closed_changes_nothing(tmp_path):
    """A synchronous batch is given up half way: one task is done, one runs on, and each is dropped exactly once."""

    class Slow(Episodes):
        async def arun_episode(self, engine, task):
            if task.id == "slow":
                await asyncio.sleep(5.0)
            return [trajectory(task)]

    async def give_up():
        config, ledger = quick_config(), Ledger(tmp_path / "ledger.jsonl")
        executor = RolloutExecutor(None, StalenessBound(1, 4, 8), ledger, config, Counters())
        batch = asyncio.ensure_future(executor.run_all([Task("fast", prompt="x"), Task("slow", prompt="x")], Slow()))
        await asyncio.sleep(1.0)
        await executor.close("the run ended")
        ledger.close()
        await asyncio.sleep(10.0)
        await asyncio.gather(batch, return_exceptions=True)

    simulate(give_up())
    report = audit(tmp_path / "ledger.jsonl")
    assert not report.violations and report.num_recoveries == 0
    assert report.states == {"fast": "dropped", "slow": "dropped"}


def test_a_state_after_the_first_task_is_refused(head):
    engine = head()
    engine.prepare_batch(Source(), Episodes())
    state = engine.state_dict()
    with pytest.raises(RecoveryError, match="tasks were issued before"):
        engine.load_state_dict(state)
    del state["ready"]
    with pytest.raises(RecoveryError, match="'ready'"):
        head().load_state_dict(state)


LIFE = ["issued", "generating", "rewarded", "consumed", "trained"]


def write_life(ledger, task, events):
    for event in events:
        ledger.record(task, event, step=0 if event == "trained" else None)


@pytest.mark.parametrize(
    ("events", "violation"),
    [
        ([*LIFE, "trained"], "trained after trained"),
        ([*LIFE[:4], "consumed"], "consumed after consumed"),
        (["issued", "issued"], "issued after issued"),
        (["generating"], "generating after None"),
        (["issued", "dropped", "generating"], "generating after dropped"),
    ],
)
def test_audit_finds_what_must_not_happen(tmp_path, events, violation):
    ledger = Ledger(tmp_path / "l.jsonl")
    write_life(ledger, "ok", LIFE)
    write_life(ledger, "bad", events)
    assert audit(tmp_path / "l.jsonl").violations == [f"bad: {violation}"]


def test_audit_leaves_out_what_a_recovery_voided_and_tolerates_torn_lines(tmp_path):
    path = tmp_path / "l.jsonl"
    ledger = Ledger(path)
    write_life(ledger, "a", LIFE[:2])
    kept = ledger.num_bytes()
    write_life(ledger, "a", LIFE[2:])
    ledger.close()
    with open(path, "a") as file:
        file.write('{"task": "a", "ev')  # killed while writing
    assert audit(path).counts == {"trained": 1} and not audit(path).violations
    again = Ledger(path)
    again.resume(kept, step=1)
    write_life(again, "a", LIFE[1:])
    report = audit(path)
    assert report.counts == {"trained": 1} and not report.violations and report.num_recoveries == 1
    again.close()
    text = path.read_text()
    path.write_text(text.replace('"recovered"', '"recovered'))
    assert audit(path).violations


def test_a_failed_reward_may_cost_the_group(head, tmp_path):
    def act(task, tries):
        bad = trajectory(task, 1, reward=None, status="reward_error", error="ValueError: no number")
        return [trajectory(task, 0), bad] if task.id == "e0-r1" else [trajectory(task, 0)]

    engine = head(max_head_offpolicyness=0, reward_failure="group")
    batch = engine.prepare_batch(Source(), Episodes(act))
    assert batch.num_sequences == batch.num_groups == 4
    assert audit(tmp_path / "ledger.jsonl").reasons == {"a reward failed: ValueError: no number": 1}


@pytest.mark.parametrize("num_bad", [1, 2])
def test_a_failed_reward_may_stop_the_run(head, num_bad):
    def act(task, tries):
        bad = trajectory(task, 1, reward=None, status="reward_error", error="ValueError: no number")
        return [trajectory(task, 0), bad] if num_bad == 1 else [bad, bad]

    engine = head(reward_failure="stop")
    with pytest.raises(WorkflowError, match=r"ValueError: no number \(rollout.reward_failure is stop\)"):
        engine.prepare_batch(Source(), Episodes(act))
