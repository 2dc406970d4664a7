"""Work that only rank 0 can do, for all trainer ranks: they wait with it, and get their share, or its error.

Called by client.py for one step's groups, and by evaluation/evaluator.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from arealite.algorithm.packing import karmarkar_karp
from arealite.api.errors import ArealiteError, WorkflowError
from arealite.api.protocols import Collective
from arealite.api.types import Batch, Group

BEAT_S = 5.0  # how often rank 0 tells the waiting ranks that it goes on

Beat = Callable[[], None]


def from_head(work: Callable[[Beat], list[Any]], collective: Collective | None, beat_s: float | None = None) -> Any:
    """Collective: `work` runs on rank 0 only and gives one object per share; what it raises is raised on all ranks.
    While it waits it calls the function that it is given, so that the other ranks' waits do not reach their limit.

    Consumes: rank 0's work. Produces: this rank's object. Waits for: rank 0, each time at most the collective's limit.
    Unblocked by: the object, a beat (None) every `beat_s` (BEAT_S), rank 0's error, or the failure of the collective.
    """
    if collective is None or collective.world_size == 1:
        return work(lambda: None)[0]
    if collective.rank != 0:
        while (share := collective.scatter(None)) is None:
            pass
        if isinstance(share, Exception):
            raise share
        return share
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= (BEAT_S if beat_s is None else beat_s):
            collective.scatter([None] * collective.num_shares)
            last = time.monotonic()

    try:
        shares = work(beat)
    except Exception as error:  # user code lies below: the other ranks wait in scatter and must hear of it
        text = f"on rank 0: {type(error).__name__}: {error}"  # the text only: no live object can travel
        kind = type(error) if isinstance(error, ArealiteError) else WorkflowError
        collective.scatter([kind(text)] * collective.num_shares)
        raise
    return collective.scatter(shares)


def split_batch(groups: list[Group], num_shares: int) -> list[Batch]:
    """Whole groups, packed, one batch per share; group ids and `num_groups` are those of the whole step.

    Shares have about the same number of tokens (Karmarkar-Karp); some are empty when there are fewer groups than
    shares.
    """
    whole = Batch.pack(groups)
    if num_shares == 1:
        return [whole]
    num_tokens = np.bincount(whole.group_ids, weights=whole.lengths, minlength=len(groups))
    shares = karmarkar_karp(num_tokens.tolist(), num_shares)
    return [whole.select(np.flatnonzero(np.isin(whole.group_ids, chosen))) for chosen in shares]
