"""Weight update sessions that go wrong: nothing of them becomes live, stays in memory, or stands in another's way."""

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.inference import WAIT_S, LocalServer, version

from arealite.api.errors import WeightSyncError
from arealite.inference.core import receiver
from arealite.inference.core.weight_updates import Updates
from arealite.inference.requests import UpdateOptions
from arealite.weights.wire import checksum


def weights(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(folder / "model.safetensors").items())


@pytest.fixture
def send(server, tmp_path):
    """A call that makes nothing live inside a session."""

    def sent(tensors: list[tuple[str, torch.Tensor]]) -> tuple[int, Any]:
        save_file(dict(tensors), tmp_path / "model.safetensors")
        body = {"model_path": str(tmp_path), "partial": True, "flush_cache": False}
        return server.post("/update_weights_from_disk", body)

    return sent


def checksums(server: LocalServer) -> dict[str, int]:
    model = server.batcher.model
    return {name: checksum(model.tensors[name]) for name in model.tensor_names}


def test_a_whole_session_leaves_nothing_partial(server, folders, send):
    server.post("/begin_weight_update", {})
    assert send(weights(folders[1]))[0] == 200
    assert server.post("/end_weight_update", {})[0] == 200
    assert "partially" not in send([("nope", torch.ones(1))])[1]["message"]


def test_a_session_whose_trainer_is_gone_is_dropped(server, folders, monkeypatch):
    """Its tensors take no memory for ever, and reach neither the weights nor anyone else's update."""
    before = checksums(server)
    found: list[weakref.ref[torch.Tensor]] = []
    staging = receiver.stage

    def stage(*args: Any) -> dict[str, torch.Tensor]:
        staged = staging(*args)
        found.extend(map(weakref.ref, staged.values()))
        return staged

    async def abandon() -> None:
        updates = Updates(server.engine, session_limit_s=0.05)
        await updates.begin()
        await updates.take(lambda: weights(folders[1]), UpdateOptions(flush_cache=False))
        async with asyncio.timeout(WAIT_S):
            while gc.collect() < 0 or any(ref() is not None for ref in found):
                await asyncio.sleep(0.01)
        with pytest.raises(WeightSyncError, match="nothing more came"):
            await updates.end(UpdateOptions(weight_version="3"))

    monkeypatch.setattr(receiver, "stage", stage)
    asyncio.run(abandon())
    assert found and version(server) == "0" and checksums(server) == before


def test_a_whole_update_takes_the_place_of_an_unfinished_session(server, folders, send):
    server.post("/begin_weight_update", {})
    assert send([("model.norm.weight", torch.zeros(64))])[0] == 200
    assert send([("nope", torch.zeros(64))])[0] == 400
    assert server.post("/update_weights_from_disk", {"model_path": str(folders[1]), "weight_version": "1"})[0] == 200
    assert server.post("/end_weight_update", {})[0] == 200
    assert version(server) == "1" and checksums(server) == {name: checksum(t) for name, t in weights(folders[1])}


def test_the_end_of_no_session_claims_no_success(server):
    status, answer = server.post("/end_weight_update", {"weight_version": "3"})
    assert status == 400 and "nothing was changed" in answer["message"] and version(server) == "0"


def test_a_read_that_fails_in_any_way_fails_its_session(server, folders, send, monkeypatch):
    tensors = weights(folders[1])

    def no_memory(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    server.post("/begin_weight_update", {})
    with monkeypatch.context() as patch:
        patch.setattr("arealite.inference.http.control.iterate_tensors", no_memory)
        assert send(tensors[:5])[0] == 400
    assert send(tensors[5:])[0] == 400
    assert server.post("/end_weight_update", {"weight_version": "3"})[0] == 400
    assert version(server) == "0"
