"""Keeps tasks in flight under the staleness bound, collects finished groups, and writes every task's life line.

Owned by client.py on trainer rank 0; everything here runs in the client's asyncio loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import RecoveryError, WorkflowError
from arealite.api.protocols import InferenceEngine, RolloutWorkflow
from arealite.api.types import Group, Task, Trajectory, as_record
from arealite.observe.reasons import last_line, reasons
from arealite.observe.waits import mark
from arealite.rollout.counters import Counters
from arealite.rollout.episodes import EpisodeFailed, run_episode, usable
from arealite.rollout.ledger import Ledger
from arealite.rollout.staleness import StalenessManager

NONE: Mapping[str, str] = {}
MAX_REJECTED_STEPS = 100  # steps' worth of groups that should_accept may refuse in a row, before the run stops


@dataclass(order=True)
class Episode:
    """An issued task until it is trained or dropped: queued, running, ready (`group` is set), taken for a step.

    `workflow` None: whichever is given first (after a recovery). `version`: of the weights when it was started.
    """

    ordinal: int
    task: Task = field(compare=False)
    workflow: RolloutWorkflow | None = field(compare=False, default=None)
    version: int = field(compare=False, default=0)
    group: Group | None = field(compare=False, default=None)


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
        self._workflow: RolloutWorkflow | None = None  # the one given last
        self._num_issued = 0
        self._num_steps = 0
        self._num_failed_in_a_row = 0
        self._num_rejected_in_a_row = 0
        self._is_held = False
        self._error: BaseException | None = None
        self._queue: list[Episode] = []  # heap
        self._running: dict[int, Episode] = {}
        self._ready: dict[int, Episode] = {}
        self._untrained: dict[int, Episode] = {}  # taken for a step that is not trained yet
        self._futures: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    # -- tasks in ------------------------------------------------------------------------------------------------

    def submit(self, tasks: list[Task], workflow: RolloutWorkflow) -> None:
        """Issue `tasks`, in order; they start as soon as there is capacity."""
        self._workflow = workflow
        for task in tasks:
            heapq.heappush(self._queue, self._issue(task, workflow))
        self.pump()

    def num_wanted(self) -> int:
        """Tasks to draw now: what capacity allows, and one step's worth to fill places that become free before the
        caller draws again."""
        num_places = max(0, self.staleness.capacity()) + self.staleness.consumer_batch_size
        return max(0, num_places - len(self._queue))

    def pump(self) -> None:
        """Start queued episodes, oldest first, while there is capacity."""
        while self._queue and self._workflow and self._may_start() and self.staleness.capacity() > 0:
            episode = heapq.heappop(self._queue)
            episode.workflow = episode.workflow or self._workflow
            self.staleness.start(episode.ordinal)
            self._running[episode.ordinal] = episode
            self._spawn(self._run_bounded(episode))

    def _may_start(self) -> bool:
        return not self._is_held and self._error is None

    # -- groups out ----------------------------------------------------------------------------------------------

    async def collect(self, num_groups: int, may_draw: bool = False) -> list[Group] | None:
        """The next `num_groups` groups, in ordinal order; None (only if `may_draw`) when more tasks are needed.

        Consumes: finished groups. Produces: one step's groups. Waits for: enough of them, and those that would be too
        old at a later step. Unblocked by: episodes that end, or an error.

        Raises:
            WorkflowError: too many groups in a row failed or were refused, or nothing is left that could end the wait.
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

        async def one(episode: Episode) -> None:
            async with slots:
                if self._error is None:  # else the run stops, and `close` drops the task
                    await self._run(episode)

        episodes = [self._issue(task, workflow) for task in tasks]
        self._running.update({e.ordinal: e for e in episodes})
        await asyncio.gather(*(self._spawn(one(e)) for e in episodes), return_exceptions=True)
        if self._error is not None:
            raise self._error
        done = [e for e in episodes if e.ordinal in self._ready]
        if tasks and not done:
            raise WorkflowError(f"none of the batch's {len(tasks)} groups is left: all failed or were filtered out")
        return [self._take(e.ordinal) for e in done]

    def mark_trained(self, step: int, untrained: Mapping[str, str] = NONE) -> None:
        """The consumed groups have been trained on in `step`, but for those of `untrained` tasks: {id: reason}."""
        for episode in self._untrained.values():
            if reason := untrained.get(episode.task.id):
                self.counters.add("num_untrained")
                reasons.count("not trained", reason)
                self.ledger.record(episode.task.id, "dropped", step=step, reason=reason)
            else:
                self.ledger.record(episode.task.id, "trained", step=step)
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
        """Cancel what runs, drop, with the reason, every task that was not trained, and end the ledger."""
        self._error = self._error or WorkflowError(f"no groups any more: {reason}")
        for future in self._futures:
            future.cancel()
        await asyncio.gather(*self._futures, return_exceptions=True)
        for episode in [*self._untrained.values(), *self._ready.values(), *self._running.values(), *self._queue]:
            self.ledger.record(episode.task.id, "dropped", reason=reason)
        self._queue, self._running, self._ready, self._untrained = [], {}, {}, {}
        self.ledger.close()
        self._notify()

    def pending(self) -> list[str]:
        """Lines about what the next step waits for. Any thread may call."""
        must = set(self.staleness.awaited())
        running = sorted(self._running.items())
        lines = [f"task {e.task.id} (group {o}, due at this step)" for o, e in running if o in must]
        lines += [f"task {e.task.id} (group {o})" for o, e in running if o not in must]
        return [f"{len(self._ready)} groups ready, {len(running)} running, {len(self._queue)} queued", *lines]

    # -- recovery ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able: what a recovery point must hold so that no task is lost or used twice.

        `ready`: finished groups not yet trained on, with the version at their start; `waiting`: the other tasks that
        were issued; `ledger_bytes`: length of the ledger at this point, later lines are void after a recovery.
        """
        waiting = sorted([*self._running.values(), *self._queue])
        ready = sorted([*self._ready.values(), *self._untrained.values()])
        return {
            "version": self.staleness.version,
            "num_issued": self._num_issued,
            "num_consumed": self.staleness.num_consumed - len(self._untrained),
            "num_steps": self._num_steps,
            "ledger_bytes": self.ledger.num_bytes(),
            "waiting": [{"ordinal": e.ordinal, "task": as_record(e.task)} for e in waiting],
            "ready": [{"started_version": e.version, "group": as_record(e.group)} for e in ready],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, before the first task; its unfinished tasks start first, under their old ordinals, once
        a workflow is given.

        Raises:
            RecoveryError: a part of `state` is missing, or tasks were issued already.
        """
        if self._num_issued:
            raise RecoveryError(f"{self._num_issued} tasks were issued before load_state_dict(); call it first")
        try:
            self._num_issued, self._num_steps = state["num_issued"], state["num_steps"]
            self.staleness.version, self.staleness.num_consumed = state["version"], state["num_consumed"]
            self._queue = [Episode(w["ordinal"], Task(**w["task"])) for w in state["waiting"]]  # sorted: a heap
            for record in state["ready"]:
                group, version = record["group"], record["started_version"]
                task, trajectories = Task(**group["task"]), [Trajectory(**t) for t in group["trajectories"]]
                ordinal = group["ordinal"]
                self._ready[ordinal] = Episode(ordinal, task, None, version, Group(task, ordinal, trajectories))
                self.staleness.ready[ordinal] = version
            self.ledger.resume(state["ledger_bytes"], self._num_steps)
        except (KeyError, TypeError) as error:
            raise RecoveryError(f"the rollout state of this recovery point cannot be read: {error!r}") from error

    # -- inside --------------------------------------------------------------------------------------------------

    def _issue(self, task: Task, workflow: RolloutWorkflow) -> Episode:
        episode = Episode(self._num_issued, task, workflow)
        self._num_issued += 1
        self.counters.add("num_issued")
        self.ledger.record(task.id, "issued")
        return episode

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        future = asyncio.ensure_future(work)
        self._futures.add(future)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: asyncio.Task[None]) -> None:
        self._futures.discard(future)
        if not future.cancelled() and future.exception() is not None:
            self._error = self._error or future.exception()  # the filter's or our own; collect raises it
        self._notify()

    async def _run_bounded(self, episode: Episode) -> None:
        await self._run(episode)
        (self.staleness.accept if episode.group else self.staleness.reject)(episode.ordinal)
        self.pump()

    async def _run(self, episode: Episode) -> None:
        """From running to ready, or to nothing when it failed or was filtered out."""
        episode.version = self.staleness.version
        episode.group = await self._generate(episode)
        del self._running[episode.ordinal]
        if episode.group is not None:
            self._ready[episode.ordinal] = episode

    async def _generate(self, episode: Episode) -> Group | None:
        task, version, workflow = episode.task, episode.version, episode.workflow
        assert workflow is not None, "pump and run_all start only episodes that have a workflow"

        def on_retry(reason: str) -> None:
            self.counters.add("num_retries")
            reasons.count("retries", reason.partition(" after ")[2])
            self.ledger.record(task.id, "generating", version=version, reason=reason)

        self.ledger.record(task.id, "generating", version=version)
        try:
            trajectories = await run_episode(self.engine, task, workflow, self.config.workflow_retries, on_retry)
        except EpisodeFailed as failure:
            self._failed(task, failure)
            return None
        self._num_failed_in_a_row = 0
        self.ledger.record(task.id, "rewarded")
        group = Group(task, episode.ordinal, trajectories)
        self._count_errors(trajectories)
        if self.should_accept is not None and not self.should_accept(usable(group)):
            self._rejected(task)
            return None
        self._num_rejected_in_a_row = 0
        self.counters.add("num_accepted")
        mark("group")
        return group

    def _failed(self, task: Task, failure: EpisodeFailed) -> None:
        self.counters.add("num_failed")
        reasons.count("failed", failure.reason)
        self._count_errors(failure.trajectories)
        self.ledger.record(task.id, "dropped", reason=failure.reason)
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= self.config.max_failed_groups and self._error is None:
            self._error = WorkflowError(
                f"{self._num_failed_in_a_row} groups in a row failed (rollout.max_failed_groups); the last was task"
                f" {task.id}: {failure.reason}\n{failure.detail}"
            )

    def _count_errors(self, trajectories: Sequence[Trajectory]) -> None:
        for t in trajectories:
            if t.status == "reward_error":
                self.counters.add("num_reward_errors")
                reasons.count("reward errors", last_line(t.error))

    def _rejected(self, task: Task) -> None:
        self.counters.add("num_rejected")
        self.ledger.record(task.id, "dropped", reason="filtered")
        self._num_rejected_in_a_row += 1
        if self._num_rejected_in_a_row >= MAX_REJECTED_STEPS * self.staleness.consumer_batch_size:
            self._error = self._error or WorkflowError(
                f"should_accept refused {self._num_rejected_in_a_row} groups in a row: no step can be filled. Look at"
                " the rewards of the run's rollouts, or accept more"
            )

    def _sift_stale(self, ordinals: list[int]) -> bool:
        """Deal with groups older than eta by `stale_policy`; whether some of `ordinals` are no longer ready."""
        policy, limit, now = self.config.stale_policy, self.staleness.max_staleness, self.staleness.version
        ages = {o: now - min(t.min_version for t in self._usable(o)) for o in ordinals}
        stale = [o for o in ordinals if ages[o] > limit]
        self.counters.add("num_stale", len(stale))
        if policy == "correct" or not stale:
            return False
        for ordinal in stale:
            episode = self._ready.pop(ordinal)
            del self.staleness.ready[ordinal]
            told = f"stale: {ages[ordinal]} versions old, at most {limit} allowed"
            if policy == "drop":
                self.ledger.record(episode.task.id, "dropped", reason=told)
            else:
                self.ledger.record(episode.task.id, "generating", version=now, reason=f"again, {told}")
                heapq.heappush(self._queue, Episode(ordinal, episode.task, episode.workflow))
        self.pump()
        return True

    def _consume(self, ordinals: list[int]) -> list[Group]:
        if self._untrained:
            self.mark_trained(self._num_steps)  # asked for the next batch: the one before is done with
        self.staleness.consume(ordinals)
        groups = [self._take(ordinal) for ordinal in ordinals]
        self.pump()
        return groups

    def _take(self, ordinal: int) -> Group:
        for t in self._usable(ordinal):
            self.counters.observe("staleness", self.staleness.version - t.min_version)
            self.counters.observe("generate_s", t.generate_s)
            self.counters.observe("reward_s", t.reward_s)
        episode = self._untrained[ordinal] = self._ready.pop(ordinal)
        assert episode.group is not None
        self.ledger.record(episode.task.id, "consumed", version=self.staleness.version)
        return episode.group

    def _usable(self, ordinal: int) -> list[Trajectory]:
        group = self._ready[ordinal].group
        assert group is not None, "ready episodes have a group"
        return usable(group).trajectories

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
        return f"{have}, and no task is left to run"

    def _notify(self) -> None:
        self.counters.num_events += 1
        self._changed.set()
