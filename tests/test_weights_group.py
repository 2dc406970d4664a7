"""Weight groups meet trainers that are not ours: a store made by torch's own rendezvous, as SGLang's clients do it."""

import multiprocessing
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from arealite.weights.wire import broadcast, join_group

LIMIT_S = 60.0


def foreign_trainer(port: int) -> None:
    """Rank 0, whose store lets nobody go on before all members have counted themselves in."""
    limit = timedelta(seconds=LIMIT_S)
    store, rank, world_size = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=limit))
    group, _ = c10d._new_process_group_helper(
        world_size, rank, [], dist.Backend("gloo"), dist.PrefixStore("foreign", store),
        group_name="foreign", timeout=limit,
    )  # fmt: skip
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([torch.arange(5.0)], options).wait()


def test_a_trainer_that_waits_for_all_members_is_joined():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    trainer = multiprocessing.get_context("spawn").Process(target=foreign_trainer, args=(port,))
    trainer.start()
    try:
        received = torch.zeros(5)
        broadcast(join_group("127.0.0.1", port, 1, 2, "foreign", "gloo", LIMIT_S), [received])
        assert received.tolist() == [0, 1, 2, 3, 4]
        trainer.join(LIMIT_S)
        assert trainer.exitcode == 0
    finally:
        trainer.kill()
