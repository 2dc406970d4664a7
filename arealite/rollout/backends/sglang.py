"""SGLang's wire protocol, by the server's version, checked against SGLang 0.5.10 to 0.5.23; and the built-in server's,
which is the same with shared memory and checksums of live parameters added. Called through protocol.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arealite.api.errors import ConfigError, RequestError, WeightSyncError
from arealite.api.types import GenerationRequest, GroupPlace, WeightUpdateMeta, as_record
from arealite.rollout.backends.protocol import (
    ADAPTER_NEEDS_ABORT,
    UNNAMED_VERSION,
    Call,
    Segment,
    UpdatePlan,
    finite,
    token_versions,
)

CHECKED_VERSION = (0, 5, 23)
SPANS_SINCE = (0, 5, 20)  # answers tell which weights made which token
SESSION_SINCE = (0, 5, 21)  # begin and end are asked for around updates by broadcast
STREAM_VERSION = (0, 5, 22)  # since then, stream_interval is part of the checked schema
NUM_EVENTS = 8  # of a stream at most: each holds all that went before
MIN_EVENT_TOKENS = 32


class SGLangBackend:
    """SGLang as released (a Backend). It cannot confirm single tensors: its updates have no receipt."""

    name = "sglang"
    health_path = "/health"
    is_healthy_paused = False  # it samples a token
    streams = True  # a server that dies then leaves the tokens it has sampled
    version_path = "/model_info"
    facts_paths: tuple[str, ...] = ("/server_info", "/get_server_info")  # new and old name

    def __init__(self, version: tuple[int, ...] = CHECKED_VERSION, num_ranks: int = 1, num_stages: int = 1) -> None:
        self.version, self.num_ranks, self._num_stages = version, num_ranks, num_stages

    def detect(self, facts: Mapping[str, Any], server_id: str) -> SGLangBackend:
        known: dict[str, Any] = next(iter(facts.values()), {})
        version = _version(known.get("version", ""))
        found = SGLangBackend(version or CHECKED_VERSION, known.get("tp_size", 1), known.get("pp_size", 1))
        found.streams = found.version >= STREAM_VERSION and not known.get("incremental_streaming_output")
        return found

    def generate_call(self, request: GenerationRequest, wire_id: str, so_far: list[int]) -> Call:
        num_so_far = len(so_far)
        num_left = request.max_new_tokens - num_so_far
        sampling = {
            "max_new_tokens": num_left,
            "min_new_tokens": max(0, request.min_new_tokens - num_so_far),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "stop": list(request.stop),
            "stop_token_ids": list(request.stop_token_ids),
            "ignore_eos": request.ignore_eos,
            "skip_special_tokens": False,  # a stop string may be one
            # The server draws from (seed, absolute position): the same seed after an interruption is right.
            "sampling_seed": request.seed,
            "stream_interval": max(MIN_EVENT_TOKENS, num_left // NUM_EVENTS) if self.streams else None,
        }
        body = {
            "rid": wire_id,
            "input_ids": [*request.input_ids, *so_far],
            "sampling_params": {key: value for key, value in sampling.items() if value is not None and value != []},
            "return_logprob": True,
            "stream": self.streams,
            "routing_key": request.group_id,
        }
        if request.lora:
            body["lora_path"] = request.lora  # SGLang's word for the adapter's name
        return Call("/generate", body)

    def parse_part(self, answer: Any, server_id: str) -> Segment:
        try:
            notes = answer["meta_info"]
            token_ids = [int(t) for t in answer["output_ids"]]
            # With max_new_tokens=0 there is an entry without a token.
            entries = (notes.get("output_token_logprobs") or [])[: len(token_ids)]
            finish = notes["finish_reason"] or {"type": "abort"}  # null in a stream: as far as it came
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
        return Segment(
            token_ids=token_ids,
            logprobs=finite([entry[0] for entry in entries], server_id),
            versions=token_versions(
                notes.get("weight_versions") or [],
                notes.get("weight_version", UNNAMED_VERSION),
                len(token_ids),
                server_id,
            ),
            finish_reason=reason,
            matched=matched[0] if isinstance(matched, list) else matched,
            text=answer.get("text") or "",
            cut_mass=float(notes.get("cut_mass") or 0.0),  # the built-in server's
        )

    def score_call(self, tokens: list[int], wire_id: str, lora: str | None) -> Call:
        body: dict[str, Any] = {
            "rid": wire_id,
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        if lora:
            body["lora_path"] = lora
        return Call("/generate", body)

    def parse_scores(self, answer: Any, num_tokens: int, server_id: str) -> list[float]:
        try:
            _check_error(answer["meta_info"]["finish_reason"], server_id)
            values = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
        except (KeyError, TypeError, IndexError) as error:
            raise RequestError(f"{server_id} answered a scoring request without input_token_logprobs") from error
        if len(values) != num_tokens:
            raise RequestError(f"{server_id} scored {len(values)} tokens; expected {num_tokens}")
        return [0.0, *finite(values[1:], server_id)][:num_tokens]

    def abort_call(self, wire_id: str) -> Call:
        return Call("/abort_request", {"rid": wire_id})

    def pause_call(self, mode: str) -> Call:
        if mode != "abort" and self.version < SPANS_SINCE:
            raise ConfigError(
                f"rollout.pause_mode is {mode}, but SGLang {_text(self.version)} cannot tell which weights made which"
                f" token of a request that goes on after an update ({_text(SPANS_SINCE)} can): set"
                " rollout.pause_mode=abort"
            )
        return Call("/pause_generation", {"mode": mode})

    def resume_call(self) -> Call:
        return Call("/continue_generation", {})

    def lora_call(self, name: str, path: str) -> Call:
        return Call("/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload_lora_call(self, name: str) -> Call:
        return Call("/unload_lora_adapter", {"lora_name": name})

    def group_call(self, place: GroupPlace, rank: int) -> Call:
        body = {"master_address": place.address, "master_port": place.port, "rank_offset": rank}
        body |= {"world_size": place.world_size, "group_name": place.name, "backend": place.backend}
        return Call("/init_weights_update_group", body)

    def update_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        # In place, requests keep their KV cache, and SGLang refuses an update that would flush it.
        last = {"flush_cache": pause_mode != "in_place", "weight_version": str(meta.version)}
        if meta.kind == "disk":
            return UpdatePlan(after=[Call("/update_weights_from_disk", {"model_path": meta.path, **last})])
        if meta.kind == "lora":
            return self._adapter_plan(meta, pause_mode)
        if meta.kind == "shm":
            raise ConfigError(f"weight_update is {meta.kind!r}, which SGLang cannot read; set weight_update=disk")
        if self._num_stages > 1:
            raise ConfigError(
                f"weight_update is {meta.kind!r}, and SGLang with pp_size {self._num_stages} reads new weights only"
                " from disk: set weight_update=disk"
            )
        buckets = [self._bucket_call(meta, start, end) for start, end in meta.buckets]
        if buckets:
            buckets[-1] = Call(buckets[-1].path, {**(buckets[-1].body or {}), **last})
        if self.version < SESSION_SINCE:
            return UpdatePlan(buckets=buckets)
        return UpdatePlan([Call("/begin_weight_update", {})], buckets, [Call("/end_weight_update", {})])

    def _adapter_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        """Unloading waits for those who use the adapter. Each loading has prefixes of its own in the cache."""
        if pause_mode != "abort":
            raise ConfigError(ADAPTER_NEEDS_ABORT.format(pause_mode, "SGLang"))
        name = meta.adapter or ""
        stamp = {"new_version": str(meta.version), "abort_all_requests": False}
        unload = replace(self.unload_lora_call(name), may_be_refused=True)  # it is not there before the first update
        return UpdatePlan(after=[unload, self.lora_call(name, meta.path), Call("/update_weight_version", stamp)])

    def _bucket_call(self, meta: WeightUpdateMeta, start: int, end: int) -> Call:
        body: dict[str, Any] = {"load_format": "flattened_bucket", "flush_cache": False}
        slots = meta.slots[start:end]
        names, dtypes, shapes = zip(*((s.name, s.dtype, list(s.shape)) for s in slots), strict=True)
        body |= {"group_name": meta.group, "names": list(names), "dtypes": list(dtypes), "shapes": list(shapes)}
        return Call("/update_weights_from_distributed", body)

    def parse_receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        for answer in answers:
            if not isinstance(answer, dict) or answer.get("success") is not True:
                raise WeightSyncError(f"{server_id} did not take the weights of version {meta.version}: {answer}")
        return None


class NativeBackend(SGLangBackend):
    """The built-in server (`arealite serve`)."""

    name = "native"
    is_healthy_paused = True
    facts_paths: tuple[str, ...] = ()

    def detect(self, facts: Mapping[str, Any], server_id: str) -> NativeBackend:
        return self

    def update_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        """Everything is read and checked beside the live weights; the session's end swaps it in."""
        if meta.kind == "lora":
            swap = {"load_inplace": True, "weight_version": str(meta.version)}
            load = {"lora_name": meta.adapter, "lora_path": meta.path, **swap}
            return UpdatePlan(after=[Call("/load_lora_adapter", load)], is_staged=True)
        before, buckets = [Call("/begin_weight_update", {})], []
        if meta.kind == "disk":
            before.append(Call("/update_weights_from_disk", {"model_path": meta.path, "flush_cache": False}))
        elif meta.kind == "shm":
            slots = [as_record(slot) for slot in meta.slots]
            before.append(Call("/update_weights_from_shm", {"path": meta.path, "slots": slots, "flush_cache": False}))
        else:
            buckets = [self._bucket_call(meta, start, end) for start, end in meta.buckets]
        swap = {
            "weight_version": str(meta.version),
            "flush_cache": pause_mode != "in_place",
            "checksum_names": sorted(meta.checksums),
        }
        return UpdatePlan(before, buckets, [Call("/end_weight_update", swap)], is_staged=True)

    def parse_receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        super().parse_receipt(answers, meta, server_id)
        checksums = answers[-1].get("checksums")
        if not isinstance(checksums, dict):
            raise WeightSyncError(f"{server_id} took version {meta.version} without checksums of its parameters")
        return {name: int(value) for name, value in checksums.items()}


def _check_error(finish: dict[str, Any], server_id: str) -> None:
    """An abort with an error class is the server's failure (NaN logits, say), not an interruption to go on from."""
    if finish["type"] == "abort" and finish.get("err_type"):
        raise RequestError(f"{server_id} ended the request with {finish['err_type']}: {finish.get('message')}")


def _version(text: str) -> tuple[int, ...]:
    """(0, 5, 10) of "0.5.10.post1"; empty when it does not begin with a number."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
