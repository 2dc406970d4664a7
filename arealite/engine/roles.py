"""Several models of one run on the same ranks, each in its own layout, and by turns with the servers.

Called by arealite/trainer.py and scripts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from arealite.algorithm.packing import karmarkar_karp
from arealite.api.protocols import InferenceEngine
from arealite.api.types import Batch
from arealite.engine.checkpoint import attempt, attempt_on_ranks
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.memory import free_bytes
from arealite.engine.parallel.ranks import RankCollective
from arealite.engine.ppo.critic import FSDPPPOCritic

T = TypeVar("T")
SERVER_WORK_BYTES = 4 << 30  # of a GPU: what a server needs for its steps, besides weights and KV cache

logger = logging.getLogger(__name__)


class OtherShares:
    """Gives `role` the batches that are shared out for `actor`, and gives back what it says of their tokens.

    Where both have the same shares nothing moves. Otherwise every rank gets the whole step's batch for the moment, a
    few bytes per token, and takes its share in the role's layout: whole groups, about the same number of tokens.
    """

    def __init__(self, actor: FSDPEngine, role: FSDPEngine) -> None:
        self.actor, self.role = actor, role
        a, r = actor.mesh.dims, role.mesh.dims
        self.is_same = (a.d, a.c * a.t) == (r.d, r.c * r.t)

    def batch(self, own: Batch) -> Batch:
        """The role's share of the step, from the actor's share `own`. Collective."""
        if self.is_same:
            return own
        whole, _ = self._whole(own)
        return whole.select(self._sequences(whole))

    def score(self, own: Batch, score: Callable[[Batch], np.ndarray]) -> np.ndarray:
        """`score`, a pass of the role: float32 [T] for the actor's share `own`. Collective."""
        if self.is_same:
            return score(own)
        whole, begin = self._whole(own)
        sequences = self._sequences(whole)
        found = score(whole.select(sequences))
        out = np.zeros(len(whole.tokens), np.float32)
        for chosen, values in _by_share(self.role, (sequences, found)):
            spans = [np.arange(whole.cu_seqlens[i], whole.cu_seqlens[i + 1]) for i in chosen]
            out[np.concatenate(spans) if spans else np.zeros(0, np.int64)] = values
        return out[begin : begin + len(own.tokens)]

    def _whole(self, own: Batch) -> tuple[Batch, int]:
        """All shares end to end, and the token at which the actor's own begins."""
        shares = _by_share(self.actor, own)
        return Batch.join(shares), sum(len(share.tokens) for share in shares[: self.actor.mesh.share])

    def _sequences(self, whole: Batch) -> np.ndarray:
        num_tokens = np.bincount(whole.group_ids, weights=whole.lengths, minlength=whole.num_groups)
        groups = karmarkar_karp(num_tokens.tolist(), self.role.collective.num_shares)[self.role.mesh.share]
        return np.flatnonzero(np.isin(whole.group_ids, groups))


def _by_share(engine: FSDPEngine, value: T) -> list[T]:
    """One rank's value of every share of `engine`, in their order. Collective."""
    mesh = engine.mesh
    speaks = mesh.token_place == 0 and mesh.is_last_stage
    found = engine.collective.gather((mesh.share, value) if speaks else None)
    return [v for _, v in sorted((pair for pair in found if pair is not None), key=lambda pair: pair[0])]


class Turns:
    """Of the trainer and of servers on the same accelerators. Where each has its own, nobody waits."""

    def __init__(self, rollout: InferenceEngine, *models: FSDPEngine | OtherShares | None) -> None:
        """`models`: all that train or score; None is one that the run does not have."""
        self.are_taken = os.environ.get("AREALITE_COLOCATED") == "1"
        engines = [m.role if isinstance(m, OtherShares) else m for m in models if m is not None]
        self._rollout, self._engines = rollout, engines if self.are_taken else []
        self._last_room: bool | None = None

    @contextmanager
    def of_servers(self) -> Iterator[None]:
        """While servers generate, the engines leave them the memory, unless a GPU has enough for both."""
        asleep = [] if self.are_taken and self._has_room() else self._engines
        for engine in asleep:
            engine.sleep()
        yield
        for engine in asleep:
            engine.wake()

    def _has_room(self) -> bool:
        free = free_bytes(enough=SERVER_WORK_BYTES)
        has_room = free >= SERVER_WORK_BYTES
        if free and has_room != self._last_room:
            does = "stays there" if has_room else "goes to the CPU while servers generate"
            logger.info("%.1f GiB of the GPU are free beside trainer and servers: the trainer %s", free / 2**30, does)
            self._last_room = has_room
        return has_room

    @contextmanager
    def of_trainer(self) -> Iterator[None]:
        """Servers stop until the engines have trained and uploaded."""
        if self.are_taken:
            self._rollout.pause()
        yield
        if self.are_taken:
            self._rollout.resume()


class Reference(OtherShares):
    """The reference policy, for batches of the actor's shares."""

    def compute_logp(self, batch: Batch) -> np.ndarray:
        """As FSDPEngine.compute_logp, float32 [T]. Collective."""
        return self.score(batch, self.role.compute_logp)


class Critic(OtherShares):
    """The value model, for batches of the actor's shares."""

    def __init__(self, actor: FSDPEngine, critic: FSDPPPOCritic) -> None:
        super().__init__(actor, critic)
        self.critic = critic

    def compute_values(self, batch: Batch) -> np.ndarray:
        """As FSDPPPOCritic.compute_values, float32 [T]. Collective."""
        return self.score(batch, self.critic.compute_values)

    def ppo_update(self, batch: Batch) -> dict[str, float]:
        """As FSDPPPOCritic.ppo_update; the names of its statistics begin with critic_. Collective."""
        learned = self.critic.ppo_update(self.batch(batch))
        return {f"critic_{name}": value for name, value in learned.items()}


class TrainedTogether:
    """The actor and its critic as one for checkpoints and recovery points: the critic's part is a folder in it."""

    def __init__(self, actor: FSDPEngine, critic: FSDPEngine) -> None:
        self.actor, self.critic = actor, critic

    def plan_steps(self, num_steps: int) -> None:
        self.actor.plan_steps(num_steps)
        self.critic.plan_steps(num_steps)

    @property
    def collective(self) -> RankCollective:
        return self.actor.collective

    @property
    def background(self) -> RankCollective:
        return self.actor.background

    def save(self, path: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """As FSDPEngine.save; no rank begins with the critic where the actor could not be written."""
        why_not = attempt_on_ranks(self.collective, self.actor.save, path, tokenizer)
        if not why_not:
            self.critic.save(f"{path}/critic", tokenizer)
        elif self.collective.rank == 0:
            raise OSError(why_not)

    def stage_state(self, path: str) -> Callable[[], None]:
        """As FSDPEngine.stage_state; one after the other, so that ranks agree on the order of their calls."""
        writes = self.actor.stage_state(path), self.critic.stage_state(f"{path}/critic")

        def write() -> None:
            why_not = [why for each in writes if (why := attempt(each))]  # both in any case: other ranks take part
            if why_not:
                raise OSError("; ".join(why_not))

        return write

    def load_state(self, path: str) -> None:
        self.actor.load_state(path)
        self.critic.load_state(f"{path}/critic")
