"""Recovery points: everything a killed run needs to go on as if nothing had happened. Called by run.py, and for the
trainer's part of a point by engine/fsdp_engine.py.

A point is a folder, recover/point_000020: point.json (step, data position, rollout head), actor/ (model, optimizer,
schedule, RNG of every rank), COMPLETE (sizes of all files, written last). The state is copied, and a thread
writes the copy while training goes on: under a hidden name, renamed when all is on disk. A kill at any moment leaves
the points there were, or one more.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from arealite import devices
from arealite.api.atomic import clean_folder, partial_name, put_in_place, remove_folder, sync
from arealite.api.errors import ArealiteError, RecoveryError, RunStopped
from arealite.engine.checkpoint import WriteFailures, attempt, attempt_on_ranks
from arealite.engine.optim import moments, set_num_updates
from arealite.observe import stop
from arealite.observe.claim import claim
from arealite.observe.frequency import Frequency
from arealite.observe.reasons import last_line
from arealite.observe.waits import in_background, waiting

if TYPE_CHECKING:
    from arealite.api.cli_args import RunConfig
    from arealite.api.protocols import Collective, Stateful, Trained
    from arealite.engine.parallel.ranks import RankCollective
    from arealite.observe.run_folder import RunFolder

logger = logging.getLogger(__name__)

COMPLETE = "COMPLETE"


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

    def __init__(
        self, run_config: RunConfig, folder: RunFolder, actor: Trained, rollout: Stateful | None, dataloader: Stateful
    ) -> None:
        """`rollout`: None for a run without servers."""
        self.frequency = Frequency(run_config.recover)
        self.actor = actor
        # The loader last: it has heard of every group then that the rollout's state holds as done.
        self._others = ({} if rollout is None else {"rollout": rollout}) | {"dataloader": dataloader}
        self.epoch = 0
        self._config = run_config.recover
        self._folder = folder
        self._run_config = run_config
        self._finished = 0  # steps
        self._newest = 0  # finished steps of the newest point, in place or being written
        self._limit_s = run_config.trained[1].collective_timeout_s
        self._failures = WriteFailures()
        self._writing: _Writing | None = None  # one at most

    @contextmanager
    def session(self) -> Iterator[int]:
        """Around the steps of a run: `load`, whose number of finished steps it yields, and `finish`; `close` where they
        end by an error. Collective.

        Ctrl-C or SIGTERM end the block at the end of a step, or while it waits for groups; then the process ends
        (SystemExit), after a point of the last finished step. A second one acts as ever. Not with mode "off".
        """
        finished = self.load()
        with nullcontext() if self._config.mode == "off" else stop.noted():
            try:
                yield finished
                self.finish()
            except RunStopped as stopped:
                if self._finished > self._newest:
                    self._begin(self._finished, self.epoch)
                self.finish()
                if self.actor.collective.rank == 0:
                    logger.warning("%s, %d steps are finished; the same command goes on", stopped, self._finished)
                raise SystemExit(stop.exit_code()) from None
            finally:
                self.close()

    def maybe_save(self, step: int, epoch: int, last: bool = False) -> Path | None:
        """Begin a point if it is due after `step` finished steps, or when this was the `last` one; its folder to be, or
        None. Collective.

        Call it last of all that belongs to the step: what comes after it is done again after a kill. `finish` waits
        for the last one. Raises as `finish` does: a failure shows at the first call after it; and RunStopped, for
        `session`.
        """
        if self._config.mode == "off":
            return None
        self._finished, self.epoch = step, epoch
        collective, writing = self.actor.collective, self._writing
        if writing is not None and collective.on_head(writing.outcome.done):
            self.finish()
        point = self._begin(step, epoch) if self.frequency.due(step, epoch, collective, last) else None
        if not last:
            collective.on_head(stop.look)
        return point

    def save(self, step: int, epoch: int) -> Path | None:
        """Write a point now; None when that failed with a warning. Collective. Raises as `finish` does."""
        begun = self._begin(step, epoch)
        return begun and self.finish()

    def _begin(self, step: int, epoch: int) -> Path | None:
        """Copy everything as it is now and leave the rest to a thread. None when that failed with a warning."""
        self.finish()
        collective, point = self.actor.collective, self._folder.recovery_point(step)
        partial = partial_name(point)

        def begin() -> str:
            states = {name: part.state_dict() for name, part in self._others.items()}
            why_not = attempt(_begin, partial, {"step": step, "epoch": epoch, "at": time.time(), **states})
            if why_not:
                shutil.rmtree(partial, ignore_errors=True)
            return why_not

        why_not = collective.on_head(begin)
        if why_not:
            self._failures.was_written(f"recovery point {point}", why_not)
            return None
        write, ranks = self.actor.stage_state(str(partial / "actor")), self.actor.background
        outcome = in_background(lambda: self._write(partial, point, write, ranks), f"recovery point {point.name}")
        self._writing, self._newest = _Writing(point, outcome), step
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

    def load(self) -> int:
        """Restore the newest complete point; returns the number of finished steps, that is the next step (counted from
        0); 0 when there is no point. Collective.

        Raises RecoveryError on every rank: a used folder that cannot be gone on with (observe/claim.py), or points of
        which none is complete.
        """
        found = self.actor.collective.on_head(self._choose)
        if found is None:
            return 0
        step = int(found["step"])
        point = self._folder.recovery_point(step)
        self.actor.load_state(str(point / "actor"))
        for name, part in self._others.items():
            part.load_state_dict(found[name])
        if self.actor.collective.rank == 0:
            logger.warning("going on after step %d, from %s", step, point)
        self.epoch, self._finished, self._newest = found["epoch"], step, step
        self.frequency.restart(self.epoch)
        return step

    def _choose(self) -> dict[str, Any] | None:
        """The newest complete point's record; None when there is no point, or when none is wanted."""
        for folder in (self._folder.recover_dir, self._folder.checkpoints_dir):
            clean_folder(folder)
        used = claim(self._folder, self._run_config, "trainer")
        points = self._points()
        if not points:
            if used:
                logger.warning("%s holds no recovery point: its run begins again", self._folder.root)
            return None
        for point in reversed(points):
            record = _read(point)
            if record is not None:
                return record
            logger.warning("recovery point %s is not complete: trying the one before", point)
        raise RecoveryError(
            f"none of the recovery points in {self._folder.recover_dir} is complete "
            f"({', '.join(p.name for p in points)}); restore one, or delete them to start from step 0"
        )

    def _points(self) -> list[Path]:
        """Folders named as points, complete or not, oldest first."""
        return sorted(path for path in self._folder.recover_dir.glob("point_*") if path.is_dir())

    def _prune(self) -> None:
        """Keep the newest complete points; only after the newest is complete."""
        complete = [point for point in self._points() if _read(point) is not None]
        for point in complete[: -self._config.num_kept]:
            remove_folder(point)


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
    put_in_place(partial, point)
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


# --- the trainer's part: tensors have Hugging Face's names and are written by torch.distributed.checkpoint, which reads
# them back into any other layout of the ranks (a rank without random numbers starts them from the seed)


def _tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Live tensors by name: loading writes into them."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        found[f"model.{name}"] = parameter.detach()
        if optimizer is not None:
            found |= {f"{key}.{name}": moment for key, moment in moments(optimizer, parameter).items()}
    return found


def stage_state(
    path: str,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    counters: dict[str, int],
    ranks: RankCollective,
) -> Callable[[], None]:
    """Copy everything to the CPU's memory; returns the call that writes the copy under `path`, an existing or new
    folder. That call is collective over `ranks`, may be made in another thread than the caller's next ones, and raises
    OSError or RuntimeError."""
    folder = Path(path)
    tensors = _tensors(parameters, optimizer)
    staged = {name: tensor.to(devices.CPU, non_blocking=True, copy=True) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values()}:
        devices.wait_for(device)
    randoms = {
        "torch": torch.get_rng_state(),
        "accelerator": devices.random_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # It syncs its files to the disk. torch's own async_save is "experimental and subject to change".
            dcp.save(staged, checkpoint_id=folder / "tensors", process_group=ranks.group)
        except CheckpointException as error:  # no Exception in torch's class tree
            room, why = shutil.disk_usage(folder).free >> 20, last_line(str(error))
            raise OSError(f"cannot write the trainer's state under {folder}, {room} MiB are free: {why}") from None
        staged.clear()
        own = folder / f"random-{ranks.rank}.pt"
        torch.save(randoms, own)
        sync(own)
        if ranks.rank == 0:
            (folder / "counters.json").write_text(json.dumps(counters))

    return write


def load_state(
    path: str, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, ranks: RankCollective
) -> dict[str, int]:
    """Read what `stage_state` wrote, on these or other ranks, into the live tensors; returns its counters. Collective.

    Raises:
        RecoveryError: something is missing, or belongs to another model or optimizer.
    """
    folder = Path(path)
    try:
        counters = json.loads((folder / "counters.json").read_text())
        dcp.load(_tensors(parameters, optimizer), checkpoint_id=folder / "tensors", process_group=ranks.group)
    except (OSError, ValueError, CheckpointException) as error:
        raise RecoveryError(
            f"cannot read the trainer's state under {folder}: {error}; expected one written with this model and"
            " optimizer. Remove this recovery point to go on from the one before it"
        ) from None
    if optimizer is not None:
        set_num_updates(optimizer, counters["num_updates"])
    own = folder / f"random-{ranks.rank}.pt"
    if own.exists():
        randoms = torch.load(own, weights_only=False)
        torch.set_rng_state(randoms["torch"])
        devices.set_random_state(randoms.get("accelerator"))
        random.setstate(randoms["python"])
        np.random.set_state(randoms["numpy"])
    return counters
