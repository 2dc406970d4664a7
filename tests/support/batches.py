"""Batches and actors for tests of the trainer. Used by test_engine_*.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from arealite.api.cli_args import OptimizerConfig, PPOActorConfig
from arealite.api.types import Batch


def actor_config(path, **changes) -> PPOActorConfig:
    """A small float32 actor. Adam's first step is the gradient's sign, which for gradients near 0 is a matter of
    rounding; a large eps makes weights after a step comparable."""
    changes = {"dtype": "float32", "optimizer": OptimizerConfig(lr=1e-3, eps=1e-3), **changes}
    return PPOActorConfig(path=str(path), **changes)


def started(engine):
    """Initialised."""
    engine.initialize()
    return engine


def make(path, dims=None, **changes):
    """A small policy."""
    from arealite.engine.ppo.actor import FSDPPPOActor

    return started(FSDPPPOActor(actor_config(path, **changes), dims))


def random_batch(num_groups=4, size=3, prompt=7, longest=9, seed=0, vocabulary=49152) -> Batch:
    """Groups with a prompt each; some answers share their first tokens, one has a turn of the user in the middle. In
    the second group the second answer equals the first one, and the others are its beginning."""
    rng = np.random.default_rng(seed)
    rows, masks, groups = [], [], []
    for group in range(num_groups):
        start = rng.integers(1, vocabulary, prompt + group)
        first = rng.integers(1, vocabulary)
        for member in range(size):
            answer = rng.integers(1, vocabulary, rng.integers(3, longest + 1))
            answer[0] = first if member % 2 else answer[0]
            if group == 1 and member:
                answer = rows[-member][len(start) :][: None if member == 1 else 2]
            mask = np.ones(len(answer), bool)
            mask[1:2] = member != 2
            rows.append(np.concatenate([start, answer]))
            masks.append(np.concatenate([np.zeros(len(start), bool), mask]))
            groups.append(group)
    cu = np.cumsum([0, *map(len, rows)])
    mask = np.concatenate(masks)
    noise = rng.normal(size=(2, len(mask))).astype(np.float32) * 0.2
    return Batch(
        tokens=np.concatenate(rows),
        loss_mask=mask,
        logprobs=np.where(mask, -9 + noise[0], 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        cu_seqlens=cu,
        group_ids=np.asarray(groups),
        sample_ids=np.arange(len(rows)),
        rewards=rng.integers(0, 3, len(rows)).astype(np.float64),
        truncated=np.arange(len(rows)) % 5 == 4,
        num_groups=num_groups,
        task_ids=[f"task-{g}" for g in groups],
        prox_logp=np.where(mask, -9 + noise[1], 0).astype(np.float32),
    )


def as_rows(batch: Batch, sample_ids) -> Batch:
    """Its sequences as rows of these samples, with the reward and the end of the sample's first one."""
    first = np.unique(sample_ids, return_index=True, return_inverse=True)[1:]
    of = first[0][first[1]]
    return replace(batch, sample_ids=sample_ids, rewards=batch.rewards[of], truncated=batch.truncated[of])


def crooked_batch() -> Batch:
    """Groups of 4, 3, 1, 2 and 1 samples, two of them of two rows that do not follow each other; equal rewards in one,
    a sample without tokens in the loss, equal answers."""
    batch = random_batch(num_groups=5, size=5)
    sizes = [5, 4, 1, 2, 1]
    batch = batch.select([5 * g + m for g, size in enumerate(sizes) for m in range(size)])
    batch.rewards[batch.group_ids == 3] = 0.7
    batch.loss_mask[batch.cu_seqlens[1] : batch.cu_seqlens[2]] = False
    return as_rows(batch, np.asarray([4, 1, 2, 3, 4, 9, 6, 9, 8, 5, 10, 11, 12]))


def plain_kl(d: float, estimator: str) -> float:
    """Of one token, with d = log policy - log reference."""
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]


def share(batch: Batch, rank: int, world_size: int, lopsided: bool = False) -> Batch:
    """This rank's groups; all of them on rank 0 if `lopsided`."""
    owner = batch.group_ids * 0 if lopsided else batch.group_ids % world_size
    return batch.select(np.flatnonzero(owner == rank))


def train_one_step(actor, batch: Batch) -> dict[str, float]:
    mine = replace(batch)
    mine.prox_logp = actor.compute_logp(mine)
    actor.compute_advantages(mine)
    stats = actor.grpo_update(mine)
    return {name: value for name, value in stats.items() if name not in ("train_tokens_per_s", "mfu")}  # times
