"""Writes what happened in each step: metrics.jsonl, rollouts/, TensorBoard events, the progress line.

Called by the training script on rank 0.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from arealite.observe.progress import Progress
from arealite.observe.rollout_log import Decoder, rollout_rows, rollout_stats, write_rows
from arealite.observe.sinks import MetricsFile, TensorBoardSink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arealite.api.cli_args import StatsLoggerConfig
    from arealite.api.types import Group
    from arealite.observe.run_folder import RunFolder


class StatsLogger:
    """Opens its files at the first commit, so it may be constructed on every rank and before a run is recovered.

    metrics.jsonl is the record of the run: when it cannot be written the run stops. The rollouts and the TensorBoard
    events are for reading: when they cannot be written (disk full) the step's are dropped with a warning, counted in
    the metric `num_logs_dropped`.
    """

    def __init__(
        self, folder: RunFolder, config: StatsLoggerConfig, total_steps: int, progress: Progress | None = None
    ) -> None:
        self._folder = folder
        self._config = config
        self._num_dropped = 0
        self._last_commit_s = time.monotonic()
        self._progress = progress or Progress(total_steps)
        self._metrics: MetricsFile | None = None
        self._tensorboard: TensorBoardSink | None = None

    def commit(
        self,
        step: int,
        epoch: int,
        stats: dict[str, float],
        groups: Sequence[Group] | None = None,
        tokenizer: Decoder | None = None,
    ) -> dict[str, float]:
        """Write step `step` (0 .. total_steps - 1: as many optimiser steps were done before it); returns its numbers.

        `groups` are the groups it trained on: their numbers (reward_mean, num_samples, ...) are added unless `stats`
        has them, and `tokens_per_s`, `samples_per_s` come from them and `step_s`; a loop that does not time its steps
        gets the time since the last commit as `step_s`. Call on rank 0. Raises ArealiteError when metrics.jsonl cannot
        be written.
        """
        metrics = self._metrics or self._open(step)
        merged = {name: float(value) for name, value in stats.items()}
        if groups is not None:
            merged = rollout_stats(groups) | merged
            self._write_rollouts(step, groups, tokenizer)
        since_s, self._last_commit_s = time.monotonic() - self._last_commit_s, time.monotonic()
        merged.setdefault("step_s", since_s)
        if merged["step_s"] > 0 and "num_completion_tokens" in merged:
            merged.setdefault("tokens_per_s", merged["num_completion_tokens"] / merged["step_s"])
            merged.setdefault("samples_per_s", merged["num_samples"] / merged["step_s"])
        if self._tensorboard is not None:
            try:
                self._tensorboard.write(step, merged)
            except OSError as error:
                self._drop(f"TensorBoard events from step {step} on: {error.strerror}")
                self._tensorboard = None
        if self._num_dropped:
            merged["num_logs_dropped"] = self._num_dropped
        metrics.write(step, epoch, merged)
        self._progress.step(step, merged)
        return merged

    def close(self) -> None:
        """Close what is open."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _open(self, first_step: int) -> MetricsFile:
        self._metrics = MetricsFile(self._folder.metrics, first_step)
        if self._config.tensorboard:
            self._tensorboard, why_not = TensorBoardSink.open(self._folder.tensorboard_dir, first_step)
            if why_not:
                self._progress.note(why_not)
        return self._metrics

    def _write_rollouts(self, step: int, groups: Sequence[Group], tokenizer: Decoder | None) -> None:
        if not self._config.save_rollouts:
            return
        try:
            write_rows(self._folder.rollouts(step), rollout_rows(groups, tokenizer))
        except OSError as error:
            self._drop(f"{self._folder.rollouts(step)}: {error.strerror}")

    def _drop(self, what: str) -> None:
        self._num_dropped += 1
        self._progress.note(f"log dropped ({self._num_dropped} so far), training goes on: {what}")
