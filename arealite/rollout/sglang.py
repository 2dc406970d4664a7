"""The SGLang wire format, and what the built-in server adds to it: bodies to send, answers to read.

Called by generate.py and fleet.py; does no input or output itself. Checked against SGLang 0.5.23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from arealite.api.errors import ConfigError, RequestError, WeightSyncError
from arealite.api.types import FinishReason, GenerationRequest, WeightUpdateMeta, as_record

UNNAMED_VERSION = "default"  # what SGLang calls its weights before the first update


@dataclass(frozen=True)
class Part:
    """One answer: the tokens sampled since the request was last sent. The lists have one entry per token."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: FinishReason
    matched: int | str | None
    text: str


class SGLangBackend:
    """SGLang as released. It cannot confirm single tensors, so its updates have no receipt. Bodies are JSON-ready."""

    def generate_body(self, request: GenerationRequest, wire_id: str, so_far: list[int]) -> dict[str, Any]:
        """Body of POST /generate that continues after `so_far`, the tokens sampled before an interruption."""
        num_so_far = len(so_far)
        sampling = {
            "max_new_tokens": request.max_new_tokens - num_so_far,
            "min_new_tokens": max(0, request.min_new_tokens - num_so_far),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "stop": list(request.stop),
            "stop_token_ids": list(request.stop_token_ids),
            "ignore_eos": request.ignore_eos,
            # The server draws from (seed, absolute position): the same seed after an interruption is right.
            "sampling_seed": request.seed,
        }
        return {
            "rid": wire_id,
            "input_ids": [*request.input_ids, *so_far],
            "sampling_params": {key: value for key, value in sampling.items() if value is not None and value != []},
            "return_logprob": True,
            "stream": False,
            "routing_key": request.group_id,
        }

    def parse_part(self, answer: Any, server_id: str) -> Part:
        """Read an answer of /generate.

        Raises:
            RequestError: the answer breaks the protocol, holds a logprob that is not a number, or is an error.
        """
        try:
            notes = answer["meta_info"]
            token_ids = [int(t) for t in answer["output_ids"]]
            entries = (notes.get("output_token_logprobs") or [])[: len(token_ids)]
            finish = notes["finish_reason"]
            reason = finish["type"]
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"{server_id} answered /generate without {error}; expected output_ids and meta_info with"
                " finish_reason, as SGLang sends them"
            ) from error
        _check_error(finish, server_id)
        if len(entries) != len(token_ids) or [e[1] for e in entries] != token_ids:
            raise RequestError(
                f"{server_id} sent {len(token_ids)} tokens and {len(entries)} logprobs that do not belong together"
            )
        if reason not in ("stop", "length", "abort"):
            raise RequestError(f"{server_id} sent the finish reason {reason!r}; expected stop, length or abort")
        matched = finish.get("matched")
        return Part(
            token_ids=token_ids,
            logprobs=_finite([entry[0] for entry in entries], server_id),
            versions=_token_versions(notes, len(token_ids), server_id),
            finish_reason=reason,
            matched=matched[0] if isinstance(matched, list) else matched,
            text=answer.get("text") or "",
        )

    def score_body(self, tokens: list[int], wire_id: str) -> dict[str, Any]:
        """Body of POST /generate that returns the logprobs of `tokens` themselves (temperature 1)."""
        return {
            "rid": wire_id,
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }

    def parse_scores(self, answer: Any, num_tokens: int, server_id: str) -> list[float]:
        """`num_tokens` logprobs; the first, which has no context, is 0. Raises RequestError as `parse_part` does."""
        try:
            _check_error(answer["meta_info"]["finish_reason"], server_id)
            values = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
        except (KeyError, TypeError, IndexError) as error:
            raise RequestError(f"{server_id} answered a scoring request without input_token_logprobs") from error
        if len(values) != num_tokens:
            raise RequestError(f"{server_id} scored {len(values)} tokens; expected {num_tokens}")
        return [0.0, *_finite(values[1:], server_id)][:num_tokens]

    def update_call(self, meta: WeightUpdateMeta, pause_mode: str) -> tuple[str, dict[str, Any]]:
        """Path and body of the request that loads `meta`."""
        if meta.kind != "disk":
            raise ConfigError(f"weight_update is {meta.kind!r}, which SGLang cannot read; set weight_update=disk")
        # In place, requests keep their KV cache, and SGLang refuses an update that would flush it.
        flush = pause_mode != "in_place"
        body = {"model_path": meta.path, "weight_version": str(meta.version), "flush_cache": flush}
        return "/update_weights_from_disk", body

    def parse_receipt(self, answer: Any, meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        """Checksums that the server confirms; None where the server cannot.

        Raises:
            WeightSyncError: the server says that it did not take the weights.
        """
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise WeightSyncError(f"{server_id} did not take the weights of version {meta.version}: {answer}")
        return None


class NativeBackend(SGLangBackend):
    """The built-in server (`arealite serve`): the same protocol, shared memory, and checksums of live parameters."""

    def update_call(self, meta: WeightUpdateMeta, pause_mode: str) -> tuple[str, dict[str, Any]]:
        names = sorted(meta.checksums)
        if meta.kind == "disk":
            path, body = super().update_call(meta, pause_mode)
            return path, {**body, "checksum_names": names}
        return "/update_weights_from_shm", {
            "path": meta.path,
            "slots": [as_record(slot) for slot in meta.slots],
            "weight_version": str(meta.version),
            "checksum_names": names,
            "flush_cache": pause_mode != "in_place",
        }

    def parse_receipt(self, answer: Any, meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        super().parse_receipt(answer, meta, server_id)
        checksums = answer.get("checksums")
        if not isinstance(checksums, dict):
            raise WeightSyncError(f"{server_id} took version {meta.version} without checksums of its parameters")
        return {name: int(value) for name, value in checksums.items()}


def _check_error(finish: dict[str, Any], server_id: str) -> None:
    """An abort with an error class is the server's failure (NaN logits, say), not an interruption to go on from."""
    if finish["type"] == "abort" and finish.get("err_type"):
        raise RequestError(f"{server_id} ended the request with {finish['err_type']}: {finish.get('message')}")


def _finite(values: list[Any], server_id: str) -> list[float]:
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in values):
        raise RequestError(f"{server_id} sent a logprob that is not a finite number: its weights may hold NaN")
    return [float(x) for x in values]


def _token_versions(notes: dict[str, Any], num_tokens: int, server_id: str) -> list[int]:
    """One weight version per token, from the spans where the server gives them, else its version at the end."""
    whole = notes.get("weight_version", UNNAMED_VERSION)
    versions = [_version_number(whole, server_id)] * num_tokens
    for span in notes.get("weight_versions") or []:
        start, end = max(0, int(span["start"])), min(num_tokens, int(span["end"]))
        versions[start:end] = [_version_number(span["version"], server_id)] * max(0, end - start)
    return versions


def _version_number(version: Any, server_id: str) -> int:
    if version == UNNAMED_VERSION:
        return 0
    try:
        return int(version)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{server_id} reports the weight version {version!r}; expected a decimal number, as this run sets it"
        ) from error
