"""Weight updates from disk and shared memory, and sessions of several: whole and verified, or refused with nothing
changed."""

import asyncio
import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.inference import WAIT_S, LocalServer, greedy, save_tiny_llama, served, version

from arealite.api.errors import WeightSyncError
from arealite.api.types import WeightUpdateMeta, as_record
from arealite.inference.core import weight_updates
from arealite.inference.core.requests import UpdateOptions
from arealite.inference.core.weight_updates import Updates
from arealite.weights.link import WeightLink
from arealite.weights.wire import checksum

NORM = "model.norm.weight"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shm_body(meta: WeightUpdateMeta, **more: Any) -> dict[str, Any]:
    body = {"path": meta.path, "slots": [as_record(slot) for slot in meta.slots], "weight_version": str(meta.version)}
    return {**body, "checksum_names": list(meta.checksums), **more}


def publish(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> tuple[WeightLink, Any]:
    """In shared memory, which lives as long as the link."""
    link = WeightLink("shm", folder)
    return link, link.publish(tensors.items(), number)


def expected(folder: Path) -> tuple[list[int], list[float]]:
    with LocalServer(served(folder)) as fresh:
        return greedy(fresh)


def test_update_from_shared_memory(server, folders):
    before = greedy(server)
    _link, meta = publish(folders[1], 5, tensors_of(folders[1]))
    status, answer = server.post("/update_weights_from_shm", shm_body(meta))
    assert status == 200 and answer["success"] and answer["checksums"] == meta.checksums and meta.checksums
    assert version(server) == "5"
    assert greedy(server) == expected(folders[1]) != before


def test_update_from_disk(server, folders):
    names = [NORM, "model.embed_tokens.weight"]
    body = {"model_path": str(folders[1]), "weight_version": "7", "checksum_names": names}
    status, answer = server.post("/update_weights_from_disk", body)
    tensors = tensors_of(folders[1])
    assert status == 200 and answer["checksums"] == {name: checksum(tensors[name]) for name in names}
    assert version(server) == "7" and greedy(server) == expected(folders[1])


def test_checksums_are_read_from_the_live_parameters(server):
    """Also those of tensors that an update leaves alone."""
    asked = {"checksum_names": [NORM]}
    server.post("/begin_weight_update", {})
    before = server.post("/end_weight_update", asked)[1]["checksums"]
    norm = server.batcher.model.module.model.norm.weight
    with torch.no_grad():
        norm.mul_(2)
    server.post("/begin_weight_update", {})
    after = server.post("/end_weight_update", asked)[1]["checksums"]
    assert before != after == {NORM: checksum(norm)}
    server.post("/begin_weight_update", {})
    status, answer = server.post("/end_weight_update", {"checksum_names": ["nope"]})
    assert status == 400 and answer["success"] is False


# One thing wrong with an update, by disk and by shared memory. From disk float dtypes are cast, as at load.
WRONG = {
    "missing": [{NORM: None}] * 2,
    "unknown": [{"model.extra.weight": torch.ones(64)}] * 2,
    "shape": [{NORM: torch.ones(63)}] * 2,
    "dtype": [{NORM: torch.ones(64, dtype=torch.int32)}, {NORM: torch.ones(64).bfloat16()}],
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("way", ["disk", "shm"])
def test_a_wrong_update_is_refused_and_changes_nothing(server, folders, tmp_path, kind, way):
    before = greedy(server)
    changes = WRONG[kind][way == "shm"]
    tensors = {name: tensor for name, tensor in (tensors_of(folders[1]) | changes).items() if tensor is not None}
    if way == "disk":
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        status, answer = server.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "9"})
    else:
        _link, meta = publish(tmp_path, 9, tensors)
        status, answer = server.post("/update_weights_from_shm", shm_body(meta, checksum_names=[]))
    assert status == 400 and answer["success"] is False
    assert all(name in answer["message"] for name in changes)
    assert version(server) == "0"
    server.post("/flush_cache", {})
    assert greedy(server) == before


def test_a_partial_update_needs_to_say_so(server, folders, tmp_path):
    norm = tensors_of(folders[1])[NORM] * 3
    save_file({NORM: norm}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    body = {"model_path": str(tmp_path), "weight_version": "2", "checksum_names": [NORM]}
    assert server.post("/update_weights_from_disk", body)[0] == 400
    status, answer = server.post("/update_weights_from_disk", {**body, "partial": True})
    assert status == 200 and answer["checksums"] == {NORM: checksum(norm)} and version(server) == "2"


def test_a_tied_head_may_be_sent_or_left_out(server, folders, tmp_path):
    tensors = tensors_of(folders[1])
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert server.post("/update_weights_from_disk", {"model_path": str(tmp_path)})[0] == 200
    assert version(server) == "0", "no version given: it stays"
    assert greedy(server) == expected(folders[1])


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path):
    folder = save_tiny_llama(tmp_path, tied=False)
    with LocalServer(served(folder)) as server:
        assert "lm_head.weight" in server.batcher.model.tensor_names
        tensors = tensors_of(folder)
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        status, answer = server.post("/update_weights_from_disk", {"model_path": str(folder)})
        assert status == 400 and "lm_head.weight" in answer["message"]


def test_a_folder_that_is_replaced_does_not_change_the_served_weights(folders, tmp_path):
    """The server holds its weights in memory of its own, not in a map of the file."""
    folder = tmp_path / "model"
    shutil.copytree(folders[0], folder)
    with LocalServer(served(folder)) as server:
        before = greedy(server)
        with open(folder / "model.safetensors", "r+b") as file:
            size = file.seek(0, 2)
            file.seek(size // 2)
            file.write(b"\x11" * (size - size // 2))
        server.post("/flush_cache", {})
        assert greedy(server) == before


BODIES = [{"slots": value} for value in ([], [3], [{"name": "a"}])]
BODIES += [{"path": value} for value in ("", "/nonexistent/file", "a\0b")]
BODIES += [{"weight_version": 5}, {"flush_cache": "no"}, {"checksum_names": ["nope"]}]
SLOTS = [{"dtype": "nn"}, {"dtype": "float99"}, {"nbytes": 1}, {"offset": -8}, {"offset": 10**15}]
SLOTS += [{"shape": [-1, -64]}, {"shape": [2**70]}, {"shape": [0, 2**70], "nbytes": 0}]


@pytest.mark.parametrize(("changes", "of_slot"), [*((body, {}) for body in BODIES), *(({}, slot) for slot in SLOTS)])
def test_a_wrong_description_is_refused(server, folders, changes, of_slot):
    _link, meta = publish(folders[1], 5, tensors_of(folders[1]))
    body = shm_body(meta)
    body["slots"][3].update(of_slot)
    assert server.post("/update_weights_from_shm", body | changes)[0] == 400
    assert version(server) == "0" and server.get("/health")[0] == 200


def test_a_missing_or_torn_folder_is_refused(server, folders, tmp_path):
    before = greedy(server)
    assert server.post("/update_weights_from_disk", {"model_path": str(tmp_path / "none")})[0] == 400
    raw = (folders[1] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    status, answer = server.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert status == 400 and answer["success"] is False
    assert server.post("/update_weights_from_disk", {})[0] == 400
    server.post("/flush_cache", {})
    assert greedy(server) == before


@pytest.mark.parametrize("kind", ["vanished", "folder"])
def test_files_that_cannot_be_read_are_refused(server, tmp_path, kind):
    """A folder that is removed while it is read must not end the server."""
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "gone")
    status, answer = server.post("/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert status == 400 and str(tmp_path) in answer["message"]
    assert server.get("/health")[0] == 200


def test_the_version_alone_can_be_set(server):
    status, answer = server.post("/update_weight_version", {"new_version": "12", "abort_all_requests": False})
    assert status == 200 and answer == {"success": True, "message": "", "new_version": "12"}
    assert server.generate([1], max_new_tokens=1)["meta_info"]["weight_versions"][0]["version"] == "12"
    assert server.post("/update_weight_version", {"new_version": 12})[0] == 400


# -- sessions that go wrong: nothing of them becomes live, stays in memory, or stands in another's way


@pytest.fixture
def send(server, tmp_path):
    """A call that makes nothing live inside a session."""

    def sent(tensors: dict[str, torch.Tensor]) -> tuple[int, Any]:
        save_file(tensors, tmp_path / "model.safetensors")
        body = {"model_path": str(tmp_path), "partial": True, "flush_cache": False}
        return server.post("/update_weights_from_disk", body)

    return sent


def live(server: LocalServer) -> dict[str, int]:
    """Checksums."""
    model = server.batcher.model
    return {name: checksum(model.tensors[name]) for name in model.tensor_names}


def test_a_whole_session_leaves_nothing_partial(server, folders, send):
    server.post("/begin_weight_update", {})
    assert send(tensors_of(folders[1]))[0] == 200
    assert server.post("/end_weight_update", {})[0] == 200
    assert "partially" not in send({"nope": torch.ones(1)})[1]["message"]


def test_a_session_whose_trainer_is_gone_is_dropped(server, folders, monkeypatch):
    """Its tensors take no memory for ever, and reach neither the weights nor anyone else's update."""
    before = live(server)
    found: list[weakref.ref[torch.Tensor]] = []
    staging = weight_updates.stage

    def stage(*args: Any) -> dict[str, torch.Tensor]:
        staged = staging(*args)
        found.extend(map(weakref.ref, staged.values()))
        return staged

    async def abandon() -> None:
        updates = Updates(server.engine, session_limit_s=0.05)
        await updates.begin()
        await updates.take(tensors_of(folders[1]).items, UpdateOptions(flush_cache=False))
        async with asyncio.timeout(WAIT_S):
            while gc.collect() < 0 or any(ref() is not None for ref in found):
                await asyncio.sleep(0.01)
        with pytest.raises(WeightSyncError, match="nothing more came"):
            await updates.end(UpdateOptions(weight_version="3"))

    monkeypatch.setattr(weight_updates, "stage", stage)
    asyncio.run(abandon())
    assert found and version(server) == "0" and live(server) == before


def test_a_whole_update_takes_the_place_of_an_unfinished_session(server, folders, send):
    server.post("/begin_weight_update", {})
    assert send({NORM: torch.zeros(64)})[0] == 200
    assert send({"nope": torch.zeros(64)})[0] == 400
    assert server.post("/update_weights_from_disk", {"model_path": str(folders[1]), "weight_version": "1"})[0] == 200
    assert server.post("/end_weight_update", {})[0] == 200
    wanted = {name: checksum(tensor) for name, tensor in tensors_of(folders[1]).items()}
    assert version(server) == "1" and live(server) == wanted


def test_the_end_of_no_session_claims_no_success(server):
    status, answer = server.post("/end_weight_update", {"weight_version": "3"})
    assert status == 400 and "nothing was changed" in answer["message"] and version(server) == "0"


def test_a_read_that_fails_in_any_way_fails_its_session(server, folders, send, monkeypatch):
    tensors = tensors_of(folders[1])
    part = {name: tensors.pop(name) for name in list(tensors)[:5]}

    def no_memory(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    server.post("/begin_weight_update", {})
    with monkeypatch.context() as patch:
        patch.setattr("arealite.inference.http.control.iterate_tensors", no_memory)
        assert send(part)[0] == 400
    assert send(tensors)[0] == 400
    assert server.post("/end_weight_update", {"weight_version": "3"})[0] == 400
    assert version(server) == "0"
