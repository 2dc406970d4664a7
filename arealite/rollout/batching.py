"""One step's groups as one packed batch per trainer rank.

Called by client.py on rank 0.
"""

from __future__ import annotations

import numpy as np

from arealite.api.types import Batch, Group


def split_groups(num_tokens: list[int], num_ranks: int) -> list[list[int]]:
    """Deal groups of `num_tokens` to ranks: whole groups, the longest first, each to the rank with the fewest tokens.

    Returns positions per rank, ascending; a rank gets none when there are fewer groups than ranks. The fullest rank
    has at most 4/3 of the best possible (Graham 1969, longest processing time first).
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for index in sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i)):
        rank = min(range(num_ranks), key=lambda r: (load[r], len(shares[r]), r))
        shares[rank].append(index)
        load[rank] += num_tokens[index]
    return [sorted(share) for share in shares]


def split_batch(groups: list[Group], num_ranks: int) -> list[Batch]:
    """The groups packed, one batch per rank; group ids and `num_groups` are those of the whole step."""
    whole = Batch.pack(groups)
    num_tokens = np.bincount(whole.group_ids, weights=whole.lengths, minlength=len(groups)).astype(int).tolist()
    shares = split_groups(num_tokens, num_ranks)
    return [whole.select(np.flatnonzero(np.isin(whole.group_ids, share))) for share in shares]
