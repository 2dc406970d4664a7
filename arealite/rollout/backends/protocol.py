"""What the client must know about a server's wire protocol: requests to send, answers to read. No input or output here.

Implemented by sglang.py and vllm.py; called by generate.py, fleet.py, membership.py and bench.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, get_args

from arealite.api.errors import ConfigError, RequestError
from arealite.api.types import FinishReason, GenerationRequest, GroupPlace, WeightUpdateMeta

UNNAMED_VERSION = "default"  # what SGLang and vLLM call their weights before the first update
MODELS_PATH = "/v1/models"  # of servers of any kind


@dataclass(frozen=True)
class Call:
    """One HTTP request; `body` is JSON-ready (None: an empty one), `path` may hold a query. The answer is empty, JSON,
    or plain text. In an update, `may_be_refused`: that is no failure, and has no answer. `is_control`: it wants the
    server's admin key, where the server has such."""

    path: str
    body: dict[str, Any] | None = None
    method: str = "POST"
    expects_json: bool = True
    may_be_refused: bool = False
    is_control: bool = False


@dataclass(frozen=True)
class Segment:
    """One answer: the tokens sampled since the request was last sent. The lists have one entry per token. `cut_mass`:
    the probability that top-k, top-p and min-p cut, summed over the tokens, where the server tells it. `num_cached`:
    tokens of what was sent that were in its cache."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: FinishReason
    matched: int | str | None
    text: str
    cut_mass: float = 0.0
    num_cached: int = 0


@dataclass(frozen=True)
class UpdatePlan:
    """The calls of one weight update, to be made on a paused server (unless `is_staged`), in order: `before`, one of
    `buckets` for each bucket of the update (it is answered once the trainer has broadcast that bucket), `after`."""

    before: list[Call] = field(default_factory=list)
    buckets: list[Call] = field(default_factory=list)
    after: list[Call] = field(default_factory=list)
    # Nothing before `after` changes what is live, and `after` swaps between two tokens, after which requests go on with
    # the new weights: only requests that are to keep their cache need a pause for it.
    is_staged: bool = False


class Backend(Protocol):
    """One server's protocol. Until `detect`, that of the newest version known. A subclass takes answers apart
    (`_part`, `_scores`); that they are whole is checked here."""

    name: str  # as in the allocation mode
    title: str  # as its makers write it
    health_path: str
    is_healthy_paused: bool  # whether that route answers while generation is paused
    version_path: str  # GET; answers with weight_version
    facts_paths: tuple[str, ...]  # GET; what `detect` wants to know. A server may lack some of them
    num_ranks: int  # members that the server has in a process group of weights
    forces_tokens: bool = False  # whether it can be told which tokens to "sample"
    has_whole_events: bool  # whether an event of a stream holds all that went before, and can be used alone
    expected_part: str  # what an answer to `generate_call` must have
    expected_scores: str  # and one to `score_call`

    def detect(self, facts: Mapping[str, Any], server_id: str) -> Backend:
        """The backend for the server that answered `facts` (path -> JSON answer; paths that it lacks are absent).

        Raises:
            ConfigError: the server cannot be used as it was started; says with what it must be.
        """

    def generate_call(
        self, request: GenerationRequest, wire_id: str, so_far: list[int], is_followed: bool = False
    ) -> Call:
        """Samples the rest of `request` after `so_far`, the tokens sampled before an interruption. `is_followed`: the
        tokens are wanted as they come, as far as the server can."""

    def follow(self, so_far: Any, event: bytes, server_id: str) -> tuple[Any, list[int]]:
        """The answer to `generate_call` with one more event of its stream, and its tokens; `so_far`: of the events
        before this one, None with the first. Raises RequestError as `parse_part` does."""
        try:
            answer = self._joined(so_far, json.loads(event))
            return answer, self._ids(answer)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestError(
                f"{server_id} streamed an event without {error}; expected {self.expected_part}"
            ) from error

    def _joined(self, so_far: Any, event: Any) -> Any:
        """`follow`, of events that hold all that went before; errors as of `_part`."""
        return event

    def _ids(self, answer: Any) -> list[int]:
        """The tokens of an answer, which may be growing; errors as of `_part`."""

    def parse_part(self, answer: Any, server_id: str) -> Segment:
        """Reads the answer to `generate_call`.

        Raises:
            RequestError: the answer breaks the protocol, holds a logprob that is not a number, or is an error.
        """
        try:
            part = self._part(answer, server_id)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RequestError(
                f"{server_id} answered a request without {error}; expected {self.expected_part}"
            ) from error
        num_tokens, num_logprobs = len(part.token_ids), len(part.logprobs)
        if num_logprobs != num_tokens:
            raise RequestError(f"{server_id} sent {num_tokens} tokens and {num_logprobs} logprobs that belong to them")
        if part.finish_reason not in get_args(FinishReason):
            raise RequestError(
                f"{server_id} sent the finish reason {part.finish_reason!r}; expected stop, length or abort"
            )
        return replace(part, logprobs=_finite(part.logprobs, server_id))

    def _part(self, answer: Any, server_id: str) -> Segment:
        """What the answer says; any of KeyError, IndexError, TypeError and ValueError where it is no such answer."""

    def score_call(self, tokens: list[int], wire_id: str, lora: str | None) -> Call:
        """Asks for the logprobs of `tokens` themselves (temperature 1), under the adapter `lora`."""

    def parse_scores(self, answer: Any, num_tokens: int, server_id: str) -> list[float]:
        """`num_tokens` logprobs; the first, which has no context, is 0. Raises RequestError as `parse_part` does."""
        try:
            values = self._scores(answer, server_id)
        except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
            raise RequestError(f"{server_id} answered a scoring request without {self.expected_scores}") from error
        if len(values) != num_tokens:
            raise RequestError(f"{server_id} scored {len(values)} tokens; expected {num_tokens}")
        return [0.0, *_finite(values[1:], server_id)][:num_tokens]

    def _scores(self, answer: Any, server_id: str) -> list[Any]:
        """One entry per token, the first of any value; errors as of `_part`."""

    def abort_call(self, wire_id: str) -> Call:
        """Ends the request sent under `wire_id`; its own call is then answered with the tokens it has."""

    def pause_call(self, mode: str) -> Call:
        """Stops generation (`mode`: rollout.pause_mode); new requests are held."""

    def resume_call(self) -> Call: ...

    def lora_call(self, name: str, path: str) -> Call:
        """Loads the adapter in folder `path` as `name`."""

    def unload_lora_call(self, name: str) -> Call: ...

    def _replace_lora(self, meta: WeightUpdateMeta, pause_mode: str) -> list[Call]:
        """The adapter of an update in place of the one of its name, where the server waits for those who use it."""
        if pause_mode != "abort":
            raise ConfigError(
                f"rollout.pause_mode is {pause_mode}, but {self.title} replaces an adapter only while no request uses"
                " it: set rollout.pause_mode=abort, with which requests go on from the tokens they have"
            )
        name = meta.adapter or ""
        unload = replace(self.unload_lora_call(name), may_be_refused=True)  # it is not there before the first update
        return [unload, self.lora_call(name, meta.path)]

    def group_call(self, place: GroupPlace, rank: int) -> Call:
        """Joins the process group of weights/wire.py with this and the following ranks; answered once all members
        have joined."""

    def update_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        """Raises ConfigError when this server cannot read updates of `meta.kind`."""

    def parse_receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        """`answers` of the plan's calls, in order. Checksums that the server confirms; None where it cannot.

        Raises:
            WeightSyncError: the server says that it did not take the weights.
        """


def _finite(values: list[Any], server_id: str) -> list[float]:
    """The logprobs. Raises RequestError when one is not a finite number."""
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in values):
        raise RequestError(f"{server_id} sent a logprob that is not a finite number: its weights may hold NaN")
    return [float(x) for x in values]


def token_versions(spans: list[Any], whole: Any, num_tokens: int, server_id: str) -> list[int]:
    """One weight version per token, from the spans {version, start, end}, and `whole` where there is none."""
    versions = [version_number(whole, server_id)] * num_tokens
    for span in spans:
        start, end = max(0, int(span["start"])), min(num_tokens, int(span["end"]))
        versions[start:end] = [version_number(span["version"], server_id)] * max(0, end - start)
    return versions


def context_length_of(cards: Any) -> int | None:
    """Tokens of a prompt and its answer, by a server's answer to MODELS_PATH; None: it does not say."""
    card = (cards or {}).get("data") or [{}]
    length = card[0].get("max_model_len")
    return length if isinstance(length, int) and length > 0 else None


def version_number(version: Any, server_id: str) -> int:
    if version == UNNAMED_VERSION:
        return 0
    try:
        return int(version)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{server_id} reports the weight version {version!r}; expected a decimal number, as this run sets it"
        ) from error
