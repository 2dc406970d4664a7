"""Critic and reference on ranks of their own: the same numbers as on the policy's, at the same time as its own work."""

import time
from dataclasses import replace

import numpy as np
import pytest
from support.batches import actor_config, random_batch, share, started
from support.layouts import on_ranks

from arealite.api.cli_args import OptimizerConfig, PPOCriticConfig, TrainEngineConfig
from arealite.api.errors import ArealiteError
from arealite.api.types import Dims
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.engine.ppo.critic import FSDPPPOCritic
from arealite.engine.roles import Critic, Reference, TrainedTogether

pytestmark = pytest.mark.usefixtures("one_process")

ALONE = (Dims(), Dims(), Dims(), ())
APART = [  # layouts of policy, critic and reference, and of each set of ranks
    (Dims(), Dims(first=1), Dims(first=2), (Dims(), Dims(first=1), Dims(first=2))),
    (Dims(), Dims(d=2, first=1), Dims(), (Dims(), Dims(d=2, first=1))),
    (Dims(d=2), Dims(t=2, first=2), Dims(t=2), (Dims(d=2), Dims(t=2, first=2))),
    (Dims(t=2), Dims(first=2), Dims(first=2), (Dims(t=2), Dims(first=2))),
    (Dims(p=2), Dims(d=2), Dims(p=2, first=2), (Dims(p=2), Dims(p=2, first=2))),
]


def opened(path, actor_dims, critic_dims, ref_dims, layouts):
    """The three models; two updates a step, KL in the reward, so that everything needs everything."""
    config = actor_config(path, kl_weight=0.1, kl_in="reward", gae_lambda=0.9, ppo_n_minibatches=2)
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-3)
    actor = started(FSDPPPOActor(config, actor_dims, layouts=layouts))
    frozen = FSDPEngine(TrainEngineConfig(path=path, dtype="float32"), False, ref_dims, layouts=layouts)
    valued = PPOCriticConfig(path=path, dtype="float32", optimizer=optimizer, ppo_n_minibatches=2)
    return actor, Reference(actor, started(frozen)), Critic(actor, started(FSDPPPOCritic(valued, critic_dims, layouts)))


def handed_out(actor, seed):
    """This rank's share of a step, as `prepare_batch` gives it."""
    shares = [share(random_batch(seed=seed), i, number) for number in actor.collective.divisions for i in range(number)]
    return actor.collective.scatter(shares if actor.collective.rank == 0 else None)


def train(actor, ref, critic, seed):
    """The loop's lines; its statistics on this rank."""
    batch = handed_out(actor, seed)
    batch.prox_logp = actor.compute_logp(batch)
    batch.ref_logp = ref.compute_logp(batch)
    batch.values = critic.compute_values(batch)
    actor.compute_advantages(batch)
    return actor.grpo_update(batch) | critic.ppo_update(batch)


def trained(rank, folder, path, *layout):
    """Statistics of three steps, of which the last one is made twice, the second time after going back; and sums of the
    weights of the policy and the critic."""
    actor, ref, critic = opened(path, *layout)
    both = TrainedTogether(actor, critic.critic)
    stats = [train(actor, ref, critic, seed) for seed in (0, 1)]
    both.stage_state(folder)()
    actor.collective.barrier("written")
    stats.append(train(actor, ref, critic, 2))
    both.load_state(folder)
    stats.append(train(actor, ref, critic, 2))
    engines = [engine for engine in (actor, critic.critic) if engine.is_here]
    sums = [[float(t.double().square().sum()) for _, t in engine.named_full_tensors()] for engine in engines]
    both.save(f"{folder}/saved")
    return stats, sums


TIMES = ("train_tokens_per_s", "update_s", "mfu")


def numbers(stats):
    return {name: value for name, value in stats.items() if not name.removeprefix("critic_").startswith(TIMES)}


@pytest.fixture(scope="session")
def colocated(tiny_llama, tmp_path_factory):
    return trained(0, str(tmp_path_factory.mktemp("alone")), tiny_llama, *ALONE)


@pytest.mark.parametrize("layout", APART)
def test_roles_apart_learn_what_they_learn_together(tiny_llama, tmp_path, colocated, layout):
    expected, (policy, critic) = colocated
    found = on_ranks(sum(dims.size for dims in layout[-1]), trained, str(tmp_path), tiny_llama, *layout)
    actor_dims, critic_dims = layout[:2]
    for one, other in zip(found[0][0], expected, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-4, abs=1e-6)
    assert numbers(found[0][0][3]) == pytest.approx(numbers(found[0][0][2]), rel=1e-6)
    for rank in actor_dims.ranks:
        assert found[rank][1][0] == pytest.approx(policy, rel=1e-5)
    for rank in critic_dims.ranks:
        assert found[rank][1][-1] == pytest.approx(critic, rel=1e-5)
    assert (tmp_path / "saved" / "critic" / "model.safetensors").exists()
    assert (tmp_path / "saved" / "model.safetensors").exists()


PART_S = 1.0


def slowed(engine):
    """`engine`, whose passes take a second more."""

    def slow(one_pass):
        def after_a_second(*args):
            time.sleep(PART_S if engine.is_here else 0.0)
            return one_pass(*args)

        return after_a_second

    engine._score, engine.learn = slow(engine._score), slow(engine.learn)


def slow_step(rank, path, *layout):
    actor, ref, critic = opened(path, *layout)
    for engine in (actor, ref.role, critic.role):
        slowed(engine)
    actor.collective.barrier("begin")
    began = time.monotonic()
    train(actor, ref, critic, 0)
    return time.monotonic() - began


def test_what_does_not_wait_for_each_other_is_done_at_the_same_time(tiny_llama):
    """Three passes before the advantages and two updates after them take the time of one pass and one update."""
    took_s = max(on_ranks(3, slow_step, tiny_llama, *APART[0]))
    assert 2 * PART_S < took_s < 4.5 * PART_S  # all five one after the other: 5


def differing(rank, path, *layout):
    actor, _, critic = opened(path, *layout)
    batch = handed_out(actor, 0)
    if actor.is_here:
        batch = batch.select(range(1, batch.num_sequences))
        with pytest.raises(ArealiteError, match="other sequences of the same groups"):
            critic.compute_values(batch)
        return True
    critic.compute_values(batch)
    return np.isnan(actor.compute_logp(batch)).all() and actor.grpo_update(replace(batch)) == {}


def test_batches_that_differ_between_ranks_are_refused(tiny_llama):
    layouts = (Dims(), Dims(first=1))
    assert all(on_ranks(2, differing, tiny_llama, Dims(), Dims(first=1), Dims(), layouts))
