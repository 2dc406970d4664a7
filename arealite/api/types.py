"""The records that cross a boundary between processes or folders: plain Python and numpy, no torch.

Convention for every per-token array: entry t speaks of token t itself. `logprobs[t]` is log p(token t | tokens < t);
it is 0 and `versions[t]` is -1 where the token was not generated (prompt, tool output), that is where `loss_mask[t]`
is False.
"""

from __future__ import annotations

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
    """One sequence to sample. `max_new_tokens` counts from the end of `input_ids`; `lora` names a loaded adapter."""

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


@dataclass(frozen=True)
class Completion:
    """What a server sampled for one request, over all interruptions.

    `token_ids`, `logprobs` (natural log, full vocabulary, after temperature) and `versions` (of the weights that
    produced the token) have one entry per generated token, the matched stop token included. `num_interruptions`: places
    where it was stopped and went on, with the same weights or with others.
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


@dataclass(frozen=True)
class Trajectory:
    """One attempt at a task, all turns in one token sequence.

    `tokens` [T] int, `loss_mask` [T] bool (True where the policy produced the token), `logprobs` [T] float,
    `versions` [T] int. `reward` is None unless `status` is "ok": a failed reward is never a reward of 0. `statistics`:
    numbers of the workflow's own, whose means over a step are logged as workflow_<name>.
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
    "tokens", "loss_mask", "logprobs", "versions", "prox_logp", "ref_logp", "values", "advantages", "returns"
)  # fmt: skip
PER_SEQUENCE = ("group_ids", "rewards", "truncated")


@dataclass
class Batch:
    """Trajectories packed end to end, without padding; T tokens in N sequences.

    Sequence i covers tokens [cu_seqlens[i], cu_seqlens[i+1]). In a distributed run each rank holds its share, and
    `group_ids` and `num_groups` still speak of the whole step, so that nothing depends on how the step was cut.
    """

    tokens: np.ndarray  # int64 [T]
    loss_mask: np.ndarray  # bool [T]
    logprobs: np.ndarray  # float32 [T], behaviour policy
    versions: np.ndarray  # int32 [T], -1 where not generated
    cu_seqlens: np.ndarray  # int64 [N + 1]
    group_ids: np.ndarray  # int64 [N], position of the sequence's group in the step: 0 .. num_groups - 1
    rewards: np.ndarray  # float64 [N]
    truncated: np.ndarray  # bool [N], finish reason "length"
    num_groups: int  # groups in the whole step, over all ranks
    task_ids: list[str]  # N entries
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

    @classmethod
    def pack(cls, groups: list[Group], first_group_id: int = 0, num_groups: int | None = None) -> Batch:
        """Pack the `ok` trajectories of `groups`; group ids count from `first_group_id` in the order given."""
        rows = [
            (first_group_id + g, t) for g, group in enumerate(groups) for t in group.trajectories if t.status == "ok"
        ]
        trajectories = [t for _, t in rows]

        def flat(name: str, dtype: type) -> np.ndarray:
            parts: list[np.ndarray] = [np.asarray(getattr(t, name), dtype=dtype) for t in trajectories]
            return np.concatenate(parts) if parts else np.zeros(0, dtype)

        return cls(
            tokens=flat("tokens", np.int64),
            loss_mask=flat("loss_mask", np.bool_),
            logprobs=flat("logprobs", np.float32),
            versions=flat("versions", np.int32),
            cu_seqlens=np.cumsum([0, *(len(t.tokens) for t in trajectories)]).astype(np.int64),
            group_ids=np.asarray([g for g, _ in rows], dtype=np.int64),
            rewards=np.asarray([t.reward for t in trajectories], dtype=np.float64),
            truncated=np.asarray([t.finish_reason == "length" for t in trajectories], dtype=np.bool_),
            num_groups=len(groups) if num_groups is None else num_groups,
            task_ids=[t.task_id for t in trajectories],
        )

    def select(self, sequences: np.ndarray | list[int]) -> Batch:
        """The batch of the given sequences, in that order (group ids and num_groups unchanged)."""
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
