"""Recovery points: everything a killed run needs to go on as if nothing had happened. Called by the training script.

A point is a folder, recover/point_000020: point.json (step, configuration, data position, rollout head), actor/ (model,
optimizer, schedule, RNG of every rank), COMPLETE (sizes of all files, written last). The state is copied, and a thread
writes the copy while training goes on: under a hidden name, renamed when all is on disk. A kill at any moment leaves
the points there were, or one more.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arealite.api.cli_args import GRPOConfig
from arealite.api.errors import ArealiteError, RecoveryError
from arealite.engine import checkpoint
from arealite.engine.checkpoint import WriteFailures, attempt, attempt_on_ranks
from arealite.engine.state import sync
from arealite.observe.frequency import Frequency
from arealite.observe.waits import in_background, waiting

if TYPE_CHECKING:
    from arealite.api.cli_args import RecoverConfig, RunConfig
    from arealite.api.engine import Collective
    from arealite.observe.run_folder import RunFolder

logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE"


class Stateful(Protocol):
    """The rollout client or the data loader: its state is a JSON-ready dict, saved on rank 0 (the head) and given back
    to every rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Recoverable(Protocol):
    """The trainer's side of a point, as in api.engine.TrainEngine: an engine, or several together (roles.py)."""

    @property
    def collective(self) -> Collective: ...

    @property
    def background(self) -> Collective: ...

    def stage_state(self, path: str) -> Callable[[], None]: ...

    def load_state(self, path: str) -> None: ...


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """What a run must keep to go on from a point: its model, its tasks in their order, and the shape of a step.

    Learning rates, lengths, frequencies and machines may change at a restart.
    """
    key, trained = config.trained
    kept: dict[str, Any] = {f"{key}.path": trained.path, "seed": config.seed}
    if trained.lora is not None:
        kept |= {f"{key}.lora.{name}": value for name, value in vars(trained.lora).items()}
    if isinstance(config, GRPOConfig):
        kept |= {"gconfig.n_samples": config.gconfig.n_samples, "critic": config.critic is not None}
    kept |= {f"train_dataset.{name}": value for name, value in vars(config.train_dataset).items()}
    # Through JSON, as it will be read back: a tuple is a list then, and they would differ.
    return dict(json.loads(json.dumps(kept)))


@dataclass
class _Writing:
    """A point that is being written; `outcome` is why it could not be, "" if it is whole: the same on all ranks."""

    point: Path
    outcome: Future[str]


class RecoverHandler:
    """Writes recovery points when due and loads the newest one; all ranks make the same calls.

    A point that cannot be written (disk full) is a warning, and the points before it stay whole; the second failure in
    a row stops the run. `epoch` is the epoch of the point that was loaded.
    """

    def __init__(self, config: RecoverConfig, folder: RunFolder, run_config: RunConfig) -> None:
        self.frequency = Frequency(config)
        self.epoch = 0
        self._config = config
        self._folder = folder
        self._fingerprint = fingerprint(run_config)
        self._limit_s = run_config.trained[1].collective_timeout_s
        self._failures = WriteFailures()
        self._writing: _Writing | None = None  # one at most

    def maybe_save(
        self, step: int, epoch: int, actor: Recoverable, rollout: Stateful, dataloader: Stateful
    ) -> Path | None:
        """Begin a point if it is due after `step` finished steps; its folder to be, or None. Collective.

        Call it last of all that belongs to the step: what comes after it is done again after a kill. `finish` waits
        for the last one. Raises as `finish` does: a failure shows at the first call after it.
        """
        if self._config.mode == "off":
            return None
        writing = self._writing
        if writing is not None and actor.collective.on_head(writing.outcome.done):
            self.finish()
        if not self.frequency.due(step, epoch, actor.collective):
            return None
        return self._begin(step, epoch, actor, rollout, dataloader)

    def save(self, step: int, epoch: int, actor: Recoverable, rollout: Stateful, dataloader: Stateful) -> Path | None:
        """Write a point now; None when that failed with a warning. Collective. Raises as `finish` does."""
        begun = self._begin(step, epoch, actor, rollout, dataloader)
        return begun and self.finish()

    def _begin(self, step: int, epoch: int, actor: Recoverable, rollout: Stateful, dataloader: Stateful) -> Path | None:
        """Copy everything as it is now and leave the rest to a thread. None when that failed with a warning."""
        self.finish()
        collective, point = actor.collective, self._folder.recovery_point(step)
        partial = checkpoint.partial_name(point)

        def begin() -> str:
            states = {"rollout": rollout.state_dict(), "dataloader": dataloader.state_dict()}
            record = {"step": step, "epoch": epoch, "at": time.time(), **states, "fingerprint": self._fingerprint}
            why_not = attempt(_begin, partial, record)
            if why_not:
                shutil.rmtree(partial, ignore_errors=True)
            return why_not

        why_not = collective.on_head(begin)
        if why_not:
            self._failures.was_written(f"recovery point {point}", why_not)
            return None
        write, ranks = actor.stage_state(str(partial / "actor")), actor.background
        outcome = in_background(lambda: self._write(partial, point, write, ranks), f"recovery point {point.name}")
        self._writing = _Writing(point, outcome)
        return point

    def _write(self, partial: Path, point: Path, write: Callable[[], None], ranks: Collective) -> str:
        """Why the point could not be written; "" if it is in place.

        Consumes: the copied state. Produces: the point. Waits for: the writing threads of the other ranks, each at
        most `collective_timeout_s`. Unblocked by: these threads, or the death of a rank.
        """
        why_not = attempt_on_ranks(ranks, write)
        if not why_not:
            why_not = ranks.on_head(lambda: attempt(_finish, partial, point))
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            if not why_not:
                self._prune()
        return why_not

    def finish(self) -> Path | None:
        """Wait for the point that is being written, at most `collective_timeout_s`; None if there was none, or when it
        failed with a warning. All ranks make the call.

        Raises:
            ArealiteError: the second failure in a row, on every rank.
            WaitTimeout: the disk is too slow.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        with waiting(f"recovery point {writing.point.name} on disk", "disk", self._limit_s) as wait:
            if not futures.wait([writing.outcome], wait.left_s).done:
                raise wait.expired()
        is_whole = self._failures.was_written(f"recovery point {writing.point}", writing.outcome.result())
        return writing.point if is_whole else None

    def close(self) -> None:
        """`finish` at the end of a run that may have failed: what is wrong with the point is a warning."""
        try:
            self.finish()
        except (ArealiteError, RuntimeError) as error:  # RuntimeError: torch, when another rank is gone
            logger.warning("the last recovery point: %s", error)

    def load(self, actor: Recoverable, rollout: Stateful, dataloader: Stateful) -> int:
        """Restore the newest complete point; returns the number of finished steps, that is the next step (counted from
        0); 0 when there is no point. Collective.

        Raises RecoveryError on every rank: mode "fresh" in a folder with points, a point of another configuration, or
        points of which none is complete.
        """
        found = actor.collective.on_head(self._choose)
        if found is None:
            return 0
        step = int(found["step"])
        point = self._folder.recovery_point(step)
        actor.load_state(str(point / "actor"))
        dataloader.load_state_dict(found["dataloader"])
        rollout.load_state_dict(found["rollout"])
        if actor.collective.rank == 0:
            logger.warning("going on after step %d, from %s", step, point)
        self.epoch = found["epoch"]
        self.frequency.restart(self.epoch)
        return step

    def _choose(self) -> dict[str, Any] | None:
        """The newest complete point's record; None when there is no point, or when none is wanted."""
        for folder in (self._folder.recover_dir, self._folder.checkpoints_dir):
            checkpoint.clean(folder)
        points = self._points()
        if not points or self._config.mode == "off":
            return None
        if self._config.mode == "fresh":
            raise RecoveryError(
                f"recover.mode=fresh, and {self._folder.recover_dir} holds {points[-1].name} of an earlier run; "
                "expected an unused folder. Choose another trial_name, or recover.mode=auto to go on with that run"
            )
        for point in reversed(points):
            record = _read(point)
            if record is not None:
                self._compare(point, record["fingerprint"])
                return record
            logger.warning("recovery point %s is not complete: trying the one before", point)
        raise RecoveryError(
            f"none of the recovery points in {self._folder.recover_dir} is complete "
            f"({', '.join(p.name for p in points)}); restore one, or delete them to start from step 0"
        )

    def _compare(self, point: Path, theirs: dict[str, Any]) -> None:
        ours = self._fingerprint
        lines = [
            f"  {key}: {theirs.get(key)!r} in the point, {ours.get(key)!r} in this configuration\n"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        if lines:
            raise RecoveryError(
                f"recovery point {point} belongs to another configuration:\n{''.join(lines)}"
                "Set these back to go on with that run, or choose another trial_name for a new one"
            )

    def _points(self) -> list[Path]:
        """Folders named as points, complete or not, oldest first."""
        return sorted(path for path in self._folder.recover_dir.glob("point_*") if path.is_dir())

    def _prune(self) -> None:
        """Keep the newest complete points; only after the newest is complete."""
        complete = [point for point in self._points() if _read(point) is not None]
        for point in complete[: -self._config.num_kept]:
            checkpoint.remove_folder(point)


def _begin(partial: Path, record: dict[str, Any]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "actor").mkdir(parents=True)
    (partial / "point.json").write_text(json.dumps(record), encoding="utf-8")


def _finish(partial: Path, point: Path) -> None:
    """Put the whole folder on disk, mark it complete, rename it into place."""
    paths = sorted(partial.rglob("*"))
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in paths if path.is_file()}
    (partial / COMPLETE).write_text(json.dumps({"files": sizes}), encoding="utf-8")
    for path in (*paths, partial / COMPLETE, partial):
        sync(path)
    checkpoint.put_in_place(partial, point)
    sync(point.parent)


def _read(point: Path) -> dict[str, Any] | None:
    """The record of a point, or None unless it is complete: marked, and every file there with its size."""
    try:
        sizes = json.loads((point / COMPLETE).read_text(encoding="utf-8"))["files"]
        if any((point / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return dict(json.loads((point / "point.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return None
