"""The trainer's part of a recovery point: sharded weights and moments, schedule, and random numbers of every rank.

Called by engine/fsdp_engine.py. Tensors have Hugging Face's names and are written by torch.distributed.checkpoint,
which reads them back into any other layout of the ranks (a rank without random numbers starts them from the seed).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from arealite.api.atomic import sync
from arealite.api.errors import RecoveryError
from arealite.engine.memory import CPU, wait_for
from arealite.engine.optim import moments, set_num_updates
from arealite.engine.parallel.ranks import RankCollective


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
    staged = {name: tensor.to(CPU, non_blocking=True, copy=True) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values()}:
        wait_for(device)
    randoms = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # It syncs its files to the disk. torch's own async_save is "experimental and subject to change".
            dcp.save(staged, checkpoint_id=folder / "tensors", process_group=ranks.group)
        except CheckpointException as error:  # no Exception in torch's class tree
            raise OSError(f"cannot write the trainer's state under {folder}: {error}") from None
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
        if randoms["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(randoms["cuda"])
        random.setstate(randoms["python"])
        np.random.set_state(randoms["numpy"])
    return counters
