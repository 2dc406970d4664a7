"""What parts that do not know each other call on one another: the rollout head, the trainer's ranks, a workflow.

Implemented in engine/ (Collective, Trained, Scorer), dataset/ (DataSource), weights/ (WeightSender), rollout/
(InferenceEngine) and by users (RolloutWorkflow). Called across: everything else about these classes is their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from arealite.api.types import (
        Batch,
        Completion,
        GenerationRequest,
        Group,
        GroupPlace,
        Task,
        Trajectory,
        WeightUpdateMeta,
    )


OnTokens = Callable[[list[int]], None]  # told of the ids sampled so far; quick, and it does not raise


class Collective(Protocol):
    """The trainer ranks as the rollout head sees them. Every call is made by all ranks, in the same order."""

    rank: int
    world_size: int
    divisions: tuple[int, ...]  # each set of ranks divides a batch among them, the policy's first: into so many parts
    num_shares: int  # all of these; ranks that compute one sequence together have the same one

    def scatter(self, shares: list[Any] | None) -> Any:
        """Rank 0 gives one object per share (others None); returns the object of this rank's share."""

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's object on every rank."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, on every rank, in rank order."""

    def on_head(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on rank 0 while the others wait; its result, or its error, on every rank."""

    def barrier(self, what: str) -> None:
        """Waits for all ranks, at most the configured limit; `what` names the wait in a stall report."""


class Stateful(Protocol):
    """The rollout client or the data loader: its state is a JSON-ready dict, saved on rank 0 (the head) and given back
    to every rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DataSource(Stateful, Protocol):
    """An endless, resumable stream of tasks: the StatefulDataLoader, or a script's own."""

    def __next__(self) -> Task: ...

    def __iter__(self) -> Iterator[Task]: ...


@runtime_checkable
class Adaptive(DataSource, Protocol):
    """A stream that changes by how its tasks went."""

    def note(self, group: Group) -> None:
        """A group with an answer that was rewarded, whether it is trained on or not. In the rollout head's thread."""


class Trained(Protocol):
    """What a run is for: an engine, or several that are saved together (engine/roles.py)."""

    @property
    def collective(self) -> Collective: ...

    @property
    def background(self) -> Collective:
        """The same ranks, for the calls of one other thread."""

    def plan_steps(self, num_steps: int) -> None: ...

    def save(self, path: str, tokenizer: PreTrainedTokenizerBase | None) -> None: ...

    def stage_state(self, path: str) -> Callable[[], None]: ...

    def load_state(self, path: str) -> None: ...


class WeightSender(Protocol):
    """The trainer's end of an update that servers cannot read by themselves. All but `cancel` block: call in a thread.
    Each raises WeightSyncError."""

    def listen(self, world_size: int, towards: str) -> GroupPlace:
        """Open a place for a new process group that the host `towards` can reach; the old group ends."""

    def join(self) -> None:
        """Become rank 0 of the group; returns once all members have joined."""

    def send(self, bucket: int) -> None:
        """Broadcast a bucket of the published version."""

    def cancel(self) -> None:
        """Let a `send` that runs in another thread fail."""

    def leave(self) -> None:
        """End the group, if there is one."""


class InferenceEngine(Protocol):
    """The client over the run's inference servers, as workflows and the trainer's engine call it."""

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt and its answer that each server takes; None: it is not known. In the loop of
        `agenerate`."""

    async def agenerate(self, request: GenerationRequest, on_tokens: OnTokens | None = None) -> Completion:
        """Sample one sequence; resumes through interruptions; never returns "abort" before the run ends.

        `on_tokens` is called in this loop with all ids so far whenever there are more, also after interruptions; each
        call extends the one before. What is lost with a server is sampled again: if that brings other tokens than were
        told, there are no more calls, and only the Completion counts."""

    def sample(self, requests: list[GenerationRequest]) -> list[Completion]:
        """Sample now, outside of staleness and ledger; in the order of the requests."""

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Logprobs (temperature 1) of each sequence's tokens under the servers' current weights; first is 0."""

    def pause(self) -> None:
        """Stop generation on all servers and hold new requests; running ones keep their tokens."""

    def resume(self) -> None: ...

    def prepare_update(self) -> None:
        """Call before new weights are written where the last ones are: no server is sent those any more."""

    def update_weights(self, meta: WeightUpdateMeta, send: WeightSender | None = None) -> dict[str, dict[str, int]]:
        """All servers load `meta`; returns {server id: {tensor name: CRC-32}} read from the live parameters. Generation
        is paused only as long as it has to be; paused before, it stays so. `send`: of kind distributed."""

    def get_version(self) -> int: ...

    def set_version(self, version: int) -> None: ...


class Scorer(Protocol):
    """The trainer's engine as the handshake of the weights calls it: on every rank, each with its share."""

    @property
    def collective(self) -> Collective: ...

    def compute_logp(self, batch: Batch, temperature: float | None = None) -> np.ndarray:
        """float32 [T] logprobs of the batch's tokens at `temperature` (the generation's if not given); 0 where
        loss_mask is False."""


@runtime_checkable
class RolloutWorkflow(Protocol):
    """How one task becomes a group of trajectories. One instance serves many tasks at a time, so it keeps no state per
    task."""

    async def arun_episode(self, engine: InferenceEngine, task: Task) -> list[Trajectory]:
        """All members of the task's group. An exception means the episode failed: it is retried, then counted and
        reported; a failed reward is a trajectory of status "reward_error", not an exception."""

    def close(self) -> None:
        """Release what the workflow owns (reward worker processes)."""
