"""One answer for all trainer ranks: rank 0 takes a step's groups, every rank gets its share, or rank 0's error.

Called by client.py.
"""

from __future__ import annotations

from collections.abc import Callable

from arealite.api.engine import Collective
from arealite.api.errors import ArealiteError, WorkflowError
from arealite.api.types import Batch, Group
from arealite.rollout.batching import split_batch


def take_and_share(take: Callable[[], list[Group]], collective: Collective | None) -> Batch:
    """Collective: `take` runs on rank 0 only; returns this rank's share. What `take` raises is raised on all ranks."""
    if collective is None or collective.world_size == 1:
        return split_batch(take(), 1)[0]
    if collective.rank != 0:
        share = collective.scatter(None)
        if isinstance(share, Exception):
            raise share
        return share
    try:
        shares = split_batch(take(), collective.world_size)
    except Exception as error:  # user code lies below: the other ranks wait in scatter and must hear of it
        collective.scatter([_for_other_ranks(error)] * collective.world_size)
        raise
    return collective.scatter(list(shares))


def _for_other_ranks(error: Exception) -> Exception:
    """An error of the same class that can be sent: the text only, so that no live object travels with it."""
    text = f"on rank 0: {type(error).__name__}: {error}"
    return type(error)(text) if isinstance(error, ArealiteError) else WorkflowError(text)
