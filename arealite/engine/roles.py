"""Several models of one run, on the same ranks or each on its own, in its own layout; and by turns with the servers.

Called by arealite/trainer.py and scripts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from arealite.algorithm.packing import karmarkar_karp
from arealite.api.errors import ArealiteError
from arealite.api.protocols import InferenceEngine
from arealite.api.types import Batch
from arealite.devices import free_bytes
from arealite.engine.checkpoint import attempt, attempt_on_ranks
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.parallel.ranks import PASS_LIMITS, RankCollective
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.engine.ppo.critic import FSDPPPOCritic, lessons

T = TypeVar("T")
SERVER_WORK_BYTES = 4 << 30  # of a GPU: what a server needs for its steps, besides weights and KV cache

logger = logging.getLogger(__name__)


class OtherShares:
    """Gives `role` the batches that are shared out for `actor`, and gives back what it says of their tokens.

    On the same ranks nothing moves where both have the same shares. Otherwise every rank gets the whole step's batch
    for the moment, a few bytes per token, and takes its share in the role's layout: whole groups, about the same number
    of tokens.

    A role with ranks of its own (`is_apart`) has its shares of the step from `prepare_batch`. What it says of them goes
    to the actor's ranks when these ask for it; neither side waits for the other before. Other ranks take no part.
    """

    def __init__(self, actor: FSDPEngine, role: FSDPEngine) -> None:
        """Collective over all ranks of the run."""
        self.actor, self.role = actor, role
        a, r = actor.mesh.dims, role.mesh.dims
        self.is_apart = a.first != r.first
        self.is_same = (a.d, a.c * a.t) == (r.d, r.c * r.t)
        self.takes_part = actor.is_here or role.is_here
        if self.is_apart:
            self._both = RankCollective(role.config.collective_timeout_s * PASS_LIMITS, a, r)

    def batch(self, own: Batch) -> Batch:
        """The role's share of the step, from the actor's share `own`. Collective."""
        if self.is_same:
            return own
        whole, _ = self._whole(own)
        return whole.select(self._sequences(whole))

    def score(self, own: Batch, score: Callable[[Batch], np.ndarray]) -> np.ndarray:
        """`score`, a pass of the role: float32 [T] for this rank's share `own`; NaN where it takes no part.
        Collective."""
        if not self.takes_part:
            return np.full(len(own.tokens), np.nan, np.float32)
        if self.is_apart:
            return self._columns(self.role, own, lambda: {"scores": score(own)})["scores"]
        if self.is_same:
            return score(own)
        whole, begin = self._whole(own)
        sequences = self._sequences(whole)
        found = score(whole.select(sequences))
        out = np.zeros(len(whole.tokens), np.float32)
        for chosen, values in _by_share(self.role, self.role.ranks, (sequences, found)):
            spans = [np.arange(whole.cu_seqlens[i], whole.cu_seqlens[i + 1]) for i in chosen]
            out[np.concatenate(spans) if spans else np.zeros(0, np.int64)] = values
        return out[begin : begin + len(own.tokens)]

    def _whole(self, own: Batch) -> tuple[Batch, int]:
        """All shares end to end, and the token at which the actor's own begins."""
        shares = _by_share(self.actor, self.actor.ranks, own)
        return Batch.join(shares), sum(len(share.tokens) for share in shares[: self.actor.mesh.share])

    def _sequences(self, whole: Batch) -> np.ndarray:
        num_tokens = np.bincount(whole.group_ids, weights=whole.lengths, minlength=whole.num_groups)
        groups = karmarkar_karp(num_tokens.tolist(), self.role.mesh.dims.d)[self.role.mesh.share]
        return np.flatnonzero(np.isin(whole.group_ids, groups))

    def _columns(
        self, giver: FSDPEngine, own: Batch, make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """float32 [T] columns of `own`, this rank's share, on the ranks of actor and role: what `make` says on those of
        `giver`, each of its own share. Groups are whole in every share, and a group's tokens in the same order."""
        shares = self._from(giver, lambda: (own.group_ids[own.owners], make()))
        groups, wanted = np.concatenate([g for g, _ in shares]), own.group_ids[own.owners]
        order, places = np.argsort(groups, kind="stable"), np.argsort(wanted, kind="stable")
        chosen = order[np.isin(groups[order], wanted)]
        if not np.array_equal(groups[chosen], wanted[places]):
            raise ArealiteError(
                "the ranks of two models have other sequences of the same groups: change batches alike on all ranks"
            )
        found = {}
        for name in shares[0][1]:
            found[name] = np.empty(len(wanted), np.float32)
            found[name][places] = np.concatenate([columns[name] for _, columns in shares])[chosen]
        return found

    def _from(self, giver: FSDPEngine, make: Callable[[], T]) -> list[T]:
        """What `make` returns on a rank of each of `giver`'s shares, on all ranks of actor and role.

        Consumes: nothing. Produces: the same list on all of these ranks. Waits for: `make` on those of `giver`, at most
        PASS_LIMITS times `collective_timeout_s`. Unblocked by: it, or the death of a rank.
        """
        return _by_share(giver, self._both, make() if giver.is_here else None)


def _by_share(engine: FSDPEngine, ranks: RankCollective, value: Any) -> list[Any]:
    """One rank's value of every share of `engine`, in their order, on all `ranks`, engine's among them. Collective."""
    return [v for speaks, v in ranks.gather((engine.mesh.speaks, value if engine.mesh.speaks else None)) if speaks]


class Turns:
    """Of the trainer and of servers on the same accelerators. Where each has its own, nobody waits."""

    def __init__(self, rollout: InferenceEngine, *models: FSDPEngine | OtherShares | None) -> None:
        """`models`: all that train or score; None is one that the run does not have. Those apart need no turns."""
        self.are_taken = os.environ.get("AREALITE_COLOCATED") == "1"
        shared = [m for m in models if not (m is None or (isinstance(m, OtherShares) and m.is_apart))]
        engines = [m.role if isinstance(m, OtherShares) else m for m in shared]
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
        free = free_bytes(self._engines[0].mesh.device, enough=SERVER_WORK_BYTES)
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
    """The value model, for batches of the actor's shares. Apart, it learns as soon as the actor knows the advantages,
    while the actor learns too."""

    def __init__(self, actor: FSDPPPOActor, critic: FSDPPPOCritic) -> None:
        super().__init__(actor, critic)
        self.critic = critic
        if self.is_apart:
            actor.after_advantages = lambda batch: self._columns(actor, batch, lambda: lessons(batch))

    def compute_values(self, batch: Batch) -> np.ndarray:
        """As FSDPPPOCritic.compute_values, float32 [T]. Collective."""
        return self.score(batch, self.critic.compute_values)

    def ppo_update(self, batch: Batch) -> dict[str, float]:
        """As FSDPPPOCritic.ppo_update; the names of its statistics begin with critic_. Collective."""
        if not self.takes_part:
            return {}
        if not self.is_apart:
            learned = self.critic.ppo_update(self.batch(batch))
        else:
            if self.critic.is_here:
                columns = self._columns(self.actor, batch, dict)
                batch = replace(batch, values=columns["values"], returns=columns["returns"])
            learned = self._from(self.critic, lambda: self.critic.ppo_update(batch))[0]
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
