"""Asks the model in training the held-out tasks and writes down how many it gets right. Called by the training script.

Collective: every trainer rank makes the same calls; the requests go out from rank 0, where the rollout head is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from arealite.api.errors import ArealiteError, RewardError
from arealite.evaluation.figures import CORRECT_REWARD, sizes
from arealite.evaluation.sheet import question_of
from arealite.evaluation.statistics import estimate, pass_at_k
from arealite.observe.progress import show
from arealite.observe.reasons import by_kind, last_line
from arealite.observe.records import EvaluationResult, rollout_rows, version_spans, workflow_means, write_evaluation
from arealite.observe.waits import in_background, waiting
from arealite.rollout.share import Beat, from_head

if TYPE_CHECKING:
    from arealite.api.protocols import Collective, RolloutWorkflow
    from arealite.api.types import Group, Task, Trajectory
    from arealite.observe.run_folder import RunFolder

LOOK_S = 0.1
LOOK_LIMIT_S = 60.0


class GroupRunner(Protocol):
    """The one call of the rollout head that is needed: outside staleness and ledger, on rank 0 only."""

    def run_groups(self, tasks: list[Task], workflow: RolloutWorkflow) -> list[Group]: ...


class Evaluator:
    """Runs `tasks` with `workflow` (built with eval_gconfig) beside what the trainer does: `begin` returns at once.

    The accuracy after a step is that of the weights of this step, all of whose answers are theirs: whoever is to give
    the servers other weights calls `finish` before. Rollouts go on meanwhile, and so does the trainer up to there.

    Results are in `evaluation/` of the run folder, so the accuracy before training outlives a restart. An evaluation
    that a kill cut short leaves a note there, by which the resumed run knows that it is owed.
    """

    def __init__(
        self,
        folder: RunFolder,
        rollout: GroupRunner,
        workflow: RolloutWorkflow,
        tasks: Sequence[Task],
        collective: Collective,
    ) -> None:
        self._folder = folder
        self._rollout = rollout
        self._workflow = workflow
        self._tasks = list(tasks)
        self._collective = collective
        self._running: int | None = None  # the step, on all ranks
        self._future: Future[tuple[list[Group], float]] | None = None  # on rank 0
        self._latest: EvaluationResult | None = None

    @property
    def is_running(self) -> bool:
        """Whether one has begun that `finish` has not ended; the same on all ranks."""
        return self._running is not None

    def begin(self, step: int) -> None:
        """Ask all tasks, of the weights that the servers have after `step`. Raises ArealiteError: no room for notes."""
        if self.is_running:
            raise ArealiteError(f"the evaluation after step {self._running} is still running: call finish() before")
        self._running = step
        if self._collective.rank == 0:
            try:
                self._folder.evaluation_dir.mkdir(parents=True, exist_ok=True)
                self._folder.owed_evaluation(step).touch()
            except OSError as error:
                raise self._no_room(error) from error
            self._future = in_background(self._ask, "evaluation")

    def finish(self) -> EvaluationResult | None:
        """Wait for the evaluation that runs; its result, on every rank, None if none runs. Collective.

        Raises RewardError when no answer could be scored, ArealiteError when the answers cannot be had or written.
        """
        step, self._running = self._running, None
        if step is None:
            return None
        size = self._collective.num_shares
        self._latest = from_head(lambda beat: [self._result(step, beat)] * size, self._collective)
        return self._latest

    def evaluate(self, step: int) -> EvaluationResult:
        """`begin` and `finish`. Asked again after the same step, it returns the result it has."""
        if self._latest is None or self._latest.step != step:
            self.begin(step)
            self.finish()
        assert self._latest is not None, "finish has set it or raised"
        return self._latest

    def _ask(self) -> tuple[list[Group], float]:
        start = time.monotonic()
        return self._rollout.run_groups(self._tasks, self._workflow), time.monotonic() - start

    def _result(self, step: int, beat: Beat) -> EvaluationResult:
        """On rank 0. Waits for: the held-out answers. Unblocked by: run_groups, which has a limit for their silence."""
        assert self._future is not None, "begun on this rank"
        with waiting("rollout.evaluation", "servers", LOOK_LIMIT_S) as wait:
            while not self._future.done():
                beat()
                time.sleep(LOOK_S)
                wait.restart()  # the limit is that of the requests themselves
        groups, evaluate_s = self._future.result()
        result = score(groups, step, len(self._tasks), evaluate_s)
        asked = [(group.task, trajectory) for group in groups for trajectory in group.trajectories]
        rows = [row | asked_row(*of_row) for row, of_row in zip(rollout_rows(groups), asked, strict=True)]
        try:
            write_evaluation(self._folder, result, rows)
            self._folder.owed_evaluation(step).unlink(missing_ok=True)
        except OSError as error:
            raise self._no_room(error) from error
        show(result.line())
        return result

    def _no_room(self, error: OSError) -> ArealiteError:
        folder = self._folder.evaluation_dir
        return ArealiteError(f"cannot write the evaluation to {folder}: {error.strerror}; make room there")


def asked_row(task: Task, trajectory: Trajectory) -> dict[str, Any]:
    """What the row of a held-out answer has beside that of a rollout, so that it can be graded again."""
    own = list(zip(trajectory.tokens, trajectory.loss_mask, strict=True))
    ids = {"prompt_ids": [t for t, is_own in own if not is_own], "token_ids": [t for t, is_own in own if is_own]}
    return {"question": question_of(task), "extras": task.extras, **ids}


def score(groups: Sequence[Group], step: int, num_tasks: int, evaluate_s: float) -> EvaluationResult:
    """The result of the groups of one evaluation. Raises RewardError when no answer has a reward."""
    trajectories = [t for group in groups for t in group.trajectories]
    rewards = [[t.reward for t in group.trajectories if t.reward is not None] for group in groups]
    scored = [task_rewards for task_rewards in rewards if task_rewards]
    if not scored:
        first = next((t.error for t in trajectories if t.error), "no answer came back")
        raise RewardError(
            f"none of the {num_tasks} held-out tasks has a scored answer, expected some accuracy; first error: {first}"
        )
    means = [sum(task_rewards) / len(task_rewards) for task_rewards in scored]
    accuracy = estimate(means, min(0.0, *means), max(1.0, *means))
    return EvaluationResult(
        step=step,
        accuracy=accuracy.mean,
        low=accuracy.low,
        high=accuracy.high,
        num_tasks=num_tasks,
        num_tasks_scored=len(scored),
        num_samples=sum(len(task_rewards) for task_rewards in scored),
        num_reward_errors=sum(t.status == "reward_error" for t in trajectories),
        num_failed=sum(t.status in ("failed", "aborted") for t in trajectories) + num_tasks - len(groups),
        evaluate_s=evaluate_s,
        versions=sorted({version for t in trajectories for version, _ in version_spans(t)}),
        pass_at=_pass_at(scored),
        means=workflow_means(t for t in trajectories if t.reward is not None),
        why=by_kind(last_line(t.error) for t in trajectories if t.status != "ok"),
    )


def _pass_at(scored: list[list[float]]) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, ... up to the samples of every task; empty for one sample per task."""
    fewest = min(len(task_rewards) for task_rewards in scored)
    if fewest < 2:
        return {}
    counts = [(len(rewards), sum(reward >= CORRECT_REWARD for reward in rewards)) for rewards in scored]
    return {k: float(np.mean([pass_at_k(n, num_correct, k) for n, num_correct in counts])) for k in sizes(fewest)}
