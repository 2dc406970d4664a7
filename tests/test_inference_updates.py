"""Weights by process group: what the server takes whole, and what it refuses with nothing changed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.group_trainer import GroupTrainer
from support.inference import WAIT_S, LocalServer, greedy, served, version

from arealite.api.errors import WeightSyncError
from arealite.api.types import GroupPlace
from arealite.inference.core.weight_updates import Groups
from arealite.weights.wire import checksum


@pytest.fixture(scope="module")
def after(folders):
    """What a server of the second folder answers."""
    with LocalServer(served(folders[1])) as running:
        return expected(running)


def expected(server: LocalServer) -> tuple[list[int], Any]:
    """For comparison with what comes later: the same tokens; logprobs but for the rounding of passes of other shapes,
    since prompts that are cached in part are computed in other pieces."""
    tokens, logprobs = greedy(server)
    return tokens, pytest.approx(logprobs, abs=1e-4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class Trainer:
    """The calls of SGLang's clients, and the broadcasts that belong to them."""

    def __init__(self, server: LocalServer, process: GroupTrainer) -> None:
        self.server, self.process = server, process

    def join(self) -> tuple[int, Any]:
        place = self.process.call("listen", 2, "127.0.0.1")
        body = {"master_address": place.address, "master_port": str(place.port)}  # text, as AReaL sends it
        body |= {"rank_offset": 1, "world_size": 2, "group_name": place.name, "backend": "gloo"}
        self.name = place.name
        asked = self.server.pool.submit(self.server.post, "/init_weights_update_group", body)
        self.process.call("join")
        return asked.result(WAIT_S)

    def described(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        dtypes = [str(t.dtype).removeprefix("torch.") for t in tensors.values()]
        shapes = [list(t.shape) for t in tensors.values()]
        return {"names": list(tensors), "dtypes": dtypes, "shapes": shapes, "group_name": self.name}

    def send(self, tensors: dict[str, torch.Tensor], flat: bool, **more: Any) -> tuple[int, Any]:
        body = {**self.described(tensors), "load_format": "flattened_bucket" if flat else None, **more}
        asked = self.server.pool.submit(self.server.post, "/update_weights_from_distributed", body)
        raws = [t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values()]
        self.process.call("send", [b"".join(raws)] if flat else raws)
        return asked.result(WAIT_S)


@pytest.fixture(scope="module")
def process():
    process = GroupTrainer()
    yield process
    process.close()


@pytest.fixture
def trainer(server, process):
    trainer = Trainer(server, process)
    assert trainer.join()[0] == 200
    yield trainer
    process.call("close")


@pytest.mark.parametrize("flat", [True, False], ids=["flattened", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_broadcast_update_arrives_as_one_from_disk_does(server, trainer, folders, after, flat, dtype):
    """One call without a session, as AReaL 1.0 sends it. A float of another width is cast, as at load."""
    before = expected(server)
    tensors = {name: tensor.to(dtype) for name, tensor in weights(folders[1]).items()}
    status, answer = trainer.send(tensors, flat, abort_all_requests=True, weight_version="3")
    assert status == 200 and answer["success"], answer
    assert version(server) == "3" and greedy(server) != before
    if dtype == torch.float32:
        assert greedy(server) == after
    for name, tensor in tensors.items():
        assert torch.equal(server.batcher.model.tensors[name], tensor.float())


def test_a_session_shows_nothing_before_its_last_bucket(server, trainer, folders, after):
    before = expected(server)
    tensors = list(weights(folders[1]).items())
    parts = [dict(tensors[:7]), dict(tensors[7:9]), dict(tensors[9:])]
    assert server.post("/begin_weight_update", {})[0] == 200
    for part in parts[:2]:
        assert trainer.send(part, True, flush_cache=False)[0] == 200
    server.post("/flush_cache", {})
    assert version(server) == "0" and greedy(server) == before
    assert trainer.send(parts[2], True, flush_cache=True, weight_version="4")[0] == 200
    assert version(server) == "4" and greedy(server) == after
    assert server.post("/end_weight_update", {})[0] == 200


def test_a_session_ends_with_what_it_staged(server, trainer, folders, after):
    tensors = weights(folders[1])
    assert server.post("/begin_weight_update", {"selector": "all"})[0] == 200
    assert trainer.send(tensors, True, flush_cache=False)[0] == 200
    names = ["model.norm.weight"]
    status, answer = server.post("/end_weight_update", {"weight_version": "6", "checksum_names": names})
    assert status == 200 and answer["checksums"] == {name: checksum(tensors[name]) for name in names}
    assert version(server) == "6" and greedy(server) == after


def test_a_session_with_a_refused_bucket_loads_nothing(server, trainer, folders, after):
    before = expected(server)
    tensors = list(weights(folders[1]).items())
    server.post("/begin_weight_update", {})
    assert trainer.send(dict(tensors[:3]), True, flush_cache=False)[0] == 200
    # The trainer's broadcast ends well also when the server has no such tensor.
    status, answer = trainer.send({"model.extra": torch.ones(3)}, True, flush_cache=False)
    assert status == 400 and "model.extra" in answer["message"] and answer["success"] is False
    status, answer = trainer.send(dict(tensors[3:]), True, weight_version="4")
    assert status == 400 and "model.extra" in answer["message"]
    assert server.post("/end_weight_update", {})[0] == 400
    assert version(server) == "0"
    server.post("/flush_cache", {})
    assert greedy(server) == before
    server.post("/begin_weight_update", {})  # and the next one is taken
    assert trainer.send(dict(tensors), False, weight_version="5")[0] == 200
    assert version(server) == "5" and greedy(server) == after


def test_without_a_session_a_refusal_tells_of_what_is_live_already(server, trainer, folders):
    tensors = list(weights(folders[1]).items())
    assert trainer.send(dict(tensors[:3]), True, flush_cache=False)[0] == 200
    status, answer = trainer.send({tensors[4][0]: torch.ones(2, 2)}, True, flush_cache=False)
    assert status == 400 and tensors[4][0] in answer["message"] and "partially updated" in answer["message"]
    assert trainer.send(dict(tensors), True)[0] == 200
    assert "partially" not in trainer.send({"nope": torch.ones(1)}, True)[1]["message"]


def test_a_trainer_that_goes_away_neither_hangs_nor_harms_the_server(server, trainer, folders, after):
    before = expected(server)
    tensors = weights(folders[1])
    body = trainer.described(tensors)
    waiting = server.pool.submit(server.post, "/update_weights_from_distributed", body)
    assert greedy(server) == before  # while it waits for the broadcast
    trainer.process.call("close")
    status, answer = waiting.result(30)
    assert status == 400 and "broke off" in answer["message"]
    status, answer = server.post("/update_weights_from_distributed", body)
    assert status == 400 and "no group" in answer["message"]
    assert trainer.join()[0] == 200
    assert trainer.send(tensors, True, weight_version="2")[0] == 200
    assert greedy(server) == after


WRONG = {
    "dtypes": [["float33"], ["nn"], []],
    "names": [[3], "model.norm.weight"],
    "shapes": [[[-64]], [[2**40, 2**40]], [[0, 2**70]], [64]],
    "load_format": ["zip"],
    "group_name": ["elsewhere"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_description_is_refused_before_anything_is_received(server, trainer, key, value):
    norm = {"model.norm.weight": torch.ones(64)}
    status, answer = server.post("/update_weights_from_distributed", {**trainer.described(norm), key: value})
    assert status == 400 and answer["success"] is False
    assert trainer.send(norm, True)[0] == 200  # the group is still of use


@pytest.mark.parametrize(
    "wrong",
    [{"backend": "mpi"}, {"backend": "nccl"}, {"rank_offset": 0}, {"rank_offset": 2}, {"master_port": "x"}],
    ids=str,
)
def test_a_group_that_cannot_be_is_refused(server, wrong):
    body = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    assert server.post("/init_weights_update_group", {**body, **wrong})[0] == 400


def test_a_group_without_its_trainer_is_given_up():
    place = GroupPlace("127.0.0.1", 9, 2, "g", "gloo")
    with pytest.raises(WeightSyncError, match="127.0.0.1:9"):
        asyncio.run(Groups(torch.device("cpu"), limit_s=1.0).join(place, 1))
