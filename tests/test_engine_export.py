"""Hugging Face folders written tensor by tensor: names and files as the hub has them, little memory, no hang."""

import json
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.batches import make
from support.layouts import on_ranks
from test_engine_loading import save_model
from transformers import AutoModelForCausalLM

from arealite.engine.checkpoint import attempt_on_ranks
from arealite.inference.core.served_model import ServedModel
from arealite.inference.core.weight_updates import load, stage
from arealite.weights import wire

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen2"])
def test_a_saved_folder_has_the_names_of_the_hub(kind, tmp_path):
    path = save_model(kind, tmp_path / "hub")
    wanted = load_file(tmp_path / "hub" / "model.safetensors")
    actor = make(path)
    actor.save(str(tmp_path / "one"))
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in wanted.items())
    actor.sharded.save(str(tmp_path / "several"), shard_bytes=40_000)
    written = sorted(p.name for p in (tmp_path / "several").glob("*.safetensors"))
    assert written == [f"model-{i:05d}-of-{len(written):05d}.safetensors" for i in range(1, len(written) + 1)]
    assert len(written) > 1
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert {n: f for f in written for n in load_file(tmp_path / "several" / f)} == index["weight_map"]
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "several").state_dict()
    assert loaded.keys() == plain.keys() and all(torch.equal(loaded[name], plain[name]) for name in plain)


def test_one_file_is_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def tensors():
        nonlocal most
        for i in range(30):
            tensor = torch.full((250,), float(i))
            alive.append(weakref.ref(tensor.untyped_storage()))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"t{i}", tensor

    wire.write_tensors(tmp_path, tensors(), shard_bytes=4000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 8
    assert 4 <= most <= 6  # one file's worth, the one that comes and the one that went


def fail_on_head(rank: int, path: str, out: str) -> list[str]:
    """What each of three saves says: one into a place that cannot be, one that breaks in the midst, one that works."""
    actor = make(path)
    save, write = partial(actor.sharded.save, shard_bytes=40_000), wire.save_file
    told = [attempt_on_ranks(actor.collective, save, Path(out) / "file" / "step")]

    def full(tensors, file, metadata):
        if file.name == "2":
            raise OSError("No space left on device")
        write(tensors, file, metadata)

    wire.save_file = full
    told.append(attempt_on_ranks(actor.collective, save, Path(out) / "step"))
    wire.save_file = write
    told.append(attempt_on_ranks(actor.collective, save, Path(out) / "step"))
    return told


def test_a_write_error_on_one_rank_stops_no_other(tmp_path):
    path = save_model("qwen3_moe", tmp_path / "hub")
    (tmp_path / "file").touch()
    first, second = on_ranks(2, fail_on_head, path, str(tmp_path))
    assert first == second
    assert "rank 0" in first[0] and "rank 1" not in first[0]
    assert "rank 0: No space left on device" in first[1]
    assert first[2] == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "hub", "step"]
    plain, saved = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (path, tmp_path / "step"))
    assert all(torch.equal(t, saved.state_dict()[name]) for name, t in plain.state_dict().items())


def test_the_native_server_takes_experts_one_by_one_or_together(tmp_path):
    path = save_model("qwen3_moe", tmp_path)
    served = ServedModel.load(path, torch.float32, torch.device("cpu"), None, False)
    actor = make(path)
    before = {name: tensor.clone() for name, tensor in actor.named_full_tensors()}
    with torch.no_grad():
        for parameter in actor.sharded.model.parameters():
            parameter.mul_(1.5)
    hub = list(actor.sharded.hub_tensors())
    assert {name for name, _ in hub} == load_file(tmp_path / "model.safetensors").keys() == set(served.tensor_names)
    load(served, stage(served, lambda: hub, castable=False, needs_all=True))
    for name, tensor in before.items():
        assert torch.equal(served.module.state_dict()[name], tensor * 1.5), name
    load(served, stage(served, before.items, castable=False, needs_all=True))
    for name, tensor in before.items():
        assert torch.equal(served.module.state_dict()[name], tensor), name
