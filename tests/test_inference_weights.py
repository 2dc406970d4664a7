"""Weight updates from disk and shared memory: whole and verified, or refused with nothing changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.inference import LocalServer, greedy, save_tiny_llama, served, version

from arealite.api.types import WeightUpdateMeta, as_record
from arealite.weights.link import WeightLink
from arealite.weights.wire import checksum


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shm_body(meta: WeightUpdateMeta, **more: Any) -> dict[str, Any]:
    return {
        "path": meta.path,
        "slots": [as_record(slot) for slot in meta.slots],
        "weight_version": str(meta.version),
        "checksum_names": list(meta.checksums),
        **more,
    }


def publish(folder: Path, number: int) -> tuple[WeightLink, WeightUpdateMeta]:
    link = WeightLink("shm", folder)
    meta = link.publish(tensors_of(folder).items(), number)
    assert meta is not None
    return link, meta


def expected(folder: Path) -> tuple[list[int], list[float]]:
    with LocalServer(served(folder)) as fresh:
        return greedy(fresh)


def test_update_from_shared_memory(server, folders):
    before = greedy(server)
    _link, meta = publish(folders[1], 5)
    status, answer = server.post("/update_weights_from_shm", shm_body(meta))
    assert status == 200 and answer["success"] and answer["checksums"] == meta.checksums and meta.checksums
    assert version(server) == "5"
    assert greedy(server) == expected(folders[1]) != before


def test_update_from_disk(server, folders):
    names = ["model.norm.weight", "model.embed_tokens.weight"]
    body = {"model_path": str(folders[1]), "weight_version": "7", "checksum_names": names}
    status, answer = server.post("/update_weights_from_disk", body)
    tensors = tensors_of(folders[1])
    assert status == 200 and answer["checksums"] == {name: checksum(tensors[name]) for name in names}
    assert version(server) == "7" and greedy(server) == expected(folders[1])


def test_checksums_are_read_from_the_live_parameters(server):
    """Also those of tensors that an update leaves alone."""
    asked = {"checksum_names": ["model.norm.weight"]}
    server.post("/begin_weight_update", {})
    before = server.post("/end_weight_update", asked)[1]["checksums"]
    norm = server.batcher.model.module.model.norm.weight
    with torch.no_grad():
        norm.mul_(2)
    server.post("/begin_weight_update", {})
    after = server.post("/end_weight_update", asked)[1]["checksums"]
    assert before != after == {"model.norm.weight": checksum(norm)}
    server.post("/begin_weight_update", {})
    status, answer = server.post("/end_weight_update", {"checksum_names": ["nope"]})
    assert status == 400 and answer["success"] is False


def change(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """One thing wrong with an update."""
    norm = tensors["model.norm.weight"]
    if kind == "missing":
        del tensors["model.norm.weight"]
    elif kind == "unknown":
        tensors["model.extra.weight"] = norm.clone()
    elif kind == "shape":
        tensors["model.norm.weight"] = norm[:-1].clone()
    elif kind == "dtype":
        tensors["model.norm.weight"] = norm.to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "dtype"])
@pytest.mark.parametrize("way", ["disk", "shm"])
def test_a_wrong_update_is_refused_and_changes_nothing(server, folders, tmp_path, kind, way):
    before = greedy(server)
    tensors = tensors_of(folders[1])
    change(kind, tensors)
    if way == "disk":
        if kind == "dtype":
            tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int32)  # float dtypes are cast, as at load
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        status, answer = server.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "9"})
    else:
        link = WeightLink("shm", tmp_path)
        meta = link.publish(tensors.items(), 9)
        assert meta is not None
        status, answer = server.post("/update_weights_from_shm", shm_body(meta, checksum_names=[]))
    assert status == 400 and answer["success"] is False
    assert ("model.extra.weight" if kind == "unknown" else "model.norm.weight") in answer["message"]
    assert version(server) == "0"
    server.post("/flush_cache", {})
    assert greedy(server) == before


def test_a_partial_update_needs_to_say_so(server, folders, tmp_path):
    norm = tensors_of(folders[1])["model.norm.weight"] * 3
    save_file({"model.norm.weight": norm}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    body = {"model_path": str(tmp_path), "weight_version": "2", "checksum_names": ["model.norm.weight"]}
    assert server.post("/update_weights_from_disk", body)[0] == 400
    status, answer = server.post("/update_weights_from_disk", {**body, "partial": True})
    assert status == 200 and answer["checksums"] == {"model.norm.weight": checksum(norm)} and version(server) == "2"


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


@pytest.mark.parametrize(
    "broken",
    [
        {"slots": []},
        {"slots": [3]},
        {"slots": [{"name": "a"}]},
        {"path": ""},
        {"path": "/nonexistent/file"},
        {"weight_version": 5},
        {"flush_cache": "no"},
        {"checksum_names": ["nope"]},
        {"slot": {"dtype": "nn"}},
        {"slot": {"dtype": "float99"}},
        {"slot": {"nbytes": 1}},
        {"slot": {"shape": [-1, -64]}},
        {"slot": {"offset": -8}},
        {"slot": {"offset": 10**15}},
        {"slot": {"shape": [2**70]}},
        {"slot": {"shape": [0, 2**70], "nbytes": 0}},
        {"path": "a\0b"},
    ],
    ids=str,
)
def test_a_wrong_description_is_refused(server, folders, broken):
    _link, meta = publish(folders[1], 5)
    body = shm_body(meta)
    if "slot" in broken:
        body["slots"][3].update(broken["slot"])
    else:
        body.update(broken)
    assert server.post("/update_weights_from_shm", body)[0] == 400
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
