"""Keeps tasks in flight under the staleness bound, collects finished groups, and writes every task's life line.

Owned by client.py on trainer rank 0; everything here runs in the client's asyncio loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.engine import InferenceEngine
from arealite.api.errors import WorkflowError
from arealite.api.types import Group, Task
from arealite.api.workflow import RolloutWorkflow
from arealite.observe.waits import mark
from arealite.rollout.counters import Counters
from arealite.rollout.episodes import EpisodeFailed, run_episode, usable
from arealite.rollout.ledger import Ledger
from arealite.rollout.staleness import StalenessManager
from arealite.rollout.state import ExecutorState, WaitingTask


@dataclass(order=True)
class Episode:
    """A task that was issued and is not finished. `workflow` is None after a recovery, until a caller gives one."""

    ordinal: int
    task: Task = field(compare=False)
    workflow: RolloutWorkflow | None = field(compare=False, default=None)


class RolloutExecutor:
    """Consumes: issued tasks. Produces: groups for `collect`. Waits for: the episodes it started (each request and
    reward call in them has its own limit). Unblocked by: episodes that end, new versions, new tasks, `release`.

    Nothing runs in the background but the episodes themselves: whatever may make room calls `pump`.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        staleness: StalenessManager,
        ledger: Ledger,
        config: InferenceEngineConfig,
        counters: Counters,
    ) -> None:
        self.engine = engine
        self.staleness = staleness
        self.ledger = ledger
        self.config = config
        self.counters = counters
        self.should_accept: Callable[[Group], bool] | None = None
        self.num_events = 0
        self._num_issued = 0
        self._num_steps = 0
        self._num_failed_in_a_row = 0
        self._is_held = False
        self._error: BaseException | None = None
        self._queue: list[Episode] = []  # heap by ordinal
        self._running: dict[int, Episode] = {}
        self._ready: dict[int, Group] = {}
        self._workflows: dict[int, RolloutWorkflow | None] = {}  # of ready groups, should they be run again
        self._adopted: RolloutWorkflow | None = None
        self._untrained: dict[int, tuple[Group, int]] = {}  # consumed, not yet trained; with the starting version
        self._futures: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    # -- tasks in ------------------------------------------------------------------------------------------------

    def submit(self, tasks: list[Task], workflow: RolloutWorkflow) -> None:
        """Issue `tasks`, in order; they start as soon as there is capacity."""
        for task in tasks:
            heapq.heappush(self._queue, self._issue(task, workflow))
        self.pump()

    def adopt(self, workflow: RolloutWorkflow, should_accept: Callable[[Group], bool] | None) -> None:
        """The workflow for tasks of a recovery point, and the filter from now on."""
        self.should_accept = should_accept
        self._adopted = workflow
        for episode in self._queue:
            episode.workflow = episode.workflow or workflow
        self.pump()

    def num_wanted(self) -> int:
        """Tasks to draw now: what capacity allows, and one step's worth to fill places that become free before the
        caller draws again."""
        return max(0, self.staleness.capacity()) + self.staleness.consumer_batch_size - len(self._queue)

    def pump(self) -> None:
        """Start queued episodes, oldest first, while there is capacity."""
        while self._may_start() and self._queue and self._queue[0].workflow and self.staleness.capacity() > 0:
            episode = heapq.heappop(self._queue)
            self.staleness.start(episode.ordinal)
            self._running[episode.ordinal] = episode
            future = asyncio.ensure_future(self._run(episode))
            self._futures.add(future)
            future.add_done_callback(self._ended)

    def _may_start(self) -> bool:
        return not self._is_held and self._error is None

    # -- groups out ----------------------------------------------------------------------------------------------

    async def collect(self, num_groups: int, may_draw: bool = False) -> list[Group] | None:
        """The next `num_groups` groups, in ordinal order; None (only if `may_draw`) when more tasks are needed.

        Consumes: finished groups. Produces: one step's groups. Waits for: enough of them, and those that would be too
        old at the next step. Unblocked by: episodes that end, or an error.

        Raises:
            WorkflowError: too many groups failed in a row, or nothing is left that could end the wait.
        """
        while True:
            if self._error is not None:
                raise self._error
            ordinals = self.staleness.select(num_groups)
            if ordinals is not None:
                if self._sift_stale(ordinals):
                    continue
                return self._consume(ordinals)
            stuck = self._stuck(num_groups)
            if may_draw and not self._queue and (stuck is None or self.staleness.capacity() > 0):
                return None
            if stuck is not None:
                raise WorkflowError(stuck)
            self._changed.clear()
            await self._changed.wait()

    async def run_all(self, tasks: list[Task], workflow: RolloutWorkflow) -> list[Group]:
        """Run exactly these tasks, outside the bound; the groups that succeeded, in order, already consumed.

        Raises:
            WorkflowError: all of them failed, or too many in a row.
        """
        slots = asyncio.Semaphore(self.staleness.max_concurrent)
        version = self.staleness.version

        async def one(episode: Episode) -> Group | None:
            async with slots:
                if self._error is not None:
                    return None  # the run stops; `close` drops the task
                group = await self._generate(episode)
            del self._running[episode.ordinal]
            self._notify()
            return group

        episodes = [self._issue(task, workflow) for task in tasks]
        self._running.update({e.ordinal: e for e in episodes})
        done = await asyncio.gather(*map(one, episodes))
        if self._error is not None:
            raise self._error
        groups = [group for group in done if group is not None]
        if tasks and not groups:
            raise WorkflowError(f"none of the batch's {len(tasks)} groups is left: all failed or were filtered out")
        for group in groups:
            self._take(group, version)
        return groups

    def mark_trained(self, step: int, skipped: bool = False) -> None:
        """The consumed groups have been trained on in `step`, or dropped by it."""
        for group, _ in self._untrained.values():
            if skipped:
                self._drop(group.task.id, "the step was skipped: loss or gradient was not finite", step)
            else:
                self.ledger.record(group.task.id, "trained", step=step)
        self._untrained.clear()
        self._num_steps = step + 1

    def set_version(self, version: int) -> None:
        if version > self.staleness.version and self._untrained:
            self.mark_trained(self._num_steps)  # new weights: the batch taken before has gone into them
        self.staleness.version = version
        self.pump()
        self._notify()

    def hold(self) -> None:
        """Start no more episodes."""
        self._is_held = True

    def release(self) -> None:
        self._is_held = False
        self.pump()

    async def close(self, reason: str) -> None:
        """Cancel what runs and drop, with the reason, every task that was not trained."""
        self._is_held = True
        self._error = self._error or WorkflowError(f"no groups any more: {reason}")
        for future in list(self._futures):
            future.cancel()
        await asyncio.gather(*self._futures, return_exceptions=True)
        live = [*self._untrained.values(), *((g, 0) for g in self._ready.values())]
        for task in [*(g.task for g, _ in live), *(e.task for e in [*self._running.values(), *self._queue])]:
            self._drop(task.id, reason)
        self._queue, self._running, self._ready, self._untrained = [], {}, {}, {}
        self._notify()

    def pending(self) -> list[str]:
        """Lines about what the next step waits for. Any thread may call."""
        must = set(self.staleness.awaited())
        running = sorted(self._running.items())
        lines = [f"task {e.task.id} (group {o}, due at this step)" for o, e in running if o in must]
        lines += [f"task {e.task.id} (group {o})" for o, e in running if o not in must]
        return [f"{len(self._ready)} groups ready, {len(running)} running, {len(self._queue)} queued", *lines]

    # -- recovery ------------------------------------------------------------------------------------------------

    def state(self) -> ExecutorState:
        """What a recovery point must hold so that no task is lost or used twice."""
        ready = {o: (g, self.staleness.started_version(o)) for o, g in self._ready.items()} | self._untrained
        waiting = sorted([*self._running.values(), *self._queue])
        return ExecutorState(
            version=self.staleness.version,
            num_issued=self._num_issued,
            num_consumed=self.staleness.num_consumed - len(self._untrained),
            num_steps=self._num_steps,
            ledger_bytes=self.ledger.num_bytes(),
            waiting=[WaitingTask(e.ordinal, e.task) for e in waiting],
            ready=[(version, group) for _, (group, version) in sorted(ready.items())],
        )

    def restore(self, state: ExecutorState) -> None:
        """Go on from `state`; its unfinished tasks start first, under their old ordinals, once `adopt` was called."""
        self.ledger.resume(state.ledger_bytes, state.num_steps)
        self._num_issued, self._num_steps = state.num_issued, state.num_steps
        self.staleness.version, self.staleness.num_consumed = state.version, state.num_consumed
        self._queue = [Episode(w.ordinal, w.task) for w in state.waiting]
        heapq.heapify(self._queue)
        for version, group in state.ready:
            self._ready[group.ordinal] = group
            self.staleness.restore(group.ordinal, version)

    # -- inside --------------------------------------------------------------------------------------------------

    def _issue(self, task: Task, workflow: RolloutWorkflow) -> Episode:
        episode = Episode(self._num_issued, task, workflow)
        self._num_issued += 1
        self.counters.add("num_issued", 1)
        self.ledger.record(task.id, "issued")
        return episode

    async def _run(self, episode: Episode) -> None:
        group = await self._generate(episode)
        del self._running[episode.ordinal]
        if group is None:
            self.staleness.reject(episode.ordinal)
        else:
            self.staleness.accept(episode.ordinal)
            self._ready[episode.ordinal] = group
            self._workflows[episode.ordinal] = episode.workflow
        self.pump()

    async def _generate(self, episode: Episode) -> Group | None:
        """The episode's group, or None when it failed or was filtered out."""
        task, version = episode.task, self.staleness.version
        assert episode.workflow is not None, "pump and run_all start only episodes that have a workflow"

        def on_retry(reason: str) -> None:
            self.counters.add("num_retries", 1)
            self.ledger.record(task.id, "generating", version=version, reason=reason)

        self.ledger.record(task.id, "generating", version=version)
        try:
            trajectories = await run_episode(
                self.engine, task, episode.workflow, self.config.workflow_retries, on_retry
            )
        except EpisodeFailed as failure:
            self._failed(task, failure)
            return None
        self._num_failed_in_a_row = 0
        self.ledger.record(task.id, "rewarded")
        group = Group(task, episode.ordinal, trajectories)
        self.counters.add("num_reward_errors", sum(t.status == "reward_error" for t in trajectories))
        if self.should_accept is not None and not self.should_accept(usable(group)):
            self.counters.add("num_rejected", 1)
            self._drop(task.id, "filtered")
            return None
        self.counters.add("num_accepted", 1)
        mark("group")
        return group

    def _failed(self, task: Task, failure: EpisodeFailed) -> None:
        self.counters.add("num_failed", 1)
        self._drop(task.id, failure.reason)
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= self.config.max_failed_groups and self._error is None:
            self._error = WorkflowError(
                f"{self._num_failed_in_a_row} groups in a row failed (rollout.max_failed_groups); the last was task"
                f" {task.id}: {failure.reason}\n{failure.detail}"
            )

    def _ended(self, future: asyncio.Task[None]) -> None:
        self._futures.discard(future)
        if not future.cancelled() and future.exception() is not None:
            self._error = (
                self._error or future.exception()
            )  # not an episode's: the filter's or our own; collect raises it
        self._notify()

    def _sift_stale(self, ordinals: list[int]) -> bool:
        """Deal with groups older than eta by `stale_policy`; whether some of `ordinals` are no longer ready."""
        policy, limit = self.config.stale_policy, self.staleness.max_staleness
        stale = [o for o in ordinals if self._age(self._ready[o]) > limit]
        self.counters.add("num_stale", len(stale))
        if policy == "correct" or not stale:
            return False
        for ordinal in stale:
            group = self._ready.pop(ordinal)
            workflow = self._workflows.pop(ordinal, None) or self._adopted
            self.staleness.discard(ordinal)
            told = f"stale: {self._age(group)} versions old, at most {limit} allowed"
            if policy == "drop":
                self._drop(group.task.id, told)
            else:
                self.ledger.record(group.task.id, "generating", version=self.staleness.version, reason=f"again, {told}")
                heapq.heappush(self._queue, Episode(ordinal, group.task, workflow))
        self.pump()
        return True

    def _age(self, group: Group) -> int:
        return self.staleness.version - min(t.min_version for t in usable(group).trajectories)

    def _consume(self, ordinals: list[int]) -> list[Group]:
        if self._untrained:
            self.mark_trained(self._num_steps)  # asked for the next batch: the one before is done with
        started = {o: self.staleness.started_version(o) for o in ordinals}
        self.staleness.consume(ordinals)
        groups = [self._ready.pop(o) for o in ordinals]
        for group in groups:
            self._workflows.pop(group.ordinal, None)
            self._take(group, started[group.ordinal])
        self.pump()
        return groups

    def _take(self, group: Group, started_version: int) -> None:
        self.ledger.record(group.task.id, "consumed", version=self.staleness.version)
        self._untrained[group.ordinal] = (group, started_version)
        for t in usable(group).trajectories:
            self.counters.observe("staleness", self.staleness.version - t.min_version)
            self.counters.observe("generate_s", t.generate_s)
            self.counters.observe("reward_s", t.reward_s)

    def _drop(self, task_id: str, reason: str, step: int | None = None) -> None:
        self.ledger.record(task_id, "dropped", step=step, reason=reason)

    def _stuck(self, num_groups: int) -> str | None:
        """Why no amount of waiting would bring `num_groups` groups; None while something may still happen."""
        have = f"{len(self._ready)} of {num_groups} groups are ready"
        if self._is_held:
            return f"{have} and generation is paused: call resume() before taking a batch"
        if self._running:
            return None
        if self.staleness.capacity() <= 0:
            return (
                f"{have} and the staleness bound allows no more at version {self.staleness.version} (eta ="
                f" {self.staleness.max_staleness}): send new weights (upload_weights) between two batches, or raise"
                " rollout.max_head_offpolicyness"
            )
        return f"{have}, and " + ("the queued tasks have no workflow" if self._queue else "no task is left to run")

    def _notify(self) -> None:
        self.num_events += 1
        self._changed.set()
