"""Asks the current model the held-out tasks and writes down how many it gets right. Called by the training script.

Collective: every trainer rank makes the same calls; the requests go out from rank 0, where the rollout head is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import comb
from typing import TYPE_CHECKING, Protocol

import numpy as np

from arealite.api.errors import ArealiteError, RewardError
from arealite.observe.progress import show
from arealite.observe.reasons import by_kind, last_line
from arealite.observe.records import EvaluationResult, rollout_rows, write_evaluation
from arealite.rollout.share import Beat, from_head

if TYPE_CHECKING:
    from arealite.api.protocols import Collective, RolloutWorkflow
    from arealite.api.types import Group, Task
    from arealite.observe.run_folder import RunFolder

CORRECT_REWARD = 1.0  # an answer counts for pass@k when its reward is at least this


class GroupRunner(Protocol):
    """The one call of the rollout head that is needed: outside staleness and ledger, on rank 0 only."""

    def run_groups(self, tasks: list[Task], workflow: RolloutWorkflow, beat: Beat) -> list[Group]: ...


class Evaluator:
    """Runs `tasks` with `workflow` (built with eval_gconfig).

    Results are in `evaluation/` of the run folder, so the accuracy before training outlives a restart.
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
        self._latest: EvaluationResult | None = None

    def measure(self, step: int) -> dict[str, float]:
        """As `evaluate`: the numbers of a training run's metrics, by name."""
        result = self.evaluate(step)
        return {} if result is None else {"accuracy": result.accuracy}

    def evaluate(self, step: int) -> EvaluationResult | None:
        """The result on every rank, None when there are no held-out tasks. Collective.

        Asked again after the same step, it returns the result it has: the weights are the same.

        Raises RewardError when no answer could be scored, ArealiteError when the answers cannot be had or written.
        """
        if not self._tasks:
            return None
        if self._latest is None or self._latest.step != step:
            size = self._collective.num_shares
            self._latest = from_head(lambda beat: [self._run(step, beat)] * size, self._collective)
        return self._latest

    def _run(self, step: int, beat: Beat) -> EvaluationResult:
        start = time.monotonic()
        groups = self._rollout.run_groups(self._tasks, self._workflow, beat)
        result = score(groups, step, len(self._tasks), time.monotonic() - start)
        questions = {group.task.id: _question(group.task) for group in groups}
        rows = [row | {"question": questions[row["task"]]} for row in rollout_rows(groups)]
        try:
            write_evaluation(self._folder, result, rows)
        except OSError as error:
            raise ArealiteError(
                f"cannot write the evaluation to {self._folder.evaluation_dir}: {error.strerror}; make room there"
            ) from error
        show(result.line())
        return result


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
    accuracy, stderr = mean_and_stderr([sum(task_rewards) / len(task_rewards) for task_rewards in scored])
    return EvaluationResult(
        step=step,
        accuracy=accuracy,
        stderr=stderr,
        num_tasks=num_tasks,
        num_tasks_scored=len(scored),
        num_samples=sum(len(task_rewards) for task_rewards in scored),
        num_reward_errors=sum(t.status == "reward_error" for t in trajectories),
        num_failed=sum(t.status in ("failed", "aborted") for t in trajectories) + num_tasks - len(groups),
        evaluate_s=evaluate_s,
        pass_at=_pass_at(scored),
        why=by_kind(last_line(t.error) for t in trajectories if t.status != "ok"),
    )


def _pass_at(scored: list[list[float]]) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, ... up to the samples of every task; empty for one sample per task."""
    fewest = min(len(task_rewards) for task_rewards in scored)
    if fewest < 2:
        return {}
    counts = [(len(rewards), sum(reward >= CORRECT_REWARD for reward in rewards)) for rewards in scored]
    sizes = [2**i for i in range(fewest.bit_length())]
    return {k: float(np.mean([pass_at_k(n, num_correct, k) for n, num_correct in counts])) for k in sizes}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: unbiased for pass@k.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code". Raises ValueError unless
    0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}, expected 0 .. {num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}, expected 1 .. {num_samples} (the number of samples)")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least one value and its standard error (sample standard deviation over the root of n; 0 for one)."""
    array = np.asarray(values, dtype=np.float64)
    stderr = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else 0.0
    return float(array.mean()), stderr


def _question(task: Task) -> str:
    """What the user asked: the raw prompt, or the content of the last message."""
    return task.prompt if task.prompt is not None else str((task.messages or [{"content": ""}])[-1]["content"])
