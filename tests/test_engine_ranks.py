"""Ranks over real sockets: their calls, and what they say of each other. Their steps: test_engine_layouts.py."""

import os

import numpy as np
import pytest
import torch
from support.batches import make, random_batch, share, train_one_step
from support.forks import in_process
from support.layouts import on_ranks

from arealite.api.errors import NumericalError, WaitTimeout, WeightSyncError


def bad_numbers(rank: int, path: str) -> tuple[float, int, str]:
    """What each makes of logprobs that are no numbers on rank 1 alone."""
    actor = make(path, max_bad_steps=2)
    mine = share(random_batch(), rank, 2)
    train_one_step(actor, mine)
    if rank == 1:
        mine.logprobs = np.full_like(mine.logprobs, np.nan)
    skipped = train_one_step(actor, mine)["skipped"]
    with pytest.raises(NumericalError) as raised:
        train_one_step(actor, mine)
    return skipped, actor.num_updates, str(raised.value)


def test_ranks_agree_on_bad_numbers(tiny_llama):
    for skipped, num_updates, error in on_ranks(2, bad_numbers, tiny_llama):
        assert (skipped, num_updates) == (1, 1)
        assert "2 in a row" in error and "rank 1: loss of micro-batch 0" in error


def never_joined(port: int) -> str:
    from arealite.engine.parallel.ranks import join_ranks

    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with pytest.raises(WaitTimeout) as waited:
        join_ranks(torch.device("cpu"), 1.0)
    return str(waited.value)


def test_a_rank_that_never_joins_is_named(free_port):
    told = in_process(never_joined, free_port)
    assert "trainer ranks joining" in told and "rank 1" in told


def collective(rank: int) -> str:
    """Every call, and what a barrier says to which the other rank never comes."""
    from arealite.engine.parallel.ranks import RankCollective

    c = RankCollective(20.0)
    assert c.rank == rank and c.scatter(["a", "b"] if rank == 0 else None) == "ab"[rank]
    assert c.broadcast({"x": 1} if rank == 0 else None) == {"x": 1}
    assert c.gather(rank * 10) == [0, 10]
    assert c.reduce(torch.tensor([1 + rank]), "sum").tolist() == [3]
    assert c.reduce(torch.tensor([1 + rank]), "max").tolist() == [2]
    c.barrier("test")

    def fail():
        raise WeightSyncError("tensor q is stale")

    with pytest.raises(WeightSyncError, match="tensor q is stale"):
        c.on_head(fail)
    assert c.on_head(lambda: 7) == 7
    told, slow = "", RankCollective(2.0)
    if rank == 0:
        with pytest.raises(WaitTimeout) as waited:
            slow.barrier("a rank that never comes")
        told = str(waited.value)
    c.barrier("end")
    return told


def test_collective():
    told, _ = on_ranks(2, collective)
    assert "a rank that never comes" in told and "rank 1" in told
