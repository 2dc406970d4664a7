"""LoRA in the trainer: against peft's own training step, what is saved, frozen and recovered, and what is refused."""

import builtins
import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from support import batches
from support.batches import random_batch, train_one_step
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from arealite.api.cli_args import LoRAConfig, OptimizerConfig
from arealite.api.errors import ConfigError, RecoveryError
from arealite.engine.lora import add_adapters
from arealite.engine.ppo.actor import FSDPPPOActor

pytestmark = pytest.mark.usefixtures("one_process")
TARGETS = LoRAConfig().target_modules


def make(path, rank=4, alpha=6, targets=TARGETS, **changes):
    return batches.make(path, lora=LoRAConfig(rank, alpha, targets), **changes)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shake(actor):
    """B away from 0, so that A has gradients too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in actor.sharded.parameters.items():
            if ".lora_B." in name:
                local(p).normal_(0, 0.3, generator=generator)


def nll(actor_or_model, batch):
    """The sum of -logp of the loss tokens, and its backward pass; of a peft model by plain padded batches."""
    if isinstance(actor_or_model, FSDPPPOActor):
        total = 0.0
        for micro in actor_or_model._micro_batches(batch, "test"):
            logp, _ = actor_or_model.sharded.model(micro, 1.0)
            loss = -logp.sum()
            loss.backward()
            total += float(loss.detach())
        return total
    rows = np.split(batch.tokens, batch.cu_seqlens[1:-1])
    width = max(map(len, rows))
    ids, mask, wanted = (torch.zeros(len(rows), width, dtype=kind) for kind in (torch.long, torch.long, torch.bool))
    for i, (row, own) in enumerate(zip(rows, np.split(batch.loss_mask, batch.cu_seqlens[1:-1]), strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
        wanted[i, : len(row)] = torch.from_numpy(own)
    logp = actor_or_model(ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    loss = -logp[wanted[:, 1:]].sum()
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_loss_and_gradients_are_those_of_peft(tiny_llama, tmp_path, checkpointing):
    actor, batch = make(tiny_llama, gradient_checkpointing=checkpointing, max_tokens_per_mb=60), random_batch()
    shake(actor)
    actor.save(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert nll(actor, batch) == pytest.approx(nll(theirs, batch), rel=1e-5)
    found = {f"base_model.model.{name}": p for name, p in actor.sharded.parameters.items()}
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and len(found) == 2 * 7 * 2
    for name, p in expected.items():
        torch.testing.assert_close(local(found[name].grad), p.grad, rtol=1e-4, atol=1e-5)
    assert all(
        p.grad is None for name, p in actor.sharded.hf_model.named_parameters() if name not in actor.sharded.parameters
    )


def test_what_is_saved_is_the_adapter_and_merges_to_what_was_trained(tiny_llama, tmp_path):
    actor, batch = make(tiny_llama), random_batch()
    before = actor.compute_logp(batch)
    for _ in range(2):
        stats = train_one_step(actor, batch)
    assert stats["grad_norm"] > 0 and not stats["skipped"]
    actor.save(str(tmp_path / "adapter"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 6, 0.0)
    AutoTokenizer.from_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    own = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for name, p in merged.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tensors:
            added = 6 / 4 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(p, own[name] + added)
        else:
            assert torch.equal(p, own[name])
    merged.save_pretrained(tmp_path / "merged")
    plain = batches.make(tmp_path / "merged")
    after = actor.compute_logp(batch)
    np.testing.assert_allclose(plain.compute_logp(batch), after, atol=2e-5)
    assert np.abs(after - before).max() > 1e-3


def test_the_base_is_held_in_the_compute_dtype_and_the_adapters_in_float32(tiny_llama):
    actor, batch = make(tiny_llama, dtype="bfloat16"), random_batch()
    held = {name: (p.dtype, p.requires_grad) for name, p in actor.sharded.hf_model.named_parameters()}
    assert {d for n, d in held.items() if n in actor.sharded.parameters} == {(torch.float32, True)}
    assert {d for n, d in held.items() if n not in actor.sharded.parameters} == {(torch.bfloat16, False)}
    assert actor.sharded.hf_model.model.rotary_emb.inv_freq.dtype == torch.float32
    # One process computes with the frozen weights themselves: FSDP would hold a gathered copy besides.
    named = actor.sharded.hf_model.named_parameters()
    assert {name for name, p in named if isinstance(p, DTensor)} == actor.sharded.parameters.keys()
    full = batches.make(tiny_llama, dtype="bfloat16")
    np.testing.assert_array_equal(actor.compute_logp(batch), full.compute_logp(batch))  # B is 0
    train_one_step(actor, batch)
    assert {str(p.dtype) for p in actor.sharded.optimizer.state} == {"torch.float32"}
    assert len(actor.sharded.optimizer.state) == len(actor.sharded.parameters)
    assert np.abs(actor.compute_logp(batch) - full.compute_logp(batch)).max() > 1e-3


def test_adapters_start_from_the_seed_and_their_names(tiny_llama):
    def start(**changes):
        return dict(make(tiny_llama, **changes).named_full_tensors(torch.float32))

    one, same, other = start(seed=3), start(seed=3, targets=["q_proj"]), start(seed=4)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[name.replace("layers.1", "layers.0")])
    assert one[name].abs().max() <= 64**-0.5 and one[name].std() == pytest.approx((3 * 64) ** -0.5, rel=0.2)
    assert all(not t.any() for name, t in one.items() if "lora_B" in name)


def test_a_recovery_point_holds_the_adapters_alone(tiny_llama, tmp_path):
    batch, actors = random_batch(), [make(tiny_llama) for _ in range(2)]
    for _ in range(2):
        train_one_step(actors[0], batch)
    actors[0].save_state(str(tmp_path / "state"))
    size = sum(f.stat().st_size for f in (tmp_path / "state" / "tensors").iterdir())
    assert size < 0.1 * sum(4 * p.numel() for p in actors[0].sharded.hf_model.parameters())
    actors[1].load_state(str(tmp_path / "state"))
    stats = [train_one_step(actor, batch) for actor in actors]
    for key in ("loss", "grad_norm"):
        assert stats[0][key] == stats[1][key]
    found = [dict(actor.named_full_tensors(torch.float32)) for actor in actors]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with pytest.raises(RecoveryError, match="expected one written with this model"):
        make(tiny_llama, rank=8).load_state(str(tmp_path / "state"))


def test_a_bad_update_is_skipped_and_clipping_holds(tiny_llama):
    actor, batch = make(tiny_llama, optimizer=OptimizerConfig(lr=1e-3, max_grad_norm=1e-6)), random_batch()
    before = dict(actor.named_full_tensors(torch.float32))
    bad = random_batch()
    bad.logprobs = np.full_like(bad.logprobs, np.nan)
    assert train_one_step(actor, bad)["skipped"] == 1
    now = dict(actor.named_full_tensors(torch.float32))
    assert all(torch.equal(before[name], now[name]) for name in before)
    seen = []
    actor.sharded.optimizer.register_step_pre_hook(
        lambda *_: seen.append(sum(float(local(p.grad).square().sum()) for p in actor.sharded.parameters.values()))
    )
    train_one_step(actor, batch)
    assert seen == [pytest.approx(1e-12, rel=1e-3)]


def test_what_cannot_be_adapted_is_refused(tiny_llama, monkeypatch):
    with pytest.raises(ConfigError, match=r"names lm_head, c_attn, but the linear layers of LlamaForCausalLM are down"):
        make(tiny_llama, targets=["q_proj", "lm_head", "c_attn"])
    plain = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ConfigError, match=r"pip install 'arealite\[lora\]'"):
        make(tiny_llama)


def test_experts_get_no_adapters():
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=2
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    with pytest.raises(ConfigError, match=r"names gate_proj, up_proj, down_proj, .* experts are no linear layers"):
        add_adapters(model, LoRAConfig(), seed=1)
    add_adapters(model, LoRAConfig(target_modules=["q_proj"]), seed=1)
    kept = {name for name, p in model.named_parameters() if not p.is_meta}
    assert kept == {f"model.layers.0.self_attn.q_proj.lora_{side}.default.weight" for side in "AB"}
