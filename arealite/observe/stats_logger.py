"""Writes what happened in each step: metrics.jsonl, rollouts/, TensorBoard events, the progress line.

Called around the training loop on rank 0.
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import TYPE_CHECKING, Any

from arealite.api.atomic import finite_json, write_jsonl
from arealite.api.errors import ArealiteError
from arealite.observe.progress import Progress
from arealite.observe.reasons import reasons
from arealite.observe.records import rollout_rows, rollout_stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.tensorboard import SummaryWriter

    from arealite.api.run_args import StatsLoggerConfig
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
        self._folder, self._config = folder, config
        self._num_dropped = 0
        self._last_commit_s = time.monotonic()
        self._progress = progress or Progress(total_steps)
        self._is_open = False
        self._tensorboard: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """Tell the person who watches that data and model are loaded, before step `step`."""
        self._progress.begin(step)

    def commit(
        self,
        step: int,
        epoch: int,
        stats: dict[str, float],
        groups: Sequence[Group] | None = None,
        tokenizer: Any = None,
    ) -> dict[str, float]:
        """Write step `step` (0 .. total_steps - 1: as many steps were done before it); returns its numbers.

        `groups` are the groups it trained on: their numbers (reward_mean, num_samples, ...) are added unless `stats`
        has them, and `tokens_per_s`, `samples_per_s` come from them and `step_s`; a loop that does not time its steps
        gets the time since the last commit as `step_s`. Call on rank 0. Raises ArealiteError when metrics.jsonl cannot
        be written.
        """
        if not self._is_open:
            self._open(step)
        since_s, self._last_commit_s = time.monotonic() - self._last_commit_s, time.monotonic()
        merged = {"step_s": since_s} | ({} if groups is None else rollout_stats(groups))
        merged |= {name: float(value) for name, value in stats.items()}
        if groups is not None and self._config.save_rollouts:
            try:
                write_jsonl(self._folder.rollouts(step), rollout_rows(groups, tokenizer))
            except OSError as error:
                self._drop(f"{self._folder.rollouts(step)}: {error.strerror}")
        for count, rate in (("num_completion_tokens", "tokens_per_s"), ("num_samples", "samples_per_s")):
            if merged["step_s"] > 0 and count in merged:
                merged.setdefault(rate, merged[count] / merged["step_s"])
        self._write_events(step, merged)
        if self._num_dropped:
            merged["num_logs_dropped"] = self._num_dropped
        record: dict[str, Any] = {"step": step, "epoch": epoch, "at": time.time(), **merged}
        if why := reasons.drain():
            record["why"] = why
        if nonfinite := sorted(name for name, value in merged.items() if not math.isfinite(value)):
            record["nonfinite"] = nonfinite
        self._append(record)
        self._progress.step(step, merged, why)
        return merged

    def close(self) -> None:
        """Close what is open."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _open(self, first_step: int) -> None:
        self._append({"event": "resumed", "step": first_step, "at": time.time()}, resumes=True)
        self._is_open = True
        if self._config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # slow to load

                self._tensorboard = SummaryWriter(str(self._folder.tensorboard_dir), purge_step=first_step)
            except ImportError as error:
                remedy = "pip install tensorboard, or set stats_logger.tensorboard=false"
                self._progress.note(f"no TensorBoard events: {error}; {remedy}")
            except OSError as error:
                self._progress.note(f"no TensorBoard events: {error}")

    def _append(self, record: dict[str, Any], resumes: bool = False) -> None:
        """One line of metrics.jsonl, handed to the system before this returns. `resumes`: only to what an earlier start
        of the run has left, whose last line a kill may have cut off."""
        path, line = self._folder.metrics, f"{json.dumps(finite_json(record), allow_nan=False)}\n".encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+b") as file:
                if resumes and file.tell():
                    file.seek(-1, os.SEEK_END)
                    file.write(line if file.read() == b"\n" else b"\n" + line)
                elif not resumes:
                    file.write(line)
        except OSError as error:
            raise ArealiteError(
                f"cannot write {path}: {error.strerror}. The metrics are the record of the run, so it stops here; make"
                " room or set cluster.fileroot to another disk, and start the same command again to go on"
            ) from error

    def _write_events(self, step: int, stats: dict[str, float]) -> None:
        if self._tensorboard is None:
            return
        try:
            for name, value in stats.items():
                if math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        except OSError as error:
            self._drop(f"TensorBoard events from step {step} on: {error.strerror}")
            self._tensorboard = None

    def _drop(self, what: str) -> None:
        self._num_dropped += 1
        self._progress.note(f"log dropped ({self._num_dropped} so far), training goes on: {what}")
