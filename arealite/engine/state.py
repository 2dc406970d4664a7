"""The trainer's part of a recovery point: sharded weights and moments, schedule, and random numbers of every rank.

Called by engine/fsdp_engine.py. The layout follows torch.distributed.checkpoint, which can also read a point with
another number of ranks (random numbers then start from the seed again on ranks that had none).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from arealite.api.errors import RecoveryError
from arealite.engine.parallel import RankCollective


def _tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Live tensors by name: loading writes into them."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        found[f"model.{name}"] = parameter.detach()
        if optimizer is not None:
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}.{name}"] = optimizer.state[parameter][key]
    return found


def save_state(
    path: str,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    counters: dict[str, int],
    ranks: RankCollective,
) -> None:
    """Write everything under `path`, an existing or new folder. Collective. Raises OSError."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        dcp.save(_tensors(parameters, optimizer), checkpoint_id=folder / "tensors", process_group=ranks.group)
    except CheckpointException as error:  # no Exception in torch's class tree
        raise OSError(f"cannot write the trainer's state under {folder}: {error}") from None
    randoms = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    torch.save(randoms, folder / f"random-{ranks.rank}.pt")
    if ranks.rank == 0:
        (folder / "counters.json").write_text(json.dumps(counters))


def load_state(
    path: str, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, ranks: RankCollective
) -> dict[str, int]:
    """Read what `save_state` wrote into the live tensors; returns its counters. Collective.

    Raises:
        RecoveryError: something is missing, or belongs to another model.
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
        for state in optimizer.state.values():
            state["step"].fill_(counters["num_updates"])
    own = folder / f"random-{ranks.rank}.pt"
    if own.exists():
        randoms = torch.load(own, weights_only=False)
        torch.set_rng_state(randoms["torch"])
        if randoms["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(randoms["cuda"])
        random.setstate(randoms["python"])
        np.random.set_state(randoms["numpy"])
    return counters
