"""The policy on one process: scoring, advantages, updates, bad numbers, and what must not change a result."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.batches import actor_config, make, random_batch, started, train_one_step
from support.inference import plain_logprobs
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from arealite.api.cli_args import NormConfig, OptimizerConfig, TrainEngineConfig
from arealite.api.errors import ConfigError, NumericalError
from arealite.api.types import Dims
from arealite.engine import memory
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.ppo.actor import CUT_OFF, NOT_FINITE, FSDPPPOActor

pytestmark = pytest.mark.usefixtures("one_process")


def weights_of(actor):
    return {name: tensor.clone() for name, tensor in actor.named_full_tensors()}


def plain_logp(model, batch, temperature=1.0):
    """Every sequence by itself through transformers."""
    out = np.zeros(len(batch.tokens), np.float32)
    for i in range(batch.num_sequences):
        span = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        out[span][1:] = plain_logprobs(model, batch.tokens[span], temperature)
    return np.where(batch.loss_mask, out, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_compute_logp_equals_transformers(tiny_llama, temperature):
    batch = random_batch()
    actor = make(tiny_llama, max_tokens_per_mb=40, logprob_chunk_tokens=5, temperature=temperature)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    np.testing.assert_allclose(actor.compute_logp(batch), plain_logp(model, batch, temperature), atol=1e-5)
    np.testing.assert_allclose(actor.compute_logp(batch, 1.3), plain_logp(model, batch, 1.3), atol=1e-5)


def test_an_untied_head_changes_nothing(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)
    model.save_pretrained(tmp_path / "untied")
    batch = random_batch()
    straight = make(tmp_path / "untied")
    np.testing.assert_allclose(straight.compute_logp(batch), plain_logp(model, batch), atol=1e-5)
    train_one_step(straight, batch)
    assert "lm_head.weight" in weights_of(straight)
    assert "lm_head.weight" not in weights_of(make(tiny_llama))


def test_checkpointing_follows_the_memory_that_is_free(tiny_llama, monkeypatch, caplog):
    """Said in one line, with what decided it; and the step goes that way."""
    batch, products = random_batch(), {}
    train_one_step(make(tiny_llama), batch)  # the first step measures what this machine can do
    for kind, free in {"none": 1 << 40, "full": 1 << 10}.items():
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        for chosen in (kind, "auto"):
            caplog.clear()
            with caplog.at_level("WARNING", logger=memory.__name__):  # a trainer shows no less
                actor = make(tiny_llama, gradient_checkpointing=chosen)
            with FlopCounterMode(display=False) as counted:
                train_one_step(actor, batch)
            products[chosen] = counted.get_flop_counts()["Global"][torch.ops.aten.mm]
        [told] = caplog.messages
        assert told.startswith(f"gradient_checkpointing auto is {kind}: {free / 2**30:.2f} GiB are free for a rank")
        assert products["auto"] == products[kind]
    assert products["full"] > products["none"]


def test_checkpointing_auto_refuses_what_the_estimate_does_not_know():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    config = TrainEngineConfig(path="a/model", gradient_checkpointing="auto")
    with pytest.raises(ConfigError, match="of a/model has no 'hidden_size', .*; set none, selective or full"):
        memory.settle_checkpointing(config, model, Dims(), torch.device("cpu"), None)


def test_checkpointing_and_prompt_sharing_change_nothing_but_the_work(tiny_llama):
    batch = random_batch()
    found = {}
    for checkpointing in ("none", "selective", "full"):
        for share_prompts in (True, False):
            actor = make(tiny_llama, gradient_checkpointing=checkpointing, share_prompts=share_prompts)
            with FlopCounterMode(display=False) as counted:
                stats = train_one_step(actor, batch)
            flops = counted.get_flop_counts()["Global"]
            products = flops[torch.ops.aten.mm], flops[torch.ops.aten.bmm]
            found[checkpointing, share_prompts] = stats, weights_of(actor), products
    stats, weights, _ = found["none", True]
    for again, theirs, _ in found.values():
        assert again["loss"] == pytest.approx(stats["loss"], rel=1e-5)
        assert again["grad_norm"] == pytest.approx(stats["grad_norm"], rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)
    for share_prompts in (True, False):
        none, selective, full = (found[kind, share_prompts][2] for kind in ("none", "selective", "full"))
        assert none[0] == selective[0] < full[0]  # with weights: selective computes none of them twice
        assert none[1] < selective[1] == full[1]  # of attention
    assert found["none", True][2][0] < 0.9 * found["none", False][2][0]


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_results_do_not_depend_on_the_micro_batch_budget(tiny_llama, aggregation, level):
    batch = random_batch()
    batch.ref_logp = batch.logprobs - 0.1
    outcomes = []
    for budget in (4096, 30, 1):
        actor = make(
            tiny_llama, max_tokens_per_mb=budget, loss_aggregation=aggregation, importance_sampling_level=level,
            kl_weight=0.1, entropy_weight=0.01, max_new_tokens=9, logprob_chunk_tokens=16, mask_truncated=True,
        )  # fmt: skip
        mine = replace(batch)
        actor.compute_advantages(mine)
        outcomes.append((actor.grpo_update(mine), weights_of(actor)))
    (first, weights), *others = outcomes
    for stats, theirs in others:
        for name in ("loss", "grad_norm", "entropy", "kl", "importance_weight_max", "num_tokens"):
            assert stats[name] == pytest.approx(first[name], rel=1e-5), name
        for name, tensor in weights.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6)


def test_order_of_sequences_does_not_matter(tiny_llama):
    batch = random_batch()
    shuffled = batch.select(np.random.default_rng(1).permutation(batch.num_sequences))
    a, b = (train_one_step(make(tiny_llama), x) for x in (batch, shuffled))
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)


def test_truncated_answers_leave_the_loss_by_their_finish_reason(tiny_llama):
    batch = random_batch()
    masked = make(tiny_llama, mask_truncated=True)
    stats = train_one_step(masked, batch)
    kept = np.repeat(~batch.truncated, batch.lengths) & batch.loss_mask
    assert stats["num_tokens"] == kept.sum() < batch.loss_mask.sum()
    whitened = replace(batch)
    make(tiny_llama, mask_truncated=True, adv_norm=NormConfig("batch", "batch")).compute_advantages(whitened)
    left = whitened.advantages[kept]
    assert left.mean() == pytest.approx(0, abs=1e-5) and left.std(ddof=1) == pytest.approx(1, abs=1e-4)
    by_hand = make(tiny_llama)
    mine = replace(batch)
    mine.prox_logp = by_hand.compute_logp(mine)
    by_hand.compute_advantages(mine)
    mine.loss_mask = kept
    assert by_hand.grpo_update(mine)["grad_norm"] == pytest.approx(stats["grad_norm"], rel=1e-5)
    everything = make(tiny_llama, mask_truncated=True)
    nothing = train_one_step(everything, replace(batch, truncated=np.ones(batch.num_sequences, bool)))
    assert nothing["skipped"] == 1 and everything.version == 1 and everything.num_updates == 0
    assert masked.untrained == {} and everything.untrained == dict.fromkeys(batch.task_ids, CUT_OFF)
    one = replace(batch, truncated=batch.group_ids == 1)
    train_one_step(masked, one)
    assert masked.untrained == {batch.task_ids[i]: CUT_OFF for i in np.flatnonzero(batch.group_ids == 1)}


def test_two_updates_are_made_on_their_own_groups(tiny_llama):
    batch = random_batch()
    both = make(tiny_llama, ppo_n_minibatches=2)
    stats = train_one_step(both, batch)
    assert both.num_updates == 2 and both.version == 1 and stats["num_tokens"] == batch.loss_mask.sum()
    one_by_one = make(tiny_llama)
    mine = replace(batch)
    mine.prox_logp = one_by_one.compute_logp(mine)
    one_by_one.compute_advantages(mine)
    for groups in ([0, 1], [2, 3]):
        one_by_one.grpo_update(mine.select(np.flatnonzero(np.isin(mine.group_ids, groups))))
    for (name, a), b in zip(weights_of(both).items(), weights_of(one_by_one).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_bad_numbers_skip_the_update_and_stop_the_run_at_the_third(tiny_llama, caplog, where):
    batch = random_batch()
    actor = make(tiny_llama)
    batch.prox_logp = actor.compute_logp(batch)
    actor.compute_advantages(batch)
    good, good_batch = weights_of(actor), replace(batch)
    if where == "loss":
        batch.logprobs = batch.logprobs.copy()
        batch.logprobs[np.flatnonzero(batch.loss_mask & np.repeat(batch.group_ids == 2, batch.lengths))[0]] = np.nan
        expected = "loss is not finite.*micro-batch 0 of 1 .tasks .*task-2"
    else:
        with torch.no_grad():
            actor.sharded.hf_model.model.layers[1].mlp.up_proj.weight.to_local()[3, 3] = np.inf
        for module in actor.sharded.modules:
            module.reshard()
        expected = "weight model.layers.1.mlp.up_proj.weight is not finite; gradient of model"
    with caplog.at_level(logging.WARNING):
        stats = actor.grpo_update(batch)
    assert stats["skipped"] == 1 and stats["num_skipped_updates"] == 1 and actor.version == 1
    assert re.search(expected, caplog.text, re.DOTALL), caplog.text
    assert actor.untrained == dict.fromkeys(batch.task_ids, NOT_FINITE)
    if where == "loss":
        for name, tensor in weights_of(actor).items():
            assert torch.equal(tensor, good[name])
        assert actor.grpo_update(good_batch)["skipped"] == 0  # a good one in between starts the count anew
        actor.grpo_update(batch)
    actor.grpo_update(batch)
    with pytest.raises(NumericalError, match="3 in a row"):
        actor.grpo_update(batch)


def test_gradients_are_clipped_by_their_norm_over_all_weights(tiny_llama):
    norm = train_one_step(make(tiny_llama), random_batch())["grad_norm"]
    moments = []
    for limit in (1e9, norm / 4):
        actor = make(tiny_llama, optimizer=OptimizerConfig(lr=1e-3, beta1=0.0, max_grad_norm=limit))
        assert train_one_step(actor, random_batch())["grad_norm"] == pytest.approx(norm)
        moments.append([actor.sharded.optimizer.state[p]["exp_avg"].to_local() for p in actor.sharded.optimizer.state])
    for straight, clipped in zip(*moments, strict=True):
        torch.testing.assert_close(clipped, straight / 4, rtol=1e-4, atol=1e-8)


def test_no_sequences_at_all(tiny_llama):
    actor = make(tiny_llama)
    empty = random_batch().select([])
    assert len(actor.compute_logp(empty)) == 0
    actor.compute_advantages(empty)
    assert actor.grpo_update(empty)["skipped"] == 1


def test_a_frozen_reference_scores_and_does_not_train(tiny_llama):
    ref = started(FSDPEngine(actor_config(tiny_llama), trainable=False))
    batch = random_batch()
    np.testing.assert_allclose(ref.compute_logp(batch), make(tiny_llama).compute_logp(batch), atol=1e-6)
    assert not any(p.requires_grad for p in ref.sharded.model.parameters())


@pytest.mark.parametrize("layer", ["conv", "chunked_attention"])
def test_models_whose_tokens_meet_outside_of_full_attention_are_refused(tmp_path, layer):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": [layer, "full_attention"]}
    if layer == "conv":
        model = Lfm2ForCausalLM(Lfm2Config(**sizes, **heads))
    else:
        model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, num_local_experts=2, intermediate_size_mlp=32))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be computed on packed sequences: "):
        make(tmp_path)


def test_wrong_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no causal language model"):
        make(tmp_path)
    with pytest.raises(ConfigError, match="temperature"):
        FSDPPPOActor(actor_config(tmp_path, temperature=0.0))


def test_bfloat16_learns_a_fixed_batch_with_the_real_model(smollm2):
    """Scores as close to float32 as transformers' own bfloat16, and rewarded answers become likelier."""
    batch = random_batch(num_groups=2, prompt=12)
    batch.rewards = np.asarray([1, 0, 0, 0, 1, 0], np.float64)
    exact, rounded = (
        plain_logp(AutoModelForCausalLM.from_pretrained(smollm2, dtype=d), batch)
        for d in (torch.float32, torch.bfloat16)
    )
    actor = make(smollm2, dtype="bfloat16", optimizer=OptimizerConfig(lr=2e-5))
    before = actor.compute_logp(batch)
    mask = batch.loss_mask
    assert np.abs(before - exact)[mask].mean() < 1.5 * np.abs(rounded - exact)[mask].mean()
    batch.logprobs = before
    batch.prox_logp = before
    actor.compute_advantages(batch)
    losses = [actor.grpo_update(batch)["loss"] for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    rewarded = mask & np.repeat(batch.rewards > 0, batch.lengths)
    assert (actor.compute_logp(batch) - before)[rewarded].mean() > 0
