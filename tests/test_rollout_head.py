"""The rollout head: batches for all ranks, failures, filters, stale groups."""

import asyncio
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.ranks import Meeting, on_ranks
from support.rollout import Episodes, MembersWorkflow, Source, ordinals, quick_config, simulate, trajectory

from arealite.api.errors import ConfigError, RequestError, RunStopped, WorkflowError
from arealite.api.types import Batch, Group, Task, Trajectory, as_record
from arealite.observe import stop
from arealite.observe.reasons import reasons
from arealite.rollout import share
from arealite.rollout.counters import Counters
from arealite.rollout.episodes import EpisodeFailed, run_episode
from arealite.rollout.executor import RolloutExecutor
from arealite.rollout.ledger import Ledger, audit
from arealite.rollout.router import Limits
from arealite.rollout.staleness import StalenessBound


def test_synchronous_steps_are_the_tasks_in_order(head, tmp_path):
    engine, source, workflow = head(max_head_offpolicyness=0), Source(), MembersWorkflow(num_members=2)
    for step in range(3):
        batch = engine.prepare_batch(source, workflow)
        assert ordinals(engine) == [4 * step + i for i in range(4)]
        assert batch.num_groups == 4 and batch.num_sequences == 8
        assert batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        engine.mark_trained(step)
        engine.set_version(step + 1)
        engine.server.version = step + 1
    stats = engine.stats()
    assert stats["num_generated_tokens"] >= 24 * 12
    assert stats["staleness_max"] == 0
    engine.destroy()
    report = audit(tmp_path / "ledger.jsonl")
    assert not report.violations
    assert report.counts["trained"] == 12
    assert set(report.trained_at.values()) == {0, 1, 2}
    assert report.reasons == {"the run ended": source.position - 12}


def test_shares_are_whole_groups_of_about_as_many_tokens():
    lengths = [30, 9, 8, 7, 6]  # by count the first one would share with others
    groups = [
        Group(Task(f"t{i}"), i, [trajectory(Task(f"t{i}"), m, [0] * n) for m in range(2)])
        for i, n in enumerate(lengths)
    ]
    whole, shares = Batch.pack(groups), share.split_batch(groups, 2)
    assert sorted(s.group_ids.tolist() for s in shares) == [[0, 0], [1, 1, 2, 2, 3, 3, 4, 4]]
    for part in shares:
        wanted = whole.select(np.flatnonzero(np.isin(whole.group_ids, part.group_ids)))
        assert part.num_groups == 5 and part.task_ids == wanted.task_ids
        assert part.tokens.tolist() == wanted.tokens.tolist()
    assert [s.num_sequences for s in share.split_batch(groups[:1], 3)].count(0) == 2


def test_two_batches_at_one_version_are_refused_when_the_bound_forbids_them(head):
    engine, source = head(max_head_offpolicyness=0), Source()
    engine.prepare_batch(source, Episodes())
    with pytest.raises(WorkflowError, match="send new weights"):
        engine.prepare_batch(source, Episodes())


def test_a_wait_for_groups_ends_when_a_stop_is_asked_for_and_loses_no_task(head, monkeypatch):
    """The state is that of the last finished step: what was taken is ready again, what runs waits."""

    class Endless(Episodes):
        async def arun_episode(self, engine, task):
            await asyncio.sleep(600)

    engine, source = head(), Source()
    monkeypatch.setattr(stop, "_noted", [signal.SIGTERM])
    with pytest.raises(RunStopped, match="SIGTERM"):
        engine.prepare_batch(source, Endless())
    state = engine.state_dict()
    assert (len(state["waiting"]), state["num_consumed"], state["ready"]) == (source.position, 0, [])


def test_a_batch_while_paused_is_an_error_and_not_a_hang(head):
    engine = head()
    engine.pause()
    with pytest.raises(WorkflowError, match="call resume"):
        engine.prepare_batch(Source(), Episodes())
    engine.resume()
    assert engine.prepare_batch(Source(), Episodes()).num_groups == 4


def test_a_source_that_ends_is_an_error_and_not_a_hang(head):
    engine = head()
    with pytest.raises(WorkflowError, match=r"3 of 4 groups are ready, and no task is left"):
        engine.prepare_batch(Source(limit=3), Episodes())


def test_no_batch_size_is_a_clear_error(head):
    with pytest.raises(ConfigError, match="consumer_batch_size"):
        head(consumer_batch_size=None).prepare_batch(Source(), Episodes())


def test_filtered_groups_are_replaced(head, tmp_path):
    engine, source = head(max_head_offpolicyness=0), Source()
    engine.prepare_batch(source, Episodes(), lambda group: group.ordinal % 3 == 0)
    assert ordinals(engine) == [0, 3, 6, 9]
    stats = engine.stats()
    assert (stats["num_accepted"], stats["num_rejected"], stats["num_failed"]) == (4, 6, 0)
    assert audit(tmp_path / "ledger.jsonl").reasons == {"filtered": 6}


def test_a_filter_that_accepts_nothing_is_an_error_and_not_an_endless_step():
    counters = Counters()
    bound = StalenessBound(1, 4, 8)
    executor = RolloutExecutor(None, bound, Ledger(None), quick_config(), counters, max_rejected_steps=5)

    async def step():
        executor.submit(list(Source(limit=1000)), Episodes(), lambda group: False)
        await executor.next_step(4)

    with pytest.raises(WorkflowError, match="refused 20 groups in a row"):
        simulate(step())
    assert counters.drain()["num_rejected"] < 100


def test_a_filter_that_raises_is_reported(head):
    with pytest.raises(ZeroDivisionError):
        head().prepare_batch(Source(), Episodes(), lambda group: 1 / 0)


def test_failed_episodes_are_retried_then_dropped_with_the_reason(head, tmp_path):
    def act(task, tries):
        if task.id == "e0-r1" or (task.id == "e0-r2" and tries < 3):
            raise OSError("disk on fire")
        return [trajectory(task)]

    engine, workflow = head(max_head_offpolicyness=0, workflow_retries=2), Episodes(act)
    engine.prepare_batch(Source(), workflow)
    assert ordinals(engine) == [0, 2, 3, 4]
    assert workflow.tries["e0-r1"] == workflow.tries["e0-r2"] == 3
    stats = engine.stats()
    assert (stats["num_failed"], stats["num_retries"]) == (1, 4)
    assert audit(tmp_path / "ledger.jsonl").reasons == {"OSError: disk on fire": 1}


def test_what_cannot_succeed_is_not_retried(head):
    def act(task, tries):
        if task.id == "e0-r0":
            raise RequestError("the prompt is too long")
        return [trajectory(task)]

    engine, workflow = head(), Episodes(act)
    engine.prepare_batch(Source(), workflow)
    assert workflow.tries["e0-r0"] == 1


@pytest.mark.parametrize("call", ["prepare_batch", "rollout_batch"])
def test_a_run_whose_episodes_all_fail_stops_with_their_traceback(head, call):
    def act(task, tries):
        raise ValueError("no such column")

    engine = head(max_failed_groups=5, workflow_retries=0)
    with pytest.raises(WorkflowError, match=r"(?s)5 groups in a row failed.*Traceback.*no such column"):
        if call == "prepare_batch":
            engine.prepare_batch(Source(), Episodes(act))
        else:
            engine.rollout_batch([Task(str(i), prompt="x") for i in range(9)], Episodes(act))


def test_reward_errors_are_not_zeros(head, tmp_path):
    def act(task, tries):
        bad = trajectory(task, 1, reward=None, status="reward_error", error="Traceback ...\nValueError: no number")
        good = trajectory(task, 0)
        return [bad, bad] if task.id == "e0-r1" else [good, bad]

    engine = head(max_head_offpolicyness=0)
    reasons.drain()
    batch = engine.prepare_batch(Source(), Episodes(act))
    assert batch.num_sequences == batch.num_groups == 4
    assert batch.rewards.tolist() == [1.0] * 4
    assert all(len(g.trajectories) == 2 for g in engine.last_groups)  # the log shows the failed ones too
    stats = engine.stats()
    assert (stats["num_reward_errors"], stats["num_failed"]) == (6, 1)
    whole = "reward_error for all 2 members: ValueError: no number"
    assert reasons.drain() == {"failed": {whole: 1}, "reward errors": {"ValueError: no number": 6}}
    assert audit(tmp_path / "ledger.jsonl").reasons == {"reward_error for all 2 members: ValueError: no number": 1}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"logprobs": [0.0]}, "2 tokens, 2 loss_mask, 1 logprobs, 2 versions"),
        ({"logprobs": [0.0, math.nan]}, "logprob nan"),
        ({"logprobs": [0.0, -math.inf]}, "logprob -inf"),
        ({"logprobs": [0.0, 0.7]}, r"logprob 0.7 \(1 such\); expected finite, at most 0"),
        ({"logprobs": [0.0, None]}, "logprobs has 1 dimensions of object"),
        ({"logprobs": [[0.0], [-1.0]]}, "logprobs has 2 dimensions"),
        ({"versions": [-1, -1]}, "version -1"),
        ({"versions": [0.0, 0.5]}, "versions has 1 dimensions of float64"),
        ({"tokens": [5, -100]}, "token -100"),
        ({"loss_mask": [False, False]}, "loss_mask that is all False"),
        ({"loss_mask": [True, True]}, "begins with True"),
        ({"loss_mask": [0, 2]}, "more than True and False"),
        ({"reward": None}, "'reward': None"),
        ({"reward": math.nan}, "'reward': nan"),
        ({"reward": np.float32("inf")}, r"'reward': np.float32\(inf\)"),
        ({"reward": "1.0"}, "'reward': '1.0'"),
        ({"reward_parts": {"format": math.nan}}, "'format': nan"),
        ({"status": "reward_error"}, "is 'reward_error' with the reward 1.0; expected None"),
        ({"status": "done"}, "status 'done'"),
        ({"finish_reason": "eos"}, "finish_reason 'eos'"),
        ({"task_id": "other"}, "task_id 'other'"),
        ({"row_lengths": [1, 2]}, r"2 tokens in row_lengths \[1, 2\]; expected lengths from 1 of that sum"),
        ({"row_lengths": [2, 0]}, "expected lengths from 1"),
        ({"row_lengths": [1, 1]}, "begins row 1 with True in the loss_mask"),
        ({"row_lengths": 2}, "row_lengths has 0 dimensions"),
        ({"returns": [1.0]}, "has 1 returns for 2 tokens"),
        ({"returns": [0.0, math.nan]}, "a finite one for each"),
    ],
)
def test_a_workflow_that_breaks_its_contract_is_told_with_task_and_member(changes, told):
    wrong = Episodes(lambda task, tries: [trajectory(task, 0), trajectory(task, 3, **changes)])
    with pytest.raises(EpisodeFailed, match=f"WorkflowError: task e0-r7 member 3.* .*{told}"):
        asyncio.run(run_episode(None, Task("e0-r7", prompt="x"), wrong, 0))


@pytest.mark.parametrize("returned", [None, [], [{"tokens": []}]])
def test_a_workflow_that_returns_no_trajectories_is_told(returned):
    with pytest.raises(EpisodeFailed, match="expected"):
        asyncio.run(run_episode(None, Task("e0-r7", prompt="x"), Episodes(lambda task, tries: returned), 0))


def test_arrays_become_plain_numbers_and_prompts_carry_no_logprob():
    """What is kept must survive JSON: recovery points and logs are written of it."""
    arrays = {"tokens": np.array([5, 6]), "logprobs": torch.tensor([math.nan, -1.0]), "versions": np.array([9, 2])}
    arrays |= {"row_lengths": np.array([2], np.int32), "returns": torch.tensor([math.nan, 0.5])}
    odd = {"loss_mask": [0, 1], "reward": np.True_, "reward_parts": {"format": np.float64(0.5)}, **arrays}
    task = Task("e0-r7", prompt="x")
    workflow = Episodes(lambda task, tries: [replace(trajectory(task), **odd)])
    [found] = asyncio.run(run_episode(None, task, workflow, 0))
    plain = {"tokens": [5, 6], "loss_mask": [False, True], "logprobs": [0.0, -1.0], "versions": [-1, 2]}
    plain |= {"row_lengths": [2], "returns": [0.0, 0.5]}
    assert found == replace(trajectory(task), reward=1.0, reward_parts={"format": 0.5}, **plain)
    assert Trajectory(**json.loads(json.dumps(as_record(found), allow_nan=False))) == found


def test_evaluation_is_outside_ledger_and_bound_and_keeps_every_task(head, tmp_path):
    def act(task, tries):
        if task.id == "2":
            raise ValueError("broken task")
        return [trajectory(task)]

    engine = head(max_head_offpolicyness=0, workflow_retries=0, max_failed_groups=1)
    groups = engine.run_groups([Task(str(i), prompt="x") for i in range(30)], Episodes(act))
    assert [g.task.id for g in groups] == [str(i) for i in range(30)]
    assert [g.trajectories[0].status for g in groups].count("failed") == 1
    assert "broken task" in groups[2].trajectories[0].error
    assert engine._live.counters.num_events >= 30  # slow rewards must not look like a stall
    assert not (tmp_path / "ledger.jsonl").exists()
    assert engine.prepare_batch(Source(), Episodes()).num_groups == 4


def on_all_ranks(head, meeting, act, **config):
    """What `act(engine)` returns on each rank, or the error that it raises."""
    engines = [head(meeting.of(rank), **config) for rank in range(meeting.world_size)]
    return on_ranks(meeting, lambda rank: act(engines[rank]))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_get_whole_groups_of_one_step(head, size):
    workflow = Episodes(lambda task, tries: [trajectory(task, m, [0] * int(task.id[4:])) for m in range(2)])
    source = Source(position=1)
    shares = on_all_ranks(head, Meeting(size), lambda e: e.prepare_batch(source, workflow), max_head_offpolicyness=0)
    assert all(s.num_groups == 4 for s in shares)
    found = [(g, task) for s in shares for g, task in zip(s.group_ids.tolist(), s.task_ids, strict=True)]
    assert sorted(found) == sorted((g, f"e0-r{g + 1}") for g in range(4) for _ in range(2))
    assert all(len({i for i, s in enumerate(shares) if g in s.group_ids}) == 1 for g in range(4))
    assert sum(s.num_sequences == 0 for s in shares) == max(0, size - 4)
    if size == 2:
        assert [len(s.tokens) for s in shares] == [14, 14]  # groups of 4, 6, 8 and 10 tokens


def test_an_error_of_the_head_reaches_all_ranks(head):
    def act(task, tries):
        raise ValueError("no such column")

    config = {"max_failed_groups": 1, "workflow_retries": 0}
    outcomes = on_all_ranks(head, Meeting(3), lambda e: e.prepare_batch(Source(), Episodes(act)), **config)
    assert all(isinstance(o, WorkflowError) and "no such column" in str(o) for o in outcomes)
    assert str(outcomes[1]).startswith("on rank 0")


def test_other_ranks_hear_from_a_head_that_takes_its_time(head):
    """Their waits have a limit, which a long step must not reach."""
    meeting = Meeting(2)

    class Slow(Episodes):
        async def arun_episode(self, engine, task):
            while meeting.num_scatters <= 3:
                await asyncio.sleep(0.01)
            return [trajectory(task)]

    outcomes = on_all_ranks(head, meeting, lambda e: e.prepare_batch(Source(), Slow()), limits=Limits(beat_s=0.0))
    assert [o.num_groups for o in outcomes] == [4, 4]


def test_other_ranks_need_no_server(head):
    engine = head(Meeting(2).of(1))
    engine.pause()
    engine.resume()
    engine.mark_trained(0)
    assert engine.stats() == {}
    engine.load_state_dict({"version": 4, "ready": "ignored"})
    assert engine.state_dict() == {"version": 4} and engine.get_version() == 4


# -- stale groups ----------------------------------------------------------------------------------------------


async def jump(policy, ledger):
    """Two steps with eta = 1, and a version that jumps by five between them."""
    bound = StalenessBound(1, 2, 10)
    config = quick_config(consumer_batch_size=2, stale_policy=policy)
    counters = Counters()
    executor = RolloutExecutor(None, bound, ledger, config, counters)
    workflow = Episodes(lambda task, tries: [trajectory(task, versions=[executor.version])])
    executor.submit([Task(f"e0-r{i}", prompt="x") for i in range(12)], workflow)
    first = await executor.next_step(2)
    executor.mark_trained(0)
    executor.set_version(5)
    second = await executor.next_step(2)
    executor.mark_trained(1)
    await executor.close("the end")
    return [[g.ordinal for g in groups] for groups in (first, second)], counters.drain()["num_stale"], workflow.tries


@pytest.mark.parametrize(
    ("policy", "second", "reasons"),
    [
        ("correct", [2, 3], {"the end": 8}),
        ("drop", [4, 5], {"the end": 6, "stale: 5 versions old, at most 1 allowed": 2}),
        ("requeue", [2, 3], {"the end": 8}),
    ],
)
def test_groups_that_became_too_old_are_dealt_with_as_configured(policy, second, reasons, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    batches, num_stale, tries = simulate(jump(policy, ledger))
    assert batches == [[0, 1], second]
    assert num_stale == 2
    assert tries["e0-r2"] == (2 if policy == "requeue" else 1)
    report = audit(tmp_path / "ledger.jsonl")
    assert not report.violations
    assert report.reasons == reasons
