"""Two FSDP2 ranks over real sockets make the step that one process makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_batches import RANK_CASES, outcome

LIMIT_S = 240.0


def run_ranks(code: list[str], port: int, num_started: int = 2) -> list[str]:
    """Start one process per rank, of two; returns their output, ends them all in any case."""
    ranks = []
    try:
        for rank in range(num_started):
            env = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}",
            }  # fmt: skip
            ranks.append(
                subprocess.Popen([sys.executable, *code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
        outputs = [rank.communicate(timeout=LIMIT_S)[0].decode() for rank in ranks]
        for rank, text in zip(ranks, outputs, strict=True):
            assert rank.returncode == 0, text[-4000:]
        return outputs
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture(scope="module")
def two_ranks(tiny_llama, tmp_path_factory):
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    out = tmp_path_factory.mktemp("ranks") / "out"
    run_ranks([str(Path(__file__).parent / "engine_batches.py"), str(out), tiny_llama], port)
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", RANK_CASES)
def test_two_ranks_equal_one_process(two_ranks, tiny_llama, case):
    try:
        alone = outcome(tiny_llama, case, 0, 1)
    finally:
        torch.distributed.destroy_process_group()
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


COLLECTIVE = """
import sys, torch
from arealite.api.errors import WaitTimeout, WeightSyncError
from arealite.engine.parallel import RankCollective, join_ranks
join_ranks(torch.device("cpu"), 60.0)
c = RankCollective(20.0)
assert c.scatter(["a", "b"] if c.rank == 0 else None) == "ab"[c.rank]
assert c.broadcast({"x": 1} if c.rank == 0 else None) == {"x": 1}
assert c.gather(c.rank * 10) == [0, 10]
assert c.reduce(torch.tensor([1 + c.rank]), "sum").tolist() == [3]
assert c.reduce(torch.tensor([1 + c.rank]), "max").tolist() == [2]
c.barrier("test")
def fail():
    raise WeightSyncError("tensor q is stale")
try:
    c.on_head(fail)
    sys.exit("no error")
except WeightSyncError as error:
    assert "tensor q is stale" in str(error)
assert c.on_head(lambda: 7) == 7
slow = RankCollective(2.0)
if c.rank == 0:
    try:
        slow.barrier("a rank that never comes")
        sys.exit("no timeout")
    except WaitTimeout as error:
        print("STALL", error)
c.barrier("end")
"""

ALONE = """
import torch
from arealite.api.errors import WaitTimeout
from arealite.engine.parallel import join_ranks
try:
    join_ranks(torch.device("cpu"), 1.0)
except WaitTimeout as error:
    print("STALL", error)
"""


def test_a_rank_that_never_joins_is_named(free_port):
    (output,) = run_ranks(["-c", ALONE], free_port, num_started=1)
    assert "STALL" in output and "trainer ranks joining" in output and "rank 1" in output


def test_collective(free_port):
    outputs = run_ranks(["-c", COLLECTIVE], free_port)
    assert "a rank that never comes" in outputs[0] and "rank 1" in outputs[0]
