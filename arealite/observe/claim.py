"""Which run a run folder belongs to: a used folder is gone on with by the same run only, and by no other in silence.

Called by the launcher before it starts anything, and by recovery on trainer rank 0, whose script may have changed the
configuration; each compares with what it saw itself at the last start.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from arealite.api.atomic import finite_json, write_json
from arealite.api.config_keys import walk
from arealite.api.errors import RecoveryError

if TYPE_CHECKING:
    from pathlib import Path

    from arealite.api.cli_args import RunConfig
    from arealite.observe.run_folder import RunFolder

logger = logging.getLogger(__name__)

# What a run must keep to go on: its models, its tasks in their order, and the shape of a step and of its state. The
# rest (learning rates, lengths, frequencies, machines) may change at a restart, and is told.
KEPT = (
    "kind", "seed", "tokenizer_path", "critic", "ref", "*.path", "*.lora*", "*.optimizer.kind", "gconfig.n_samples",
    "train_dataset*", "valid_dataset*"
)  # fmt: skip


def claim(folder: RunFolder, config: RunConfig, by: str) -> Path | None:
    """Make `folder` the run's of `config`; what has changed since the last start is a warning. `by`: who asks. Returns
    something that an earlier start has left there, and that another run would mix with or write over.

    Raises:
        RecoveryError: it is used, and `recover.mode` forbids that, or by a run of another configuration.
    """
    ours = json.loads(json.dumps(finite_json({key: value for key, value, _ in walk(config)})))  # as it is read back
    results = (*folder.recover_dir.glob("point_*"), *folder.checkpoints_dir.glob("step_*"))
    trace = next((path for path in (*results, folder.metrics, folder.ledger) if path.exists()), None)
    earlier: dict[str, dict[str, Any]] = {}
    if trace is not None:
        if config.recover.mode != "auto":
            raise RecoveryError(
                f"recover.mode is {config.recover.mode}, and {folder.root} holds an earlier run ({trace.name});"
                " expected an unused folder. Choose another trial_name, or recover.mode=auto to go on with that run"
            )
        with suppress(OSError, ValueError):  # none yet, or cut off by a full disk
            earlier = dict(json.loads(folder.identity.read_text(encoding="utf-8")))
        _compare(folder, earlier.get(by, ours), ours)
    try:
        folder.create()
        write_json(folder.identity, earlier | {by: ours})
    except OSError as error:
        raise RecoveryError(f"cannot write {folder.identity}: {error.strerror}; set cluster.fileroot") from error
    return trace


def _compare(folder: RunFolder, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    changed = {
        key: f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} in this configuration"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    }
    if lines := [f"  {line}\n" for key, line in changed.items() if any(fnmatchcase(key, kept) for kept in KEPT)]:
        raise RecoveryError(
            f"{folder.root} holds a run of another configuration:\n{''.join(lines)}Set these back to go on with that"
            " run, or choose another trial_name for a new one"
        )
    if changed:
        logger.warning("this run goes on with changed settings: %s", "; ".join(changed.values()))
