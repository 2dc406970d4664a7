"""Weight updates that are adapters: to the built-in server and to one as strict as SGLang, with requests in flight."""

import json
import time
import urllib.request

import peft
import pytest
import torch
from support.rollout import MembersWorkflow, quick_config, serving
from test_rollout_native import check_versions
from transformers import AutoModelForCausalLM

from arealite.api.errors import ConfigError, WeightSyncError
from arealite.api.types import Task
from arealite.observe.records import version_spans
from arealite.rollout.client import RemoteNativeEngine, RemoteSGLangEngine
from arealite.weights.link import WeightLink, verify

SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def address(tiny_llama):
    with serving(tiny_llama) as found:
        yield found


@pytest.fixture(scope="module")
def policies(tiny_llama, tmp_path_factory):
    """The adapters of even and of odd versions, each with its merged model."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=SETTINGS["target_modules"])
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        tensors = {name: t.detach().clone() for name, t in peft.get_peft_model_state_dict(model).items()}
        found.append((tensors, model.merge_and_unload()))
    return found


def publish(link, policies, version):
    return link.publish(policies[version % 2][0].items(), version, adapter=SETTINGS)


def told(address: str, path: str) -> dict:
    return json.loads(urllib.request.urlopen(f"http://{address}{path}", timeout=60).read())


def train_for_a_while(engine, link: WeightLink, policies, confirms: bool):
    """Requests in flight through four updates, one of them before the first; (groups, statistics, scores of the last
    version)."""
    previous = None
    for version in range(5):
        meta = publish(link, policies, version)
        receipts = engine.update_weights(meta, link)
        assert list(receipts) == (["server-0"] if confirms else [])
        verify(meta, receipts, previous, must_differ=True)
        previous = meta
        if version == 0:
            for i in range(4):
                engine.submit(Task(f"e0-r{i}", prompt="x"), MembersWorkflow(num_members=2, max_new_tokens=120))
        time.sleep(0.1)
    groups = engine.wait(4, timeout_s=120)
    return [t for group in groups for t in group.trajectories], engine.stats()


@pytest.mark.parametrize("pause_mode", ["retract", "in_place", "abort"])
def test_the_built_in_server_swaps_the_adapter_under_running_requests(address, policies, tmp_path, pause_mode):
    config = quick_config(pause_mode=pause_mode, max_head_offpolicyness=8, consumer_batch_size=8)
    engine = RemoteNativeEngine(config, ledger_path=tmp_path / "ledger.jsonl")
    engine.initialize(addresses=[address])
    try:
        trajectories, stats = train_for_a_while(engine, WeightLink("disk", tmp_path), policies, confirms=True)
        check_versions(engine, trajectories, stats, [model for _, model in policies], pause_mode, within=2e-4)
        changes = sum(len(version_spans(t)) - 1 for t in trajectories)
        assert stats["num_interruptions"] == changes > 0  # the swap is made between two tokens, without an abort
        assert told(address, "/model_info")["weight_version"] == "4"
        sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in sorted(tmp_path.glob("v*"))]
        numbers = sum(t.nbytes for t in policies[0][0].values())
        assert len(sizes) == 2 and all(numbers < size < numbers + 4000 for size in sizes)  # the adapter alone travels
    finally:
        engine.destroy()


def test_a_server_that_comes_later_gets_the_adapter_first(address, policies, tiny_llama, tmp_path):
    engine, link = RemoteNativeEngine(quick_config()), WeightLink("disk", tmp_path)
    engine.initialize(addresses=[address])
    try:
        engine.update_weights(publish(link, policies, 7))
        with serving(tiny_llama) as late:
            engine.add_server(late)
            end = time.monotonic() + 240
            while engine.stats()["num_servers_alive"] < 2:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert told(late, "/model_info")["weight_version"] == "7"
            assert [card["id"] for card in told(late, "/v1/models")["data"]][1:] == ["policy"]
            meta = publish(link, policies, 8)
            receipts = engine.update_weights(meta)
            assert receipts.keys() == {"server-0", "server-1"}
            verify(meta, receipts)
            meta.checksums[next(iter(meta.checksums))] ^= 1
            with pytest.raises(WeightSyncError, match="holds other weights than the trainer"):
                verify(meta, receipts)
    finally:
        engine.destroy()


def test_an_adapter_that_does_not_fit_is_refused_and_the_old_one_stays(address, policies, tmp_path):
    engine, link = RemoteNativeEngine(quick_config()), WeightLink("disk", tmp_path)
    engine.initialize(addresses=[address])
    try:
        engine.update_weights(publish(link, policies, 9))
        broken = {name.replace("layers.1", "layers.5"): tensor for name, tensor in policies[0][0].items()}
        with pytest.raises(WeightSyncError, match=r"no linear layer 'model\.layers\.5"):
            engine.update_weights(link.publish(broken.items(), 10, adapter=SETTINGS))
        assert told(address, "/model_info")["weight_version"] == "9"
    finally:
        engine.destroy()


def test_sglang_unloads_and_loads_while_nothing_runs(policies, tiny_llama, tmp_path):
    config = quick_config(pause_mode="abort", max_head_offpolicyness=8, consumer_batch_size=8)
    link = WeightLink("disk", tmp_path)
    with serving(tiny_llama, "--strict-sglang") as address:
        engine = RemoteSGLangEngine(config, ledger_path=tmp_path / "ledger.jsonl")
        engine.initialize(addresses=[address])
        try:
            trajectories, stats = train_for_a_while(engine, link, policies, confirms=False)
            check_versions(engine, trajectories, stats, [model for _, model in policies], "abort", within=2e-4)
            assert stats["num_interruptions"] > 0
        finally:
            engine.destroy()
        engine = RemoteSGLangEngine(quick_config(pause_mode="retract"))
        engine.initialize(addresses=[address])
        try:
            with pytest.raises(ConfigError, match=r"set rollout\.pause_mode=abort"):
                engine.update_weights(publish(link, policies, 5))
        finally:
            engine.destroy()
