"""Weights on their way out of the trainer: Hugging Face folders, recovery points, and uploads that are verified."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from support.batches import actor_config, make, random_batch, train_one_step
from support.layouts import on_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from arealite.api.cli_args import LoRAConfig, OptimizerConfig
from arealite.api.errors import RecoveryError, WaitTimeout, WeightSyncError
from arealite.api.run_args import SaverConfig
from arealite.engine.checkpoint import Saver
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.engine.sharded_model import ShardedModel
from arealite.observe.run_folder import RunFolder
from arealite.weights.link import WeightLink
from arealite.weights.wire import checksum, iterate_tensors

pytestmark = pytest.mark.usefixtures("one_process")


class Servers:
    """The end of the link: two servers that load what they are told to; `loads` False: the second one does not."""

    def __init__(self):
        self.loads = True
        self.live = {"server-0": {}, "server-1": {}}

    def prepare_update(self):
        pass

    def update_weights(self, meta, send):
        for name, held in self.live.items():
            if name == "server-0" or self.loads:
                held.update((key, tensor.clone()) for key, tensor in iterate_tensors(meta))
        return {s: {key: checksum(held[key]) for key in meta.checksums} for s, held in self.live.items()}


def check_stale_copy(actor, monkeypatch):
    """One that is sent again after a step is noticed."""
    stale = [(name, tensor.clone()) for name, tensor in actor.named_full_tensors()]
    train_one_step(actor, random_batch())
    monkeypatch.setattr(ShardedModel, "named_full_tensors", lambda *_, **__: iter(stale))
    with pytest.raises(WeightSyncError, match="changed nothing"):
        actor.upload_weights()


@pytest.mark.parametrize("kind", ["shm", "disk"])
def test_upload_is_verified(tiny_llama, tmp_path, kind):
    actor, servers = make(tiny_llama), Servers()
    with pytest.raises(WeightSyncError, match="connect_engine"):
        actor.upload_weights()
    actor.connect_engine(servers, WeightLink(kind, tmp_path))
    assert actor.upload_weights() == 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    names = {name for name, _ in plain.named_parameters()}
    assert servers.live["server-0"].keys() == names
    assert actor.upload_weights() == 0  # nothing was trained in between: the same bytes are right
    train_one_step(actor, random_batch())
    assert actor.upload_weights() == 1
    for name, tensor in actor.named_full_tensors():
        assert torch.equal(servers.live["server-1"][name], tensor)
    actor.compute_logp(random_batch())  # leaves gathered compute copies behind, in which tied weights are two tensors
    assert actor.upload_weights() == 1
    assert servers.live["server-0"].keys() == names
    train_one_step(actor, random_batch(seed=1))
    servers.loads = False
    with pytest.raises(WeightSyncError, match="server-1"):
        actor.upload_weights()
    actor.destroy()


class Stuck(Servers):
    def prepare_update(self):
        if torch.distributed.get_rank() == 0:  # where the servers' client is
            raise WaitTimeout("server-1 is still being sent the last update")


def on_two(rank, path, folder):
    actor = make(path, collective_timeout_s=20.0)
    actor.connect_engine(Stuck(), WeightLink("disk", folder))
    with pytest.raises(WaitTimeout) as raised:
        actor.upload_weights()
    return str(raised.value)


def test_servers_that_are_not_ready_stop_all_ranks(tiny_llama, tmp_path):
    assert on_ranks(2, on_two, tiny_llama, tmp_path) == ["server-1 is still being sent the last update"] * 2


def test_a_stale_copy_is_noticed(tiny_llama, tmp_path, monkeypatch):
    actor = make(tiny_llama)
    actor.connect_engine(Servers(), WeightLink("disk", tmp_path))
    actor.upload_weights()
    check_stale_copy(actor, monkeypatch)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_steps_below_the_rounding_are_told_and_no_stale_copy(tiny_llama, tmp_path, monkeypatch, caplog, lora):
    """The weights are large beside the step: bfloat16 does not show it, and the servers get the same bytes again."""
    optimizer = OptimizerConfig(lr=1e-5)
    actor, servers = make(tiny_llama, dtype="bfloat16", lora=lora, optimizer=optimizer), Servers()
    with torch.no_grad():
        for p in actor.sharded.parameters.values():
            p.copy_(torch.ones_like(p))  # an adapter's zeros would show any step
    actor.connect_engine(servers, WeightLink("disk", tmp_path))
    actor.upload_weights()
    before = [p.to_local().clone() for p in actor.sharded.parameters.values()]
    for seed in (1, 2):
        train_one_step(actor, random_batch(seed=seed))
        actor.upload_weights()
    assert not all(
        torch.equal(p.to_local(), old) for p, old in zip(actor.sharded.parameters.values(), before, strict=True)
    )
    assert caplog.text.count("at learning rate 1e-05 moved none of") == 1  # said once
    if lora is None:  # as where the hub's names are not the model's: nothing is left that could tell
        train_one_step(actor, random_batch())
        with monkeypatch.context() as renamed, pytest.raises(WeightSyncError, match="changed nothing"):
            others = {f"own.{name}": p for name, p in actor.sharded.parameters.items()}
            renamed.setattr(actor._upload, "sharded", dataclasses.replace(actor.sharded, parameters=others))
            actor.upload_weights()
    optimizer.lr = 0.1
    check_stale_copy(actor, monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_folder_is_the_model(tiny_llama, tmp_path, dtype):
    actor = make(tiny_llama, dtype=dtype)
    train_one_step(actor, random_batch())
    for _ in range(2):  # the second save replaces the first
        actor.save(str(tmp_path / "step"))
    assert [p.name for p in tmp_path.iterdir()] == ["step"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step")
    assert loaded.dtype == getattr(torch, dtype)
    state = loaded.state_dict()
    for name, tensor in actor.named_full_tensors():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    if dtype == "float32":
        batch = random_batch()
        np.testing.assert_allclose(make(tmp_path / "step").compute_logp(batch), actor.compute_logp(batch), atol=1e-6)
    old, new = (AutoTokenizer.from_pretrained(p) for p in (tiny_llama, tmp_path / "step"))
    chat = [{"role": "user", "content": "12 + 3"}]
    assert new.apply_chat_template(chat) == old.apply_chat_template(chat)


def test_a_checkpoint_has_the_tokenizer_of_the_run(tiny_llama, tmp_path):
    other = AutoTokenizer.from_pretrained(tiny_llama)
    other.chat_template, other.eos_token = "{{ messages[0].content }}", "<|im_start|>"
    other.save_pretrained(tmp_path / "other")
    tokenizer, actor = AutoTokenizer.from_pretrained(tmp_path / "other"), make(tiny_llama)
    saver = Saver(SaverConfig(freq_steps=1), RunFolder(tmp_path), tokenizer)
    folder = saver.maybe_save(1, 0, actor)
    assert AutoTokenizer.from_pretrained(folder).chat_template == other.chat_template
    own = actor.sharded.hf_model.generation_config.eos_token_id
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [own, other.eos_token_id]


def test_recovery_goes_on_bit_for_bit(tiny_llama, tmp_path):
    batches = [random_batch(seed=s) for s in range(4)]
    straight = make(tiny_llama)
    for batch in batches[:2]:
        train_one_step(straight, batch)
    draws = [torch.rand(3), random.random(), np.random.rand()]  # the point holds the state after these
    straight.compute_logp(batches[0])  # leaves gathered compute copies behind, which are not the state
    straight.save_state(str(tmp_path / "point"))
    after = [torch.rand(3), random.random(), np.random.rand()]
    for batch in batches[2:]:
        train_one_step(straight, batch)

    resumed = make(tiny_llama)
    resumed.load_state(str(tmp_path / "point"))
    assert (resumed.version, resumed.num_updates) == (2, 2)
    drawn = [torch.rand(3), random.random(), np.random.rand()]
    assert torch.equal(drawn[0], after[0]) and drawn[1:] == after[1:] != draws[1:]
    for batch in batches[2:]:
        train_one_step(resumed, batch)
    for (name, a), (_, b) in zip(straight.named_full_tensors(), resumed.named_full_tensors(), strict=True):
        assert torch.equal(a, b), name


def test_an_incomplete_point_is_refused(tiny_llama, tmp_path):
    actor = make(tiny_llama)
    with pytest.raises(RecoveryError, match="cannot read"):
        actor.load_state(str(tmp_path / "nothing"))
    actor.save_state(str(tmp_path / "point"))
    for file in (tmp_path / "point" / "tensors").glob("*.distcp"):
        file.unlink()
    with pytest.raises(RecoveryError, match="cannot read"):
        actor.load_state(str(tmp_path / "point"))


def test_config_is_not_shared_between_engines(tiny_llama):
    config = actor_config(tiny_llama)
    before = dataclasses.asdict(config)
    FSDPPPOActor(config).initialize()
    assert dataclasses.asdict(config) == before
