"""What a trainer and an inference engine must offer each other; everything else about them is private.

Implemented by engine/ (TrainEngine), rollout/ (InferenceEngine, DataSource by dataset/); used by scripts, workflow/,
evaluation/ and weights/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from arealite.api.types import Batch, Completion, GenerationRequest, Group, GroupPlace, Task, WeightUpdateMeta
    from arealite.api.workflow import RolloutWorkflow


class Collective(Protocol):
    """The trainer ranks as the rollout head sees them. Every call is made by all ranks, in the same order."""

    rank: int
    world_size: int
    num_shares: int  # parts that a batch is divided into; ranks that compute one sequence together have the same one

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


class DataSource(Protocol):
    """An endless, resumable stream of tasks (dataset/loader.py)."""

    def __next__(self) -> Task: ...

    def __iter__(self) -> Iterator[Task]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class WeightSender(Protocol):
    """The trainer's end of an update that servers cannot read by themselves. All but `cancel` block: call in a thread.
    Each raises WeightSyncError."""

    def listen(self, world_size: int, towards: str) -> GroupPlace:
        """Open a place for a new process group that the host `towards` can reach; the old group ends."""

    def join(self) -> None:
        """Become rank 0 of the group; returns once all members have joined."""

    def send(self, bucket: int) -> str | None:
        """Broadcast a bucket of the published version; or, of kind "tensor", the bucket as text for the calls."""

    def cancel(self) -> None:
        """Let a `send` that runs in another thread fail."""

    def leave(self) -> None:
        """End the group, if there is one."""


class InferenceEngine(Protocol):
    """One client over the run's inference servers; the rollout head when a trainer uses it."""

    def initialize(self, collective: Collective | None = None, addresses: list[str] | None = None) -> None:
        """Find the servers (argument, AREAL_LLM_SERVER_ADDRS), wait for their health, start the executor."""

    def destroy(self) -> None: ...

    async def agenerate(self, request: GenerationRequest) -> Completion:
        """Sample one sequence; resumes through interruptions; never returns "abort" before the run ends."""

    def sample(self, requests: list[GenerationRequest]) -> list[Completion]:
        """Sample now, outside of staleness and ledger; in the order of the requests."""

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Logprobs (temperature 1) of each sequence's tokens under the servers' current weights; first is 0."""

    def rollout_batch(self, tasks: list[Task], workflow: RolloutWorkflow) -> Batch:
        """Collective and synchronous: run exactly these tasks, return this rank's share."""

    def prepare_batch(
        self,
        dataloader: DataSource,
        workflow: RolloutWorkflow,
        should_accept: Callable[[Group], bool] | None = None,
    ) -> Batch:
        """Collective and asynchronous: keep tasks in flight under the staleness bound, return this rank's share of
        the next `consumer_batch_size` groups. `should_accept(group)` False drops the group (dynamic sampling)."""

    def submit(self, task: Task, workflow: RolloutWorkflow) -> None: ...

    def wait(self, num_groups: int, timeout_s: float | None = None) -> list[Group]: ...

    def pause(self) -> None:
        """Stop generation on all servers and hold new requests; running ones keep their tokens."""

    def resume(self) -> None: ...

    def prepare_update(self) -> None:
        """Call before new weights are written where the last ones are: no server is sent those any more."""

    def update_weights(self, meta: WeightUpdateMeta, send: WeightSender | None = None) -> dict[str, dict[str, int]]:
        """All servers load `meta`; returns {server id: {tensor name: CRC-32}} read from the live parameters. Generation
        is paused only as long as it has to be; paused before, it stays so. `send`: of kinds distributed and tensor."""

    def get_version(self) -> int: ...

    def set_version(self, version: int) -> None: ...


class TrainEngine(Protocol):
    """The SPMD trainer: the same calls on every rank, each with its share of the batch."""

    @property
    def collective(self) -> Collective: ...

    def initialize(self) -> None: ...

    def destroy(self) -> None: ...

    def compute_logp(self, batch: Batch, temperature: float | None = None) -> np.ndarray:
        """float32 [T] logprobs of the batch's tokens at `temperature` (the generation's if not given); 0 where
        loss_mask is False."""

    def upload_weights(self, meta: WeightUpdateMeta | None = None) -> int:
        """Send the weights to the connected inference engine and verify them; returns the new version."""

    def save(self, path: str, tokenizer: Any = None) -> None:
        """Write a Hugging Face folder (safetensors, config, tokenizer), atomically. The tokenizer is that of the
        model's own folder if not given."""

    @property
    def background(self) -> Collective:
        """The same ranks, for the calls of one other thread."""

    def stage_state(self, path: str) -> Callable[[], None]:
        """Copy model, optimizer, schedule and RNG of all ranks; returns the call that writes them under `path` (part of
        a recovery point), while training goes on. OSError or RuntimeError on ranks that cannot write."""

    def save_state(self, path: str) -> None:
        """`stage_state`, and write at once."""

    def load_state(self, path: str) -> None: ...
