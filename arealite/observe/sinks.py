"""Where the numbers of a step go: metrics.jsonl (the record), TensorBoard events (a copy). Used by stats_logger.py.

metrics.jsonl is append-only. A run that goes on at step k after a restart first appends
{"event": "resumed", "step": k}, which voids the earlier lines of steps k and later; readers take `read_metrics`.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arealite.api.atomic import finite_json
from arealite.api.errors import ArealiteError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsFile:
    """The append-only metrics.jsonl of a run folder, opened when its first line (of `first_step`) is at hand."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            earlier = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            raise self._refusal(error) from error
        if earlier:
            torn = "" if earlier.endswith(b"\n") else "\n"
            self._append({"event": "resumed", "step": first_step, "at": time.time()}, before=torn)

    def write(
        self, step: int, epoch: int, stats: dict[str, float], why: dict[str, dict[str, int]] | None = None
    ) -> None:
        """One line, handed to the system before this returns; `why`: the reasons behind its counts of failures. Raises
        ArealiteError when it cannot be written."""
        record: dict[str, Any] = {"step": step, "epoch": epoch, "at": time.time(), **stats}
        if why:
            record["why"] = why
        if bad := sorted(name for name, value in stats.items() if not math.isfinite(value)):
            record["nonfinite"] = bad
        self._append(record)

    def _append(self, record: dict[str, Any], before: str = "") -> None:
        line = before + json.dumps(finite_json(record), allow_nan=False) + "\n"
        try:
            with open(self._path, "ab") as out:
                out.write(line.encode())
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> ArealiteError:
        return ArealiteError(
            f"cannot write {self._path}: {error.strerror}. The metrics are the record of the run, so it stops here; "
            "make room or set cluster.fileroot to another disk, and start the same command again to go on"
        )


def _records(path: Path) -> list[dict[str, Any]]:
    out = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # empty, or cut off by a kill
            continue
        if isinstance(record, dict):
            out.append(record)
    return out


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that count, one per step, in order of steps; none when there is no file.

    The last line of a step wins, and lines of steps that a resumed run did again are left out. A value that was NaN
    or infinite is None, and its name is in "nonfinite".
    """
    by_step: dict[int, dict[str, Any]] = {}
    for record in _records(path):
        if record.get("event") == "resumed":
            by_step = {step: kept for step, kept in by_step.items() if step < record["step"]}
        elif "step" in record:
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def num_restarts(path: Path) -> int:
    """How often the run of this metrics.jsonl was started again."""
    return sum(record.get("event") == "resumed" for record in _records(path))


def open_tensorboard(folder: Path, first_step: int) -> SummaryWriter:
    """Writer of events that void earlier ones from `first_step` on. Imports torch and tensorboard, which are slow to
    load. Raises ImportError, OSError."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)
