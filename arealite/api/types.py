"""The records that cross a boundary between processes or folders: plain Python and numpy, no torch.

Convention for every per-token array: entry t speaks of token t itself. `logprobs[t]` is log p(token t | tokens < t);
it is 0 and `versions[t]` is -1 where the token was not generated (prompt, tool output), that is where `loss_mask[t]`
is False.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
# What a vLLM server is started with, so that its workers take updates (weights/vllm_worker.py).
VLLM_WORKER_EXTENSION = "arealite.weights.vllm_worker.WeightReceiver"

Status = Literal["ok", "reward_error", "failed", "aborted"]


@dataclass(frozen=True)
class Dims:
    """Parallel degrees: d data (replicas; servers for inference), t tensor, p pipeline, c context, e expert; of the
    trainer ranks from `first` on."""

    d: int = 1
    t: int = 1
    p: int = 1
    c: int = 1
    e: int = 1
    first: int = 0

    @property
    def size(self) -> int:
        """Devices. Experts are spread over those that are there anyway."""
        return self.d * self.t * self.p * self.c

    @property
    def ranks(self) -> range:
        """The trainer ranks that have a part of the model."""
        return range(self.first, self.first + self.size)

    def __str__(self) -> str:
        sizes = {"t": self.t, "p": self.p, "c": self.c, "e": self.e}
        return f"d{self.d}" + "".join(f"{letter}{size}" for letter, size in sizes.items() if size > 1)


@dataclass(frozen=True)
class Task:
    """One row of a data set, drawn once.

    `id` is unique in a run: data set epoch and row, such as "e0-r17", so that each draw has its own line in the
    ledger. Exactly one of `messages` (chat) and `prompt` (raw text) is set; `template_options` are variables of the
    chat template, tools among them. `answer` is None where the row has none.
    """

    id: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    answer: str | None = ""
    extras: dict[str, Any] = field(default_factory=dict)
    template_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to sample. `max_new_tokens` counts from the end of `input_ids`; `lora` names a loaded adapter.
    `forced_ids` come in place of the first tokens sampled: for tests, on built-in servers with --forced-decoding."""

    rid: str
    input_ids: list[int]
    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    group_id: str = ""
    lora: str | None = None
    forced_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What a server sampled for one request, over all interruptions.

    `token_ids`, `logprobs` (natural log, full vocabulary, after temperature) and `versions` (of the weights that
    produced the token) have one entry per generated token, the matched stop token included. `num_interruptions`: places
    where it was stopped and went on, with the same weights or with others. `num_cached_tokens` of the prompt were in
    the server's cache when it began.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: FinishReason
    matched: int | str | None = None
    text: str = ""
    server_id: str = ""
    latency_s: float = 0.0
    num_interruptions: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class Trajectory:
    """One attempt at a task: a sample, whatever its number of turns, and of token sequences that it is written in.

    `tokens` [T] int, `loss_mask` [T] bool (True where the policy produced the token), `logprobs` [T] float,
    `versions` [T] int. `reward` is None unless `status` is "ok": a failed reward is never a reward of 0. `statistics`:
    numbers of the workflow's own, whose means over a step are logged as workflow_<name>.

    A sample whose tokens do not all extend each other (a history that was rewritten, a sub-agent) has several rows, end
    to end in the order of time: `row_lengths`, whose sum is T; one row if empty. Each sampled token is in the loss mask
    of one row; where other rows contain it, it is context. `returns` [T]: the return of each token in the loss mask,
    where turns have rewards of their own; it is `reward` for all if empty.
    """

    task_id: str
    member: int
    tokens: list[int]
    loss_mask: list[bool]
    logprobs: list[float]
    versions: list[int]
    reward: float | None
    finish_reason: FinishReason
    status: Status = "ok"
    reward_parts: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)
    prompt_text: str = ""
    completion_text: str = ""
    error: str = ""
    generate_s: float = 0.0
    reward_s: float = 0.0
    row_lengths: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)

    @property
    def min_version(self) -> int:
        """The oldest weight version among the generated tokens (-1 if there are none)."""
        return min((v for v, m in zip(self.versions, self.loss_mask, strict=True) if m), default=-1)


@dataclass(frozen=True)
class Group:
    """All finished attempts at one task. `ordinal` counts issued tasks from 0 over the whole run."""

    task: Task
    ordinal: int
    trajectories: list[Trajectory]


PER_TOKEN = (
    "tokens", "loss_mask", "logprobs", "versions", "turn_returns", "prox_logp", "ref_logp", "values", "advantages",
    "returns",
)  # fmt: skip
PER_SEQUENCE = ("group_ids", "sample_ids", "rewards", "truncated")


@dataclass
class Batch:
    """Trajectories packed end to end, without padding; T tokens in N sequences of S samples.

    Sequence i covers tokens [cu_seqlens[i], cu_seqlens[i+1]). It is a row of sample `sample_ids[i]`, whose reward and
    end stand at each of its rows; the rows of a sample come in the order of time. In a distributed run each rank holds
    its share, whole groups, and `group_ids`, `sample_ids` and `num_groups` still speak of the whole step, so that
    nothing depends on how the step was cut.
    """

    tokens: np.ndarray  # int64 [T]
    loss_mask: np.ndarray  # bool [T]
    logprobs: np.ndarray  # float32 [T], behaviour policy
    versions: np.ndarray  # int32 [T], -1 where not generated
    cu_seqlens: np.ndarray  # int64 [N + 1]
    group_ids: np.ndarray  # int64 [N], position of the sequence's group in the step: 0 .. num_groups - 1
    sample_ids: np.ndarray  # int64 [N], equal for the rows of one sample
    rewards: np.ndarray  # float64 [N]
    truncated: np.ndarray  # bool [N], finish reason "length"
    num_groups: int  # groups in the whole step, over all ranks
    task_ids: list[str]  # N entries
    turn_returns: np.ndarray | None = None  # float64 [T], Trajectory.returns, if any sample has them
    prox_logp: np.ndarray | None = None  # float32 [T], trainer's logprob at the start of the step
    ref_logp: np.ndarray | None = None  # float32 [T]
    values: np.ndarray | None = None  # float32 [T], the critic's at the start of the step
    advantages: np.ndarray | None = None  # float32 [T]
    returns: np.ndarray | None = None  # float32 [T], what the critic is to predict

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per sequence, int64 [N]."""
        return np.diff(self.cu_seqlens)

    @property
    def owners(self) -> np.ndarray:
        """The sequence of each token, int64 [T]."""
        return np.repeat(np.arange(self.num_sequences), self.lengths)

    @property
    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """The first sequence of each sample, int64 [S], and which of these samples each sequence is of, int64 [N]."""
        _, first, sample_of = np.unique(self.sample_ids, return_index=True, return_inverse=True)
        return first, sample_of

    @classmethod
    def pack(cls, groups: list[Group], num_groups: int | None = None) -> Batch:
        """Pack the `ok` trajectories of `groups`; groups and samples are numbered in the order given. Rows without a
        token in the loss are left out where a sample has others."""
        samples = [(g, t) for g, group in enumerate(groups) for t in group.trajectories if t.status == "ok"]
        trajectories = [t for _, t in samples]
        rows = [t.row_lengths or [len(t.tokens)] for t in trajectories]
        sample_ids = np.asarray([i for i, lengths in enumerate(rows) for _ in lengths], dtype=np.int64)

        def flat(columns: Iterable[Sequence[Any]], dtype: type) -> np.ndarray:
            parts: list[np.ndarray] = [np.asarray(column, dtype=dtype) for column in columns]
            return np.concatenate(parts) if parts else np.zeros(0, dtype)

        has_returns = any(t.returns for t in trajectories)
        returns = (t.returns or [t.reward or 0.0] * len(t.tokens) for t in trajectories)
        batch = cls(
            tokens=flat((t.tokens for t in trajectories), np.int64),
            loss_mask=flat((t.loss_mask for t in trajectories), np.bool_),
            logprobs=flat((t.logprobs for t in trajectories), np.float32),
            versions=flat((t.versions for t in trajectories), np.int32),
            cu_seqlens=np.cumsum([0, *(length for lengths in rows for length in lengths)]).astype(np.int64),
            group_ids=np.asarray([g for g, _ in samples], dtype=np.int64)[sample_ids],
            sample_ids=sample_ids,
            rewards=np.asarray([t.reward for t in trajectories], dtype=np.float64)[sample_ids],
            truncated=np.asarray([t.finish_reason == "length" for t in trajectories], dtype=np.bool_)[sample_ids],
            num_groups=len(groups) if num_groups is None else num_groups,
            task_ids=[trajectories[i].task_id for i in sample_ids.tolist()],
            turn_returns=flat(returns, np.float64) if has_returns else None,
        )
        num_in_loss = np.bincount(batch.owners[batch.loss_mask], minlength=batch.num_sequences)
        is_kept = (num_in_loss > 0) | (np.bincount(sample_ids)[sample_ids] == 1)
        return batch if is_kept.all() else batch.select(np.flatnonzero(is_kept))

    def select(self, sequences: np.ndarray | list[int]) -> Batch:
        """The batch of the given sequences, in that order (group ids, sample ids and num_groups unchanged)."""
        chosen = [int(i) for i in sequences]
        spans = [np.arange(self.cu_seqlens[i], self.cu_seqlens[i + 1]) for i in chosen]
        at = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        changes: dict[str, Any] = {}
        for name in PER_TOKEN + PER_SEQUENCE:
            array = getattr(self, name)
            changes[name] = None if array is None else array[at if name in PER_TOKEN else chosen]
        changes["cu_seqlens"] = np.cumsum([0, *(int(self.lengths[i]) for i in chosen)]).astype(np.int64)
        changes["task_ids"] = [self.task_ids[i] for i in chosen]
        return replace(self, **changes)

    @classmethod
    def join(cls, parts: list[Batch]) -> Batch:
        """Shares of one step end to end; per-token arrays that a part lacks are lacking in the whole."""
        changes: dict[str, Any] = {}
        for name in PER_TOKEN + PER_SEQUENCE:
            arrays = [getattr(part, name) for part in parts]
            changes[name] = None if any(a is None for a in arrays) else np.concatenate(arrays)
        changes["cu_seqlens"] = np.cumsum([0, *(n for part in parts for n in part.lengths.tolist())]).astype(np.int64)
        changes["task_ids"] = [task_id for part in parts for task_id in part.task_ids]
        return replace(parts[0], **changes)


@dataclass(frozen=True)
class TensorSlot:
    """Where one named tensor lies in a weight buffer. `dtype` is torch's name without "torch."."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


@dataclass(frozen=True)
class WeightUpdateMeta:
    """One version of the weights, ready to be read by servers.

    `kind` "disk": `path` is a Hugging Face folder. `kind` "shm": `path` is a file to be mapped, `slots` its layout.
    `kind` "lora": `path` is a folder in PEFT's format, to be served as `adapter` in place of the one of that name.
    `kind` "distributed": `group` is the process group that `buckets` are broadcast in, ranges of `slots` whose offsets
    count from the bucket's start.
    `checksums` (CRC-32 of the raw bytes in the wire dtype) of the tensors that servers must confirm.
    """

    kind: Literal["disk", "shm", "distributed", "lora"]
    version: int
    path: str
    slots: tuple[TensorSlot, ...] = ()
    checksums: dict[str, int] = field(default_factory=dict)
    buckets: tuple[tuple[int, int], ...] = ()
    group: str = ""
    adapter: str | None = None


@dataclass(frozen=True)
class GroupPlace:
    """Where the members of a process group of weights meet: the trainer is rank 0, servers follow."""

    address: str
    port: int
    world_size: int
    name: str
    backend: str  # gloo or nccl


def as_record(value: Any) -> dict[str, Any]:
    """A frozen record as a JSON-ready dict, one level deep (lists of records included)."""
    out = dict(vars(value))
    for name, entry in out.items():
        if isinstance(entry, (list, tuple)) and entry and isinstance(entry[0], TensorSlot | Trajectory):
            out[name] = [as_record(e) for e in entry]
        elif isinstance(entry, Task):
            out[name] = as_record(entry)
    return out
