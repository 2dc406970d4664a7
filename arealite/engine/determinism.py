"""Makes a process compute the same bits from the same inputs, run after run. Called by engine/fsdp_engine.py."""

from __future__ import annotations

import os

import torch

from arealite.api.errors import ConfigError

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS always chooses the same algorithm


def be_deterministic() -> None:
    """From here on this process, all models in it, uses algorithms without a race, and an operation that has none
    raises RuntimeError with its name. Equal bits need the same number of ranks and threads and the same kind of device.

    Of a whole run this is the trainer's part: which groups it trains on depends on time unless
    rollout.max_head_offpolicyness is 0, and what is sampled on the batch unless server.deterministic is true.

    Raises:
        ConfigError: CUBLAS_WORKSPACE_CONFIG is set to something that is not deterministic.
    """
    workspace = os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACES[0])  # read when a GPU computes its first product
    if workspace not in WORKSPACES:
        raise ConfigError(
            f"deterministic is true, but {WORKSPACE_VARIABLE} is {workspace!r}, with which cuBLAS is not: leave it out,"
            f" or set it to {' or '.join(WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    # A check for programs that read what they never wrote, at the cost of a pass over all memory that is asked for.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
