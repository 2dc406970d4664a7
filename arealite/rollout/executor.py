"""The table of tasks in flight: keeps as many running as the staleness bound allows, and hands out finished groups.

Made by client.py on trainer rank 0; everything here runs in the client's asyncio loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, get_args

from arealite.api.cli_args import InferenceEngineConfig
from arealite.api.errors import RecoveryError, WorkflowError
from arealite.api.protocols import Adaptive, InferenceEngine, RolloutWorkflow
from arealite.api.types import Group, Task, Trajectory, as_record
from arealite.observe.reasons import last_line, reasons
from arealite.observe.waits import mark
from arealite.rollout.counters import Counters
from arealite.rollout.episodes import EpisodeFailed, run_episode
from arealite.rollout.ledger import Ledger, State
from arealite.rollout.staleness import StalenessBound

MAX_REJECTED_STEPS = 100  # steps' worth of groups that should_accept may refuse in a row, before the run stops

Filter = Callable[[Group], bool]
Slots = AbstractAsyncContextManager[None]
ANY: Slots = nullcontext()


@dataclass
class TaskRow:
    """A task from being issued until it is trained or dropped.

    `state`: as in the ledger; `version`: of the weights when it was started; `workflow` None: whichever is given first
    (after a recovery); `group` is set once it is rewarded; `is_bounded`: it counts for the staleness bound.
    """

    ordinal: int
    task: Task
    workflow: RolloutWorkflow | None = None
    state: State = "issued"
    version: int = 0
    group: Group | None = None
    is_bounded: bool = True

    def usable(self) -> list[Trajectory]:
        """The trajectories that are trained on."""
        assert self.group is not None, "only rewarded rows are looked at"
        return [t for t in self.group.trajectories if t.status == "ok"]


class RolloutExecutor:
    """Consumes: issued tasks. Produces: groups for `next_step`. Waits for: the episodes it started (each request and
    reward call in them has its own limit). Unblocked by: episodes that end, new versions, new tasks, `pump`.

    Nothing runs in the background but the episodes themselves: whatever may make room calls `pump`. `is_held` says
    whether generation is paused: no episode starts then.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        bound: StalenessBound,
        ledger: Ledger,
        config: InferenceEngineConfig,
        counters: Counters,
        is_held: Callable[[], bool] = lambda: False,
        max_rejected_steps: int = MAX_REJECTED_STEPS,
    ) -> None:
        self.engine, self.bound, self.ledger, self.config, self.counters = engine, bound, ledger, config, counters
        self.version = 0
        self._is_held = is_held
        self._max_rejected = max_rejected_steps * bound.batch_size
        self._should_accept: Filter | None = None
        self._source: Adaptive | None = None
        self._workflow: RolloutWorkflow | None = None  # the one given last
        self._rows: dict[State, dict[int, TaskRow]] = {state: {} for state in get_args(State)}  # by ordinal
        self._num_issued = self._num_steps = self._num_consumed = 0
        self._num_failed_in_a_row = self._num_rejected_in_a_row = 0
        self._error: BaseException | None = None
        self._episodes: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    # -- tasks in ------------------------------------------------------------------------------------------------

    def submit(
        self, tasks: list[Task], workflow: RolloutWorkflow, accept: Filter | None = None, source: Adaptive | None = None
    ) -> None:
        """Issue `tasks`, in order; they start as soon as there is capacity. From now on `source` is told of each group
        that ends, and those that `accept` refuses are dropped."""
        self._workflow, self._should_accept, self._source = workflow, accept, source
        for task in tasks:
            self._issue(task, workflow)
        self.pump()

    def num_wanted(self) -> int:
        """Tasks to draw now: what capacity allows, and one step's worth to fill places that become free before the
        caller draws again."""
        return max(0, max(0, self._capacity()) + self.bound.batch_size - len(self._rows["issued"]))

    def pump(self) -> None:
        """Start issued tasks, oldest first, while there is capacity."""
        issued = self._rows["issued"]
        while issued and self._workflow and not self._is_held() and self._error is None and self._capacity() > 0:
            self._start(issued[min(issued)], self._workflow)

    # -- groups out ----------------------------------------------------------------------------------------------

    async def next_step(self, num_groups: int, may_draw: bool = False) -> list[Group] | None:
        """The next `num_groups` groups, in ordinal order; None (only if `may_draw`) when more tasks are needed.

        Consumes: finished groups. Produces: one step's groups. Waits for: enough of them, and those that would be too
        old at a later step. Unblocked by: episodes that end, or an error.

        Raises:
            WorkflowError: too many groups in a row failed or were refused, or nothing is left that could end the wait.
        """
        while True:
            if self._error is not None:
                raise self._error
            ordinals = self.bound.select(self.version, *self._versions(), num_groups)
            if ordinals is not None:
                if not self._sift_stale(ordinals):
                    return self._consume(ordinals)
                continue
            stuck = self._stuck(num_groups)
            if may_draw and not self._rows["issued"] and (stuck is None or self._capacity() > 0):
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
        slots = asyncio.Semaphore(self.bound.max_concurrent)
        rows = [self._issue(task, workflow, is_bounded=False) for task in tasks]
        await asyncio.gather(*(self._start(row, workflow, slots) for row in rows), return_exceptions=True)
        if self._error is not None:
            raise self._error
        ordinals = [row.ordinal for row in rows if row.state == "rewarded"]
        if tasks and not ordinals:
            raise WorkflowError(f"none of the batch's {len(tasks)} groups is left: all failed or were filtered out")
        return self._consume(ordinals)

    def mark_trained(self, step: int, untrained: Mapping[str, str] | None = None) -> None:
        """The consumed groups have been trained on in `step`, but for those of `untrained` tasks: {id: reason}."""
        for row in list(self._rows["consumed"].values()):
            if reason := (untrained or {}).get(row.task.id):
                self.counters.add("num_untrained")
                reasons.count("not trained", reason)
                self._move(row, "dropped", step=step, reason=reason)
            else:
                self._move(row, "trained", step=step)
        self._num_steps = step + 1

    def set_version(self, version: int) -> None:
        if version > self.version and self._rows["consumed"]:
            self.mark_trained(self._num_steps)  # new weights: the batch taken before has gone into them
        self.version = version
        self.pump()
        self._notify()

    async def close(self, reason: str) -> None:
        """Cancel what runs, drop, with the reason, every task that was not trained, and end the ledger."""
        self._error = self._error or WorkflowError(f"no groups any more: {reason}")
        for episode in self._episodes:
            episode.cancel()
        await asyncio.gather(*self._episodes, return_exceptions=True)
        for rows in self._rows.values():
            for row in list(rows.values()):
                self._move(row, "dropped", reason=reason)
        self.ledger.close()
        self._notify()

    def pending(self) -> list[str]:
        """Lines about what the next step waits for."""
        running, num_ready = self._rows["generating"], len(self._rows["rewarded"])
        due = set(self.bound.awaited(self.version, *self._versions()))
        lines = [
            f"task {row.task.id} (group {ordinal}{', due at this step' if ordinal in due else ''})"
            for ordinal, row in sorted(running.items(), key=lambda entry: (entry[0] not in due, entry[0]))
        ]
        return [f"{num_ready} groups ready, {len(running)} running, {len(self._rows['issued'])} queued", *lines]

    # -- recovery ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The table, JSON-able: what a recovery point must hold so that no task is lost or used twice.

        `ready`: finished groups not yet trained on, with the version at their start; `waiting`: the other tasks that
        were issued; `ledger_bytes`: length of the ledger at this point, later lines are void after a recovery.
        """
        consumed = self._rows["consumed"]
        waiting, ready = self._rows["generating"] | self._rows["issued"], self._rows["rewarded"] | consumed
        return {
            "version": self.version,
            "num_issued": self._num_issued,
            "num_consumed": self._num_consumed - sum(row.is_bounded for row in consumed.values()),
            "num_steps": self._num_steps,
            "ledger_bytes": self.ledger.num_bytes(),
            "waiting": [{"ordinal": o, "task": as_record(row.task)} for o, row in sorted(waiting.items())],
            "ready": [
                {"started_version": row.version, "group": as_record(row.group)} for _, row in sorted(ready.items())
            ],
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
            self.version, self._num_consumed = state["version"], state["num_consumed"]
            waiting = [TaskRow(saved["ordinal"], Task(**saved["task"])) for saved in state["waiting"]]
            self._rows["issued"] = {row.ordinal: row for row in waiting}
            for ready in state["ready"]:
                record = ready["group"]
                task, trajectories = Task(**record["task"]), [Trajectory(**t) for t in record["trajectories"]]
                group = Group(task, record["ordinal"], trajectories)
                row = TaskRow(group.ordinal, task, None, "rewarded", ready["started_version"], group)
                self._rows["rewarded"][row.ordinal] = row
            self.ledger.resume(state["ledger_bytes"], self._num_steps)
        except (KeyError, TypeError) as error:
            raise RecoveryError(f"the rollout state of this recovery point cannot be read: {error!r}") from error

    # -- inside --------------------------------------------------------------------------------------------------

    def _move(self, row: TaskRow, state: State, step: int | None = None, reason: str | None = None) -> None:
        """The one place where a task's state changes: ledger and table say the same. `generating` again is a retry."""
        version = {"generating": row.version, "consumed": self.version}.get(state)
        self.ledger.record(row.task.id, state, version, step, reason)
        self._rows[row.state].pop(row.ordinal, None)
        row.state = state
        if state not in ("trained", "dropped"):
            self._rows[state][row.ordinal] = row

    def _issue(self, task: Task, workflow: RolloutWorkflow, is_bounded: bool = True) -> TaskRow:
        row = TaskRow(self._num_issued, task, workflow, is_bounded=is_bounded)
        self._num_issued += 1
        self.counters.add("num_issued")
        self._move(row, "issued")
        return row

    def _capacity(self) -> int:
        num_running, num_ready = len(self._rows["generating"]), len(self._rows["rewarded"])
        return self.bound.capacity(self.version, self._num_consumed, num_running, num_ready)

    def _versions(self) -> tuple[dict[int, int], dict[int, int]]:
        """{ordinal: version at the start} of running and of ready groups."""
        running, ready = ({o: r.version for o, r in self._rows[s].items()} for s in ("generating", "rewarded"))
        return running, ready

    def _start(self, row: TaskRow, workflow: RolloutWorkflow, slots: Slots = ANY) -> asyncio.Task[None]:
        row.workflow, row.version = row.workflow or workflow, self.version
        self._move(row, "generating")
        episode = asyncio.ensure_future(self._run(row, row.workflow, slots))
        self._episodes.add(episode)
        episode.add_done_callback(self._ended)
        return episode

    def _ended(self, episode: asyncio.Task[None]) -> None:
        self._episodes.discard(episode)
        if not episode.cancelled() and episode.exception() is not None:
            self._error = self._error or episode.exception()  # the filter's or our own; next_step raises it
        self.pump()
        self._notify()

    async def _run(self, row: TaskRow, workflow: RolloutWorkflow, slots: Slots) -> None:
        """From generating to rewarded, or to dropped when it failed or was filtered out."""

        def on_retry(reason: str) -> None:
            self.counters.add("num_retries")
            reasons.count("retries", reason.partition(" after ")[2])
            self._move(row, "generating", reason=reason)

        async with slots:
            if self._error is not None:
                return  # the run stops, and `close` drops the task
            try:
                found = await run_episode(self.engine, row.task, workflow, self.config.workflow_retries, on_retry)
            except EpisodeFailed as failure:
                self._failed(row, failure)
                return
        failed = next((t for t in found if t.status == "reward_error"), None)
        if failed is not None and self.config.reward_failure != "answer":
            reason = f"a reward failed: {last_line(failed.error)}"
            self._failed(row, EpisodeFailed(reason, failed.error, found))
            return
        self._num_failed_in_a_row = 0
        row.group = Group(row.task, row.ordinal, found)
        self._move(row, "rewarded")
        self._count_errors(found)
        usable = replace(row.group, trajectories=row.usable())
        if self._source is not None:
            self._source.note(usable)
        if self._should_accept is not None and not self._should_accept(usable):
            self._rejected(row)
            return
        self._num_rejected_in_a_row = 0
        self.counters.add("num_accepted")
        mark("group")

    def _failed(self, row: TaskRow, failure: EpisodeFailed) -> None:
        self.counters.add("num_failed")
        reasons.count("failed", failure.reason)
        self._count_errors(failure.trajectories)
        self._move(row, "dropped", reason=failure.reason)
        self._num_failed_in_a_row += 1
        if self.config.reward_failure == "stop" and any(t.status == "reward_error" for t in failure.trajectories):
            self._error = self._error or WorkflowError(
                f"task {row.task.id}: {failure.reason} (rollout.reward_failure is stop)\n{failure.detail}"
            )
        if self._num_failed_in_a_row >= self.config.max_failed_groups:
            self._error = self._error or WorkflowError(
                f"{self._num_failed_in_a_row} groups in a row failed (rollout.max_failed_groups); the last was task"
                f" {row.task.id}: {failure.reason}\n{failure.detail}"
            )

    def _count_errors(self, trajectories: Sequence[Trajectory]) -> None:
        for t in trajectories:
            if t.status == "reward_error":
                self.counters.add("num_reward_errors")
                reasons.count("reward errors", last_line(t.error))

    def _rejected(self, row: TaskRow) -> None:
        self.counters.add("num_rejected")
        self._move(row, "dropped", reason="filtered")
        self._num_rejected_in_a_row += 1
        if self._num_rejected_in_a_row >= self._max_rejected:
            self._error = self._error or WorkflowError(
                f"should_accept refused {self._num_rejected_in_a_row} groups in a row: no step can be filled. Look at"
                " the rewards of the run's rollouts, or accept more"
            )

    def _sift_stale(self, ordinals: list[int]) -> bool:
        """Deal with groups older than eta by `stale_policy`; whether some of `ordinals` are no longer ready."""
        limit, ready = self.bound.max_staleness, self._rows["rewarded"]
        ages = {o: self.version - min(t.min_version for t in ready[o].usable()) for o in ordinals}
        stale = [o for o in ordinals if ages[o] > limit]
        self.counters.add("num_stale", len(stale))
        if self.config.stale_policy == "correct" or not stale:
            return False
        for ordinal in stale:
            reason = f"stale: {ages[ordinal]} versions old, at most {limit} allowed"
            if self.config.stale_policy == "drop":
                self._move(ready[ordinal], "dropped", reason=reason)
            else:
                self._move(ready[ordinal], "issued", reason=f"again, {reason}")
        self.pump()
        return True

    def _consume(self, ordinals: list[int]) -> list[Group]:
        if self._rows["consumed"]:
            self.mark_trained(self._num_steps)  # asked for the next batch: the one before is done with
        groups = []
        for row in [self._rows["rewarded"][ordinal] for ordinal in ordinals]:
            for t in row.usable():
                self.counters.observe("staleness", self.version - t.min_version)
                self.counters.observe("generate_s", t.generate_s)
                self.counters.observe("reward_s", t.reward_s)
            self._move(row, "consumed")
            self._num_consumed += row.is_bounded
            assert row.group is not None
            groups.append(row.group)
        self.pump()
        return groups

    def _stuck(self, num_groups: int) -> str | None:
        """Why no amount of waiting would bring `num_groups` groups; None while something may still happen."""
        have = f"{len(self._rows['rewarded'])} of {num_groups} groups are ready"
        if self._is_held():
            return f"{have} and generation is paused: call resume() before taking a batch"
        if self._rows["generating"]:
            return None
        if self._capacity() <= 0:
            return (
                f"{have} and the staleness bound allows no more at version {self.version} (eta ="
                f" {self.bound.max_staleness}): send new weights (upload_weights) between two batches, or raise"
                " rollout.max_head_offpolicyness"
            )
        return f"{have}, and no task is left to run"

    def _notify(self) -> None:
        self.counters.num_events += 1
        self._changed.set()
