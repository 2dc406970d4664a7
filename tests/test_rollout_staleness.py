"""The staleness bound, proven by simulation with random latencies, and against a plain search for feasible steps."""

import asyncio
import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rollout import quick_config, simulate, tasks_from, trajectory

from arealite.rollout.counters import Counters
from arealite.rollout.executor import RolloutExecutor
from arealite.rollout.ledger import Ledger, audit
from arealite.rollout.staleness import StalenessBound


class World:
    """Servers of one weight version; a task's tokens come at random times, each with the version of that time."""

    def __init__(self, seed: int, failing: float) -> None:
        self.version = 0
        self.random = random.Random(seed)
        self.failing = failing
        self.started: list[str] = []

    async def arun_episode(self, engine, task):
        self.started.append(task.id)
        slow = self.random.random() < 0.2
        versions = []
        for _ in range(self.random.randint(1, 5)):
            versions.append(self.version)
            await asyncio.sleep(self.random.expovariate(1.0) * (8.0 if slow else 0.3))
        if self.random.random() < self.failing:
            raise RuntimeError("this episode is broken")
        return [trajectory(task, versions=versions)]

    def close(self):
        pass


class Naive(StalenessBound):
    """Waits only for groups that are due at this very step."""

    def due(self, version, running, ready):
        return [(v, n) for v, n in super().due(version, running, ready) if v + self.max_staleness <= version]


async def run_steps(world, bound, ledger, num_steps, should_accept=None):
    """Train on virtual time; returns the ages at consumption, in versions, and the counters."""
    config = quick_config(consumer_batch_size=bound.batch_size, max_failed_groups=1000, workflow_retries=1)
    counters = Counters()
    executor = RolloutExecutor(None, bound, ledger, config, counters)
    source, ages = tasks_from(), []
    size = bound.batch_size
    for step in range(num_steps):
        groups = None
        while groups is None:
            executor.submit(list(itertools.islice(source, executor.num_wanted())), world, should_accept)
            groups = await executor.next_step(size, may_draw=True)
        ordinals = [g.ordinal for g in groups]
        assert len(groups) == size and ordinals == sorted(ordinals)
        ages += [executor.version - min(v for v in g.trajectories[0].versions if v >= 0) for g in groups]
        await asyncio.sleep(world.random.expovariate(1.0))
        executor.mark_trained(step)
        world.version += 1
        await asyncio.sleep(world.random.random())  # the servers have new weights before the head knows
        executor.set_version(step + 1)
    await executor.close("the simulation ended")
    return ages, counters.drain()


@pytest.mark.parametrize("eta", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("max_concurrent", [3, 100])
def test_nothing_is_older_than_eta_at_consumption(eta, max_concurrent, tmp_path):
    oldest = 0
    for seed in range(12):
        bound = StalenessBound(eta, 4, max_concurrent)
        ledger = Ledger(tmp_path / f"{seed}.jsonl")
        world = World(seed, failing=0.1)
        coin = random.Random(seed).random
        ages, counts = simulate(run_steps(world, bound, ledger, 25, lambda group, coin=coin: coin() > 0.2))
        ledger.close()
        assert max(ages) <= eta, (seed, ages)
        oldest = max(oldest, *ages)

        report = audit(tmp_path / f"{seed}.jsonl")
        assert not report.violations
        assert report.counts["trained"] == 100
        # Nothing is thrown away for being slow: only by the filter, by failure, or at the end.
        allowed = ("filtered", "RuntimeError", "the simulation ended")
        assert all(reason.startswith(allowed) for reason in report.reasons), report.reasons
        assert counts["num_stale"] == 0
        assert (counts["staleness_max"], counts["staleness_mean"]) == (max(ages), pytest.approx(sum(ages) / len(ages)))
        # First issued, first started.
        started = [int(t.split("-r")[1]) for t in dict.fromkeys(world.started)]
        assert started == sorted(started)
    assert oldest > 0 or eta == 0  # the bound is used, not avoided by being synchronous


def test_waiting_only_for_groups_that_are_due_would_break_the_bound(tmp_path):
    """The simulation can fail: with the naive rule it finds groups that are too old."""
    worst = max(max(simulate(run_steps(World(seed, 0.0), Naive(2, 4, 100), Ledger(None), 25))[0]) for seed in range(12))
    assert worst > 2


def test_a_step_leaves_no_older_ready_group_behind():
    assert StalenessBound(2, 2, 100).select(0, {0: 0, 2: 0}, dict.fromkeys((5, 3, 1, 4), 0), 2) == [1, 3]


def test_only_groups_that_are_due_are_awaited():
    bound = StalenessBound(1, 2, 100)
    assert bound.awaited(0, {0: 0, 1: 0}, {}) == []
    running, ready = {0: 0, 3: 1}, {1: 0, 2: 1}
    assert bound.select(1, running, ready, 2) is None and bound.awaited(1, running, ready) == [0]
    running, ready = {3: 1}, {0: 0, 1: 0, 2: 1}
    assert bound.select(1, running, ready, 2) == [0, 1] and bound.awaited(1, running, ready) == []


@dataclass
class Situation:
    """A reachable state: groups started under the bound, any of them finished, steps taken as select says."""

    bound: StalenessBound
    version: int = 0
    num_consumed: int = 0
    running: dict[int, int] = field(default_factory=dict)
    ready: dict[int, int] = field(default_factory=dict)

    def capacity(self):
        return self.bound.capacity(self.version, self.num_consumed, len(self.running), len(self.ready))

    def select(self):
        return self.bound.select(self.version, self.running, self.ready, self.bound.batch_size)


@st.composite
def situations(draw):
    eta, size = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    now = Situation(StalenessBound(eta, size, draw(st.integers(1, 20))))
    ordinal = 0
    for _ in range(draw(st.integers(1, 6))):
        for _ in range(draw(st.integers(0, 12))):
            if now.capacity() > 0:
                now.running[ordinal] = now.version
                ordinal += 1
        for running in list(now.running):
            fate = draw(st.sampled_from(["runs", "ready", "rejected"]))
            if fate != "runs":
                version = now.running.pop(running)
                now.ready |= {running: version} if fate == "ready" else {}
        chosen = now.select()
        if chosen is None:
            break
        if draw(st.booleans()):
            now.ready = {o: v for o, v in now.ready.items() if o not in chosen}
            now.num_consumed += size
            now.version += 1
    return now


def can_still_be_in_time(now, taken):
    """Plain reference: after this step, can the rest be trained, B a step, each group by its deadline?"""
    rest = now.running | now.ready
    deadlines = sorted(version + now.bound.max_staleness for o, version in rest.items() if o not in taken)
    return all(now.version + 1 + i // now.bound.batch_size <= deadline for i, deadline in enumerate(deadlines))


@settings(max_examples=400, deadline=None)
@given(situations())
def test_a_step_waits_exactly_when_going_on_would_make_a_group_too_old(now):
    size, chosen = now.bound.batch_size, now.select()
    if chosen is not None:
        assert can_still_be_in_time(now, chosen)
    elif len(now.ready) >= size:
        steps = itertools.combinations(sorted(now.ready), size)
        assert not any(can_still_be_in_time(now, taken) for taken in steps)
        assert now.bound.awaited(now.version, now.running, now.ready)
    # What must be trained at this step always fits into it.
    assert all(due <= size for _, due in now.bound.due(now.version, now.running, now.ready))


@settings(max_examples=200, deadline=None)
@given(situations())
def test_capacity_is_the_published_formula_while_every_version_has_its_batch(now):
    bound, num_running = now.bound, len(now.running)
    if now.num_consumed == now.version * bound.batch_size:
        num_used = now.num_consumed + len(now.ready) + num_running
        places = (bound.max_staleness + now.version + 1) * bound.batch_size - num_used
        assert now.capacity() == min(bound.max_concurrent - num_running, places)


def test_versions_without_a_batch_give_no_credit():
    """A run that starts at a high version, without a recovery point."""
    assert StalenessBound(1, 4, 100).capacity(50, 0, 0, 0) == 8
