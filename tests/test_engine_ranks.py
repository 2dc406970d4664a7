"""Two FSDP2 ranks over real sockets make the step that one process makes."""

import os
from typing import Any

import pytest
import torch
from support.batches import RANK_CASES, outcome, trouble
from support.forks import in_process
from support.layouts import on_ranks

from arealite.api.errors import WaitTimeout, WeightSyncError


def train(rank: int, path: str, folder: str) -> dict[str, Any]:
    return {case: outcome(path, case, rank, 2) for case in RANK_CASES} | {"trouble": trouble(path, folder, rank)}


@pytest.fixture(scope="module")
def two_ranks(tiny_llama, tmp_path_factory):
    return on_ranks(2, train, tiny_llama, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("case", RANK_CASES)
def test_two_ranks_equal_one_process(two_ranks, tiny_llama, case):
    alone = outcome(tiny_llama, case, 0, 1)
    for rank in two_ranks:
        assert rank[case]["stats"] == pytest.approx(alone["stats"], rel=1e-5, abs=1e-7)
        for name, numbers in alone["weights"].items():
            assert rank[case]["weights"][name] == pytest.approx(numbers, rel=1e-5, abs=1e-5), name


def test_two_ranks_resume_and_agree_on_bad_numbers(two_ranks):
    for rank in two_ranks:
        found = rank["trouble"]
        assert found["resumed"][0] == found["resumed"][1]
        assert found["updates"] == [2, 2]
        assert found["skipped"] == 1
        assert "2 in a row" in found["error"] and "rank 1: loss of micro-batch 0" in found["error"]


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
