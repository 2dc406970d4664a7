"""Advantages and returns of a whole step against plain loops over samples and tokens, in Python floats."""

from dataclasses import replace

import numpy as np
import pytest
from support.batches import actor_config, crooked_batch, make, plain_kl
from test_algorithm_advantage import plain_gae, plain_norm, plain_scales

from arealite.api.cli_args import NormConfig, PPOActorConfig
from arealite.api.errors import ConfigError
from arealite.engine.ppo.actor import FSDPPPOActor


@pytest.fixture(scope="module")
def actor(tiny_llama):
    made = make(tiny_llama)
    yield made
    made.destroy()


def scored_batch():
    """Values, and logprobs of the older policies, that differ from token to token."""
    batch, rng = crooked_batch(), np.random.default_rng(3)
    for name in ("values", "prox_logp", "ref_logp"):
        setattr(batch, name, (rng.normal(size=len(batch.tokens)) - 1).astype(np.float32) * batch.loss_mask)
    return batch


def choices(config):
    return config.mean, config.std, config.leave_one_out, config.eps


def plain(batch, config):
    """[T] advantages and returns."""
    spans = [range(*batch.cu_seqlens[i : i + 2]) for i in range(batch.num_sequences)]
    rows = [np.flatnonzero(batch.sample_ids == sample) for sample in np.unique(batch.sample_ids)]
    generated = [[t for i in own for t in spans[i] if batch.loss_mask[t]] for own in rows]
    first = [own[0] for own in rows]

    def shaped(reward, own):
        if config.overlong_tokens:
            excess = len(own) - (config.max_new_tokens - config.overlong_tokens)
            reward -= config.overlong_penalty_factor * min(max(excess / config.overlong_tokens, 0), 1)
        reward = (reward + config.reward_bias) * config.reward_scaling
        return reward if config.reward_clip is None else min(max(reward, -config.reward_clip), config.reward_clip)

    raw = [shaped(float(batch.rewards[i]), own) for i, own in zip(first, generated, strict=True)]
    scales = list(plain_scales(raw, batch.group_ids[first].tolist(), *choices(config.reward_norm)))
    returns, kept = np.zeros(len(batch.tokens)), []
    for i, own, reward, (centre, spread) in zip(first, generated, raw, scales, strict=True):
        worth = [reward if batch.turn_returns is None else shaped(float(batch.turn_returns[t]), own) for t in own]
        worth = [(x - centre) / spread for x in worth]
        paid = [0.0] * len(own)
        if config.kl_in == "reward":
            paid = [
                config.kl_weight * plain_kl(batch.prox_logp[t] - batch.ref_logp[t], config.kl_estimator) for t in own
            ]
        if batch.values is None:
            to_go = [sum(config.gamma ** (k - j) * paid[k] for k in range(j, len(own))) for j in range(len(own))]
            found = [x - cost for x, cost in zip(worth, to_go, strict=True)]
        else:
            earned = [x - y - cost for x, y, cost in zip(worth, [*worth[1:], 0.0], paid, strict=False)]
            found = plain_gae(earned, batch.values[own], [True] * len(own), config.gamma, config.gae_lambda)
            returns[own] = found + batch.values[own]
        if not (config.mask_truncated and batch.truncated[i]):
            kept += [(t, a, batch.group_ids[i]) for t, a in zip(own, found, strict=True)]
    at, advantages, groups = map(list, zip(*kept, strict=True))
    out = np.zeros(len(batch.tokens))
    out[at] = advantages if config.adv_norm is None else plain_norm(advantages, groups, *choices(config.adv_norm))
    return out, returns


RAW = NormConfig("none", "none")
KL = {"kl_in": "reward", "kl_weight": 0.5, "gamma": 0.7}
CASES = {
    "grpo": {},
    "shaped": {"reward_bias": -0.5, "reward_scaling": 4.0, "reward_clip": 1.5, "reward_norm": RAW},
    "overlong, scaled": {
        "overlong_tokens": 4, "max_new_tokens": 8, "overlong_penalty_factor": 0.6, "reward_bias": 0.25,
        "reward_scaling": -3.0, "reward_norm": RAW,
    },
    "overlong, clipped": {"overlong_tokens": 5, "max_new_tokens": 9, "reward_scaling": 2.0, "reward_clip": 2.5},
    "rloo": {"reward_norm": NormConfig("group", "none", leave_one_out=True)},
    "k1 to go": {**KL, "kl_estimator": "k1"},
    "k2 to go": {**KL, "kl_estimator": "k2", "reward_norm": NormConfig("batch", "group")},
    "k3 to go, whitened": {
        **KL, "kl_estimator": "k3", "adv_norm": NormConfig("batch", "batch"), "mask_truncated": True,
    },
    "advantages by group": {**KL, "kl_estimator": "k1", "adv_norm": NormConfig("group", "group"), "reward_norm": RAW},
    "advantages by group, rewards raw": {"adv_norm": NormConfig("group", "batch", eps=0.1), "reward_norm": RAW},
}  # fmt: skip


@pytest.mark.parametrize("with_returns", [False, True])
@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_advantages_are_the_plain_ones(actor, tiny_llama, case, with_values, with_returns):
    actor.config = actor_config(tiny_llama, gae_lambda=0.8, **CASES[case])
    batch = scored_batch() if with_values else replace(scored_batch(), values=None)
    if with_returns:
        batch.turn_returns = np.random.default_rng(4).normal(size=len(batch.tokens))
    advantages, returns = plain(batch, actor.config)
    actor.compute_advantages(batch)
    assert batch.advantages.dtype == np.float32
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-5, atol=1e-5)
    if with_values:  # truncated answers teach the critic, not the policy
        np.testing.assert_allclose(batch.returns, returns, rtol=1e-5, atol=1e-5)
    else:
        assert batch.returns is None


def test_what_advantages_need_is_named(actor, tiny_llama):
    actor.config = actor_config(tiny_llama, **KL)
    assert actor.needs_prox_logp
    for name in ("prox_logp", "ref_logp"):
        with pytest.raises(ConfigError, match=name):
            actor.compute_advantages(replace(scored_batch(), **{name: None}))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        FSDPPPOActor(PPOActorConfig(path=tiny_llama, overlong_tokens=4))
