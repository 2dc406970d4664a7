"""One step's objective and its gradient against autograd through transformers, one sample and one token at a time."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import batches
from support.batches import crooked_batch, plain_kl, random_batch
from transformers import AutoModelForCausalLM

from arealite.api.cli_args import OptimizerConfig
from arealite.api.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_process")
STILL = OptimizerConfig(lr=0.0, max_grad_norm=math.inf)


def make(path, **changes):
    return batches.make(path, **{"optimizer": STILL, **changes})


def samples_of(model, batch, temperature):
    """Per sample: logp and entropy of its loss tokens with gradient, where these stand in the batch, and its group."""
    for sample in np.unique(batch.sample_ids):
        rows = np.flatnonzero(batch.sample_ids == sample)
        found = [torch.cat(parts) for parts in zip(*rows_of(model, batch, rows, temperature), strict=True)]
        yield *found[:2], found[2].numpy(), batch.group_ids[rows[0]]


def rows_of(model, batch, rows, temperature):
    for i in rows:
        begin, end = batch.cu_seqlens[i : i + 2]
        ids = torch.from_numpy(batch.tokens[begin:end])
        logp = (model(ids[None]).logits[0] / temperature).log_softmax(-1)[:-1]
        keep = np.flatnonzero(batch.loss_mask[begin:end])
        entropy = -(logp.exp() * logp).sum(-1)[keep - 1]
        yield logp[keep - 1, ids[keep]], entropy, torch.from_numpy(keep + begin)


def plain_losses(model, batch, config, tokens):
    """The loss of every mini-batch, with gradient. Appends to `tokens` what the statistics say of each token."""
    batch = batch.select(np.flatnonzero(~(batch.truncated & config.mask_truncated)))
    kl_weight = config.kl_weight if config.kl_in == "loss" else 0.0
    samples = list(samples_of(model, batch, config.temperature))
    sequence_level = config.importance_sampling_level == "sequence"
    for part in range(config.ppo_n_minibatches):
        own = [s for s in samples if s[3] * config.ppo_n_minibatches // batch.num_groups == part and len(s[2])]
        total = torch.zeros(())
        for logp, entropy, at, _ in own:
            prox, behaviour, ref = (torch.from_numpy(x[at]) for x in (batch.prox_logp, batch.logprobs, batch.ref_logp))
            prox = prox if config.use_decoupled_loss else behaviour
            log_w, log_r = prox - behaviour, logp - prox
            if sequence_level:
                log_w, log_r = log_w.mean().expand(len(at)), log_r.detach().mean() + logp - logp.detach()
            w, r, losses = log_w.exp(), log_r.exp(), []
            for t in range(len(at)):
                weight = w[t]
                if weight > config.behav_imp_weight_cap:
                    weight = {"none": weight, "mask": 0.0, "truncate": config.behav_imp_weight_cap}[
                        config.behav_imp_correction
                    ]
                a = float(batch.advantages[at[t]])
                surrogate = torch.min(r[t] * a, r[t].clamp(1 - config.eps_clip, 1 + config.eps_clip_higher) * a)
                if config.c_clip and a < 0:
                    surrogate = torch.max(surrogate, torch.tensor(config.c_clip * a))
                kl = (r[t] * weight).detach() * (logp[t] - ref[t]).square() / 2
                losses.append(-weight * surrogate + kl_weight * kl - config.entropy_weight * entropy[t])
                beyond = r[t] > 1 + config.eps_clip_higher if a > 0 else r[t] < 1 - config.eps_clip
                bounded = config.c_clip is not None and r[t] > config.c_clip
                tokens.append(
                    {
                        "entropy": entropy[t].item(),
                        "kl": plain_kl((logp[t] - ref[t]).item(), config.kl_estimator),
                        "clip_ratio": float(a != 0 and (beyond or (a < 0 and bounded))),
                        "importance_weight_mean": math.exp(prox[t] - behaviour[t]),
                        "behav_kl": plain_kl((behaviour[t] - logp[t]).item(), "k3"),
                    }
                )
            divisor = {
                "token-mean": sum(len(at) for _, _, at, _ in own),
                "seq-mean-token-mean": len(own) * len(losses),
                "seq-mean-token-sum-norm": len(own) * (config.max_new_tokens or 0),
            }[config.loss_aggregation]
            total = total + sum(losses) / divisor
        yield total


CASES = {
    "grpo": {},
    "everything": {"kl_weight": 0.2, "entropy_weight": 0.05, "c_clip": 1.1, "behav_imp_weight_cap": 1.05},
    "temperature": {"temperature": 0.7, "kl_weight": 0.2, "entropy_weight": 0.05},
    "gspo": {"importance_sampling_level": "sequence", "loss_aggregation": "seq-mean-token-mean", "kl_weight": 0.1},
    "mask": {"behav_imp_correction": "mask", "behav_imp_weight_cap": 1.05, "mask_truncated": True},
    "none": {"behav_imp_correction": "none", "loss_aggregation": "seq-mean-token-sum-norm", "max_new_tokens": 9},
    "not decoupled": {"use_decoupled_loss": False, "kl_weight": 0.2, "mask_truncated": True},
    "kl in the reward": {"kl_in": "reward", "kl_weight": 0.2, "kl_estimator": "k3"},
    "three updates": {"ppo_n_minibatches": 3, "loss_aggregation": "seq-mean-token-mean", "mask_truncated": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [4096, 25])
def test_the_objective_is_the_plain_one(tiny_llama, case, budget):
    config = {"temperature": 1.0, "eps_clip": 0.1, "eps_clip_higher": 0.15, **CASES[case]}
    actor = make(tiny_llama, max_tokens_per_mb=budget, **config)
    batch, rng = crooked_batch(), np.random.default_rng(7)
    near = actor.compute_logp(batch)
    for name in ("prox_logp", "logprobs", "ref_logp"):
        setattr(batch, name, (near + rng.normal(size=len(near)) * 0.15).astype(np.float32) * batch.loss_mask)
    actor.compute_advantages(batch)
    stats = actor.grpo_update(batch)

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    losses, norms, tokens = [], [], []
    for loss in plain_losses(model, batch, actor.config, tokens):
        model.zero_grad()
        loss.backward(retain_graph=True)
        losses.append(loss.item())
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    assert stats["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-4, abs=1e-7)
    assert stats["grad_norm"] == pytest.approx(statistics.fmean(norms), rel=1e-4)
    for name in tokens[0]:  # means over all tokens, however many each update has
        assert stats[name] == pytest.approx(statistics.fmean(token[name] for token in tokens), rel=1e-4), name
    assert stats["importance_weight_max"] == pytest.approx(max(token["importance_weight_mean"] for token in tokens))
    assert stats["num_tokens"] == len(tokens)


@pytest.mark.parametrize("correction", ["none", "mask", "truncate"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_prox_logp_the_proximal_policy_is_the_current_one(tiny_llama, correction, level):
    """Also after a step that was skipped: it left the weights as they were."""
    batch = random_batch()
    choice = {"behav_imp_correction": correction, "importance_sampling_level": level, "behav_imp_weight_cap": 1.1}
    outcomes = []
    for with_prox in (True, False):
        actor = make(tiny_llama, optimizer=OptimizerConfig(lr=1e-3, eps=1e-3), max_bad_steps=9, **choice)
        assert not actor.needs_prox_logp
        mine = replace(batch, logprobs=np.where(batch.loss_mask, batch.logprobs - 2.0, 0).astype(np.float32))
        found = []
        for bad in (False, True, False):
            mine.prox_logp = actor.compute_logp(mine) if with_prox else None
            actor.compute_advantages(mine)
            used = replace(mine, logprobs=np.full_like(mine.logprobs, np.nan)) if bad else mine
            stats = actor.grpo_update(used)
            names = ("loss", "grad_norm", "importance_weight_mean", "importance_weight_max", "clip_ratio")
            found += [stats["skipped"], *([] if bad else [stats[name] for name in names])]
        outcomes.append((found, {name: t.clone() for name, t in actor.named_full_tensors()}))
    (given, weights), (left_out, others) = outcomes
    assert given[6] == left_out[6] == 1
    assert left_out == pytest.approx(given, rel=1e-4, abs=1e-7)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-6)


def test_several_updates_need_prox_logp(tiny_llama):
    batch = replace(random_batch(), prox_logp=None)
    actor = make(tiny_llama, ppo_n_minibatches=2)
    actor.compute_advantages(batch)
    assert actor.needs_prox_logp
    with pytest.raises(ConfigError, match="prox_logp"):
        actor.grpo_update(batch)


def test_prox_logp_plays_no_part_unless_the_loss_is_decoupled(tiny_llama):
    batch = random_batch()
    actor = make(tiny_llama, use_decoupled_loss=False)
    actor.compute_advantages(batch)
    given = actor.grpo_update(batch)
    left_out = actor.grpo_update(replace(batch, prox_logp=None))
    assert given["loss"] == left_out["loss"] and given["grad_norm"] == left_out["grad_norm"]


def test_statistics_stay_finite_where_the_policies_have_parted(tiny_llama):
    batch = random_batch()
    batch.logprobs = np.where(batch.loss_mask, -500.0, 0).astype(np.float32)
    actor = make(tiny_llama)
    actor.compute_advantages(batch)
    stats = actor.grpo_update(replace(batch, prox_logp=None))
    assert stats["skipped"] == 0 and all(math.isfinite(value) for value in stats.values()), stats
