"""Hugging Face checkpoints during training: when, where, how many. Called by the training script on every rank."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from arealite.api.errors import ArealiteError
from arealite.observe.frequency import Frequency

if TYPE_CHECKING:
    from arealite.api.cli_args import SaverConfig
    from arealite.api.engine import TrainEngine
    from arealite.observe.run_folder import RunFolder

logger = logging.getLogger(__name__)

# What a full or broken disk looks like: plain I/O, safetensors' own error, and the RuntimeError of torch's zip writer.
WRITE_ERRORS: tuple[type[Exception], ...] = (OSError, SafetensorError, RuntimeError)


REMOVED = ".removed-"


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill in between leaves no half of it under its name. Never raises OSError."""
    hidden = path.with_name(f"{REMOVED}{path.name}")
    try:
        path.rename(hidden)
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)
        return
    shutil.rmtree(hidden, ignore_errors=True)


class FailureCount:
    """Failed saves: one is a warning and training goes on, the second in a row stops the run.

    One full disk may be passing; two in a row mean that the run is no longer protected, which its owner must know.
    """

    def __init__(self) -> None:
        self.num_failed = 0
        self._in_a_row = 0

    def succeeded(self) -> None:
        self._in_a_row = 0

    def failed(self, what: str, why: str, consequence: str) -> ArealiteError | None:
        """Count a failure; the error to raise when it is the second in a row."""
        self.num_failed += 1
        self._in_a_row += 1
        message = f"{what} could not be written ({why}); {consequence}"
        if self._in_a_row < 2:
            logger.warning("%s. Training goes on; make room before the next one", message)
            return None
        return ArealiteError(f"{message}. It is the second in a row, so the run stops: make room and start it again")


class Saver:
    """Saves `checkpoints/step_000020` when due and keeps the newest `num_kept`; never deletes the one just saved."""

    def __init__(self, config: SaverConfig, folder: RunFolder) -> None:
        self.frequency = Frequency(config)
        self._config = config
        self._folder = folder
        self._failures = FailureCount()

    @property
    def num_failed(self) -> int:
        """Saves that failed in this process."""
        return self._failures.num_failed

    def maybe_save(self, step: int, epoch: int, actor: TrainEngine) -> Path | None:
        """Save if it is due after `step` finished steps; the folder, or None. Collective."""
        return self.save(step, actor) if self.frequency.due(step, epoch, actor.collective) else None

    def save(self, step: int, actor: TrainEngine) -> Path | None:
        """Save now; None when it failed with a warning. Collective. `actor.save` swaps the folder in atomically.

        Raises ArealiteError on every rank at the second failure in a row.
        """
        path = self._folder.checkpoint(step)
        why = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            actor.save(str(path))
        except WRITE_ERRORS as error:
            if actor.collective.rank != 0:  # only rank 0 writes: this is no full disk
                raise
            logger.exception("checkpoint of step %d", step)
            why = str(error) or type(error).__name__
        why = actor.collective.broadcast(why)
        if why:
            stop = self._failures.failed(f"checkpoint {path}", why, "the earlier checkpoints are whole")
            if stop is not None:
                raise stop
            return None
        self._failures.succeeded()
        if actor.collective.rank == 0:
            self._prune(path)
        return path

    def _prune(self, saved: Path) -> None:
        for leftover in self._folder.checkpoints_dir.glob(f"{REMOVED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self._config.num_kept is None:
            return
        found = sorted(p for p in self._folder.checkpoints_dir.glob("step_*") if p.is_dir())
        others = [p for p in found if p != saved]
        for path in others[: max(0, len(found) - self._config.num_kept)]:
            remove_folder(path)
