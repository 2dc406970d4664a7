"""Recovery points: everything a killed run needs to go on as if nothing had happened. Called by the training script.

A point is a folder, recover/point_000020: point.json (step, configuration, data position, rollout head), actor/ (model,
optimizer, schedule, RNG of every rank), COMPLETE (sizes of all files, written last). It is built under a hidden name
and renamed when it is whole and on disk: a kill at any moment leaves the points there were, or one more.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arealite.api.errors import RecoveryError
from arealite.engine.checkpoint import REMOVED, WRITE_ERRORS, FailureCount, remove_folder
from arealite.observe.frequency import Frequency

if TYPE_CHECKING:
    from arealite.api.cli_args import GRPOConfig, RecoverConfig
    from arealite.api.engine import DataSource, TrainEngine
    from arealite.observe.run_folder import RunFolder

logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
PARTIAL = ".tmp-"
REPLACED = ".replaced-"


class Stateful(Protocol):
    """The rollout client: its state is a JSON-ready dict, saved on rank 0 (the head) and given back to every rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fingerprint(config: GRPOConfig) -> dict[str, Any]:
    """What a run must keep to go on from a point: its model, its data in their order, and the shape of a step.

    Learning rates, lengths, frequencies and machines may change at a restart.
    """
    train = config.train_dataset
    return {
        "actor.path": config.actor.path,
        "seed": config.seed,
        "gconfig.n_samples": config.gconfig.n_samples,
        "rollout.consumer_batch_size": config.rollout.consumer_batch_size,
        "train_dataset.path": train.path,
        "train_dataset.split": train.split,
        "train_dataset.subset": train.subset,
        "train_dataset.params": train.params,
        "train_dataset.num_rows": train.num_rows,
        "train_dataset.batch_size": train.batch_size,
        "train_dataset.shuffle": train.shuffle,
        "train_dataset.prompt_template": train.prompt_template,
        "train_dataset.system_prompt": train.system_prompt,
        "train_dataset.max_prompt_tokens": train.max_prompt_tokens,
    }


class RecoverHandler:
    """Writes recovery points when due and loads the newest one; all ranks make the same calls.

    A point that cannot be written (disk full) is a warning, counted in `num_failed`, and the points before it stay
    whole; the second failure in a row stops the run. `epoch` is the epoch of the point that was loaded.
    """

    def __init__(self, config: RecoverConfig, folder: RunFolder, run_config: GRPOConfig) -> None:
        self.frequency = Frequency(config)
        self.epoch = 0
        self._config = config
        self._folder = folder
        # Through JSON, as it will be read back: a tuple is a list then, and they would differ.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint(run_config)))
        self._failures = FailureCount()

    @property
    def num_failed(self) -> int:
        """Points that could not be written in this process."""
        return self._failures.num_failed

    def maybe_save(
        self, step: int, epoch: int, actor: TrainEngine, rollout: Stateful, dataloader: DataSource
    ) -> Path | None:
        """Write a point if it is due after `step` finished steps; its folder, or None. Collective.

        Call it last of all that belongs to the step: what comes after it is done again after a kill.
        """
        if self._config.mode == "off" or not self.frequency.due(step, epoch, actor.collective):
            return None
        return self.save(step, epoch, actor, rollout, dataloader)

    def save(self, step: int, epoch: int, actor: TrainEngine, rollout: Stateful, dataloader: DataSource) -> Path | None:
        """Write a point now; None when that failed with a warning. Collective.

        Raises ArealiteError on every rank at the second failure in a row.
        """
        collective = actor.collective
        point = self._folder.recovery_point(step)
        partial = point.with_name(f"{PARTIAL}{point.name}")
        why = ""
        if collective.rank == 0:
            state = {"rollout": rollout.state_dict(), "dataloader": dataloader.state_dict()}
            why = self._begin(partial, {"step": step, "epoch": epoch, "at": time.time(), **state})
        why = collective.broadcast(why)
        if not why:
            why = self._save_ranks(partial, actor)
        if not why and collective.rank == 0:
            why = _finish(partial, point)
        why = collective.broadcast(why)
        if why:
            if collective.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            stop = self._failures.failed(f"recovery point {point}", why, "the points before it are whole")
            if stop is not None:
                raise stop
            return None
        self._failures.succeeded()
        if collective.rank == 0:
            self._prune()
        return point

    def load(self, actor: TrainEngine, rollout: Stateful, dataloader: DataSource) -> int:
        """Restore the newest complete point; returns the number of finished steps, that is the next step (counted from
        0); 0 when there is no point. Collective.

        Raises RecoveryError on every rank: mode "fresh" in a folder with points, a point of another configuration, or
        points of which none is complete.
        """
        found: Any = None
        if self._config.mode != "off":
            found = actor.collective.broadcast(self._choose() if actor.collective.rank == 0 else None)
        if isinstance(found, str):
            raise RecoveryError(found)
        if found is None:
            return 0
        actor.load_state(str(self._folder.recovery_point(found["step"]) / "actor"))
        dataloader.load_state_dict(found["dataloader"])
        rollout.load_state_dict(found["rollout"])
        if actor.collective.rank == 0:
            logger.warning("going on after step %d, from %s", found["step"], self._folder.recovery_point(found["step"]))
        self.epoch = found["epoch"]
        self.frequency.restart(self.epoch)
        return int(found["step"])

    def _begin(self, partial: Path, record: dict[str, Any]) -> str:
        """Make the hidden folder with point.json; "" or why that failed."""
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "actor").mkdir(parents=True)
            text = json.dumps({**record, "fingerprint": self._fingerprint})
            (partial / "point.json").write_text(text, encoding="utf-8")
        except OSError as error:
            return str(error)
        return ""

    def _save_ranks(self, partial: Path, actor: TrainEngine) -> str:
        """Every rank writes its part and a mark that it did; "" or, on rank 0, who did not and why."""
        collective = actor.collective
        why = ""
        try:
            actor.save_state(str(partial / "actor"))
            _mark(partial, collective.rank).touch()
        except WRITE_ERRORS as error:
            logger.exception("rank %d: part of a recovery point", collective.rank)
            why = f": {error}"
        collective.barrier("parts of a recovery point")
        silent = [rank for rank in range(collective.world_size) if not _mark(partial, rank).exists()]
        return f"ranks without their part: {silent}{why}" if silent and collective.rank == 0 else ""

    def _choose(self) -> dict[str, Any] | str | None:
        """The newest complete point's record, None when there is no point at all, or what is wrong with them."""
        _clean(self._folder.recover_dir)
        points = _points(self._folder.recover_dir)
        if points and self._config.mode == "fresh":
            return (
                f"recover.mode=fresh, and {self._folder.recover_dir} holds {points[-1].name} of an earlier run; "
                "expected an unused folder. Choose another trial_name, or recover.mode=auto to go on with that run"
            )
        for point in reversed(points):
            record = _read(point)
            if record is None:
                logger.warning("recovery point %s is not complete: trying the one before", point)
                continue
            return self._difference(point, record["fingerprint"]) or record
        if points:
            return (
                f"none of the recovery points in {self._folder.recover_dir} is complete "
                f"({', '.join(p.name for p in points)}); restore one, or delete them to start from step 0"
            )
        return None

    def _difference(self, point: Path, theirs: dict[str, Any]) -> str:
        keys = sorted(theirs.keys() | self._fingerprint.keys())
        lines = [
            f"  {key}: {theirs.get(key)!r} in the point, {self._fingerprint.get(key)!r} in this configuration"
            for key in keys
            if theirs.get(key) != self._fingerprint.get(key)
        ]
        if not lines:
            return ""
        return (
            f"recovery point {point} belongs to another configuration:\n" + "\n".join(lines) + "\n"
            "Set these back to go on with that run, or choose another trial_name for a new one"
        )

    def _prune(self) -> None:
        """Keep the newest points; only after the newest is complete."""
        complete = [point for point in _points(self._folder.recover_dir) if _read(point) is not None]
        for point in complete[: -self._config.num_kept]:
            remove_folder(point)


def _mark(partial: Path, rank: int) -> Path:
    return partial / f"rank_{rank:05d}.written"


def _points(recover_dir: Path) -> list[Path]:
    """Folders named as points, complete or not, oldest first."""
    return sorted(path for path in recover_dir.glob("point_*") if path.is_dir())


def _finish(partial: Path, point: Path) -> str:
    """Put the whole folder on disk, mark it complete, rename it into place; "" or why that failed."""
    try:
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
        for path in [*files, *(p for p in partial.rglob("*") if p.is_dir())]:
            _sync(path)
        with open(partial / COMPLETE, "w", encoding="utf-8") as out:
            out.write(json.dumps({"files": sizes}))
            out.flush()
            os.fsync(out.fileno())
        _sync(partial)
        replaced = point.with_name(f"{REPLACED}{point.name}")
        if point.exists():
            point.rename(replaced)
        partial.rename(point)
        _sync(point.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        return str(error)
    return ""


def _sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(point: Path) -> dict[str, Any] | None:
    """The record of a point, or None unless it is complete: marked, and every file there with its size."""
    try:
        sizes = json.loads((point / COMPLETE).read_text(encoding="utf-8"))["files"]
        if any((point / name).stat().st_size != size for name, size in sizes.items()):
            return None
        record = json.loads((point / "point.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        return None
    return dict(record)


def _clean(recover_dir: Path) -> None:
    """Remove what a kill left behind; a point that was being replaced gets its name back."""
    for replaced in recover_dir.glob(f"{REPLACED}point_*"):
        point = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if point.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(point)
    for prefix in (PARTIAL, REMOVED):
        for leftover in recover_dir.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
