"""Hugging Face checkpoints during training, and what they share with recovery points: folders that are whole or absent.

Called by the training script on every rank, and by recover.py and export.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from arealite.api.atomic import remove_folder
from arealite.api.errors import ArealiteError
from arealite.observe.frequency import Frequency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from arealite.api.protocols import Collective, Trained
    from arealite.api.run_args import SaverConfig
    from arealite.observe.run_folder import RunFolder

logger = logging.getLogger(__name__)

# What a full or broken disk looks like: plain I/O, safetensors' own error, and the RuntimeError of torch's zip writer.
WRITE_ERRORS: tuple[type[Exception], ...] = (OSError, SafetensorError, RuntimeError)


def attempt(write: Callable[..., None], *args: Any) -> str:
    """Why `write(*args)` could not write; "" when it could."""
    try:
        write(*args)
    except WRITE_ERRORS as error:
        logger.exception("a write failed")
        return str(error) or repr(error)
    return ""


def attempt_on_ranks(collective: Collective, write: Callable[..., None], *args: Any) -> str:
    """`write(*args)` on every rank; which ranks could not write and why, "" when all could. Collective."""
    found = collective.gather(attempt(write, *args))
    return "; ".join(f"rank {rank}: {why}" for rank, why in enumerate(found) if why)


class WriteFailures:
    """One failed write is a warning and training goes on, the second in a row stops the run.

    One full disk may be passing; two in a row mean that the run is no longer protected, which its owner must know.
    """

    def __init__(self) -> None:
        self._num_in_a_row = 0

    def was_written(self, what: str, why_not: str, last: bool = False) -> bool:
        """Whether `why_not` is "". The same on all ranks; raises ArealiteError at the second failure in a row, and at
        the `last` write of a run."""
        if not why_not:
            self._num_in_a_row = 0
            return True
        self._num_in_a_row += 1
        message = f"{what} could not be written ({why_not}); the earlier ones are whole"
        if self._num_in_a_row > 1 or last:
            number = "last of the run" if last else "second in a row"
            raise ArealiteError(f"{message}. It is the {number}, so the run stops: make room and start it again")
        logger.warning("%s. Training goes on; make room before the next one", message)
        return False


class Saver:
    """Saves `checkpoints/step_000020` when due and keeps the newest `num_kept`; never deletes the one just saved. The
    run's `tokenizer` goes into each, that of the model's folder if not given."""

    def __init__(
        self, config: SaverConfig, folder: RunFolder, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.frequency = Frequency(config)
        self._tokenizer = tokenizer
        self._config = config
        self._folder = folder
        self._failures = WriteFailures()

    def begin(self, step: int, epoch: int, actor: Trained, total_steps: int) -> None:
        """Before the first step, when `step` are finished. A run that has no more to make says so, and saves what it
        has, unless it did: it may have been stopped earlier, and its length been lowered. Collective."""
        self.frequency.restart(epoch)
        if step < total_steps:
            return
        if actor.collective.rank == 0:
            logger.warning(
                "this run has made all its %d steps (%s): raise total_train_steps to go on, or choose another"
                " trial_name for a new one",
                *(step, self._folder.root),
            )
        if not actor.collective.on_head(self._folder.checkpoint(step).exists):
            self.save(step, actor, last=True)

    def maybe_save(self, step: int, epoch: int, actor: Trained, last: bool = False) -> Path | None:
        """Save if it is due after `step` finished steps, or when this was the `last` one; the folder, or None.
        Collective."""
        return self.save(step, actor, last) if self.frequency.due(step, epoch, actor.collective, last) else None

    def save(self, step: int, actor: Trained, last: bool = False) -> Path | None:
        """Save now; None when it failed with a warning. Collective. `actor.save` swaps the folder in atomically.

        Raises ArealiteError on every rank at the second failure in a row, and when the `last` weights are not saved.
        """
        path = self._folder.checkpoint(step)
        why_not = attempt_on_ranks(actor.collective, actor.save, str(path), self._tokenizer)
        if not self._failures.was_written(f"checkpoint {path}", why_not, last):
            return None
        if actor.collective.rank == 0:
            self._prune(path)
        return path

    def _prune(self, saved: Path) -> None:
        if self._config.num_kept is None:
            return
        found = sorted(p for p in saved.parent.glob("step_*") if p.is_dir())
        others = [p for p in found if p != saved]
        for path in others[: max(0, len(found) - self._config.num_kept)]:
            remove_folder(path)
