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
from arealite.rollout.backends.protocol import UNNAMED_VERSION, Backend, Call, Segment, UpdatePlan, token_versions

CHECKED_VERSION = (0, 5, 23)
SPANS_SINCE = (0, 5, 20)  # answers tell which weights made which token
SESSION_SINCE = (0, 5, 21)  # begin and end are asked for around updates by broadcast
STREAM_VERSION = (0, 5, 22)  # since then, stream_interval is part of the checked schema
NUM_EVENTS = 8  # of a stream at most: each holds all that went before
NUM_FOLLOWED_EVENTS = 256  # of one whose tokens are wanted as they come
MIN_EVENT_TOKENS = 32


class SGLangBackend(Backend):
    """SGLang as released. It cannot confirm single tensors: its updates have no receipt."""

    name, title = "sglang", "SGLang"
    expected_part = "output_ids and meta_info with finish_reason, as SGLang sends them"
    expected_scores = "input_token_logprobs"
    health_path = "/health"
    is_healthy_paused = False  # it samples a token
    has_whole_events = True
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

    def generate_call(
        self, request: GenerationRequest, wire_id: str, so_far: list[int], is_followed: bool = False
    ) -> Call:
        num_so_far = len(so_far)
        num_left = request.max_new_tokens - num_so_far
        interval = (
            max(1, num_left // NUM_FOLLOWED_EVENTS) if is_followed else max(MIN_EVENT_TOKENS, num_left // NUM_EVENTS)
        )
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
            "forced_ids": list(request.forced_ids[num_so_far:]),
            "skip_special_tokens": False,  # a stop string may be one
            # The server draws from (seed, absolute position): the same seed after an interruption is right.
            "sampling_seed": request.seed,
            "stream_interval": interval if self.streams else None,
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

    def _ids(self, answer: Any) -> list[int]:
        return [int(t) for t in answer["output_ids"]]

    def _part(self, answer: Any, server_id: str) -> Segment:
        notes = answer["meta_info"]
        token_ids = self._ids(answer)
        entries = notes.get("output_token_logprobs") or []  # with max_new_tokens=0 there is one without a token
        finish = notes["finish_reason"] or {"type": "abort"}  # null in a stream: as far as it came
        _check_error(finish, server_id)
        matched = finish.get("matched")
        spans, whole = notes.get("weight_versions") or [], notes.get("weight_version", UNNAMED_VERSION)
        return Segment(
            token_ids=token_ids,
            logprobs=[entry[0] for entry, token in zip(entries, token_ids, strict=False) if entry[1] == token],
            versions=token_versions(spans, whole, len(token_ids), server_id),
            finish_reason=finish["type"],
            matched=matched[0] if isinstance(matched, list) else matched,
            text=answer.get("text") or "",
            cut_mass=float(notes.get("cut_mass") or 0.0),  # the built-in server's
            num_cached=int(notes.get("cached_tokens") or 0),
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

    def _scores(self, answer: Any, server_id: str) -> list[Any]:
        _check_error(answer["meta_info"]["finish_reason"], server_id)
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]

    def abort_call(self, wire_id: str) -> Call:
        return _control("/abort_request", {"rid": wire_id})

    def pause_call(self, mode: str) -> Call:
        if mode != "abort" and self.version < SPANS_SINCE:
            raise ConfigError(
                f"rollout.pause_mode is {mode}, but SGLang {_text(self.version)} cannot tell which weights made which"
                f" token of a request that goes on after an update ({_text(SPANS_SINCE)} can): set"
                " rollout.pause_mode=abort"
            )
        return _control("/pause_generation", {"mode": mode})

    def resume_call(self) -> Call:
        return _control("/continue_generation", {})

    def lora_call(self, name: str, path: str) -> Call:
        return _control("/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload_lora_call(self, name: str) -> Call:
        return _control("/unload_lora_adapter", {"lora_name": name})

    def group_call(self, place: GroupPlace, rank: int) -> Call:
        body = {"master_address": place.address, "master_port": place.port, "rank_offset": rank}
        body |= {"world_size": place.world_size, "group_name": place.name, "backend": place.backend}
        return _control("/init_weights_update_group", body)

    def update_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        # In place, requests keep their KV cache, and SGLang refuses an update that would flush it.
        last = {"flush_cache": pause_mode != "in_place", "weight_version": str(meta.version)}
        if meta.kind == "disk":
            return UpdatePlan(after=[_control("/update_weights_from_disk", {"model_path": meta.path, **last})])
        if meta.kind == "lora":  # each loading has prefixes of its own in the cache
            stamp = {"new_version": str(meta.version), "abort_all_requests": False}
            return UpdatePlan(after=[*self._replace_lora(meta, pause_mode), _control("/update_weight_version", stamp)])
        if meta.kind == "shm":
            raise ConfigError(f"weight_update is {meta.kind!r}, which SGLang cannot read; set weight_update=disk")
        if self._num_stages > 1:
            raise ConfigError(
                f"weight_update is {meta.kind!r}, and SGLang with pp_size {self._num_stages} reads new weights only"
                " from disk: set weight_update=disk"
            )
        buckets = [self._bucket_call(meta, start, end) for start, end in meta.buckets]
        if buckets:
            buckets[-1] = _control(buckets[-1].path, {**(buckets[-1].body or {}), **last})
        if self.version < SESSION_SINCE:
            return UpdatePlan(buckets=buckets)
        return UpdatePlan([_control("/begin_weight_update", {})], buckets, [_control("/end_weight_update", {})])

    def _bucket_call(self, meta: WeightUpdateMeta, start: int, end: int) -> Call:
        body: dict[str, Any] = {"load_format": "flattened_bucket", "flush_cache": False}
        slots = meta.slots[start:end]
        names, dtypes, shapes = zip(*((s.name, s.dtype, list(s.shape)) for s in slots), strict=True)
        body |= {"group_name": meta.group, "names": list(names), "dtypes": list(dtypes), "shapes": list(shapes)}
        return _control("/update_weights_from_distributed", body)

    def parse_receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        for answer in answers:
            if not isinstance(answer, dict) or answer.get("success") is not True:
                raise WeightSyncError(f"{server_id} did not take the weights of version {meta.version}: {answer}")
        return None


class NativeBackend(SGLangBackend):
    """The built-in server (`arealite serve`)."""

    name, title = "native", "the built-in server"
    is_healthy_paused = forces_tokens = True
    facts_paths: tuple[str, ...] = ()

    def detect(self, facts: Mapping[str, Any], server_id: str) -> NativeBackend:
        return self

    def generate_call(
        self, request: GenerationRequest, wire_id: str, so_far: list[int], is_followed: bool = False
    ) -> Call:
        call = super().generate_call(request, wire_id, so_far, is_followed)
        return replace(call, body={**(call.body or {}), "stream_only_new": True}) if is_followed else call

    def _joined(self, so_far: Any, event: Any) -> Any:
        """Of events that have the tokens that are new; what they say of the whole answer, each says anew."""
        if so_far is None:
            return event
        logprobs = so_far["meta_info"]["output_token_logprobs"]
        logprobs += event["meta_info"]["output_token_logprobs"]
        so_far["output_ids"] += event["output_ids"]
        so_far["text"] += event["text"]
        so_far["meta_info"] = {**event["meta_info"], "output_token_logprobs": logprobs}
        return so_far

    def update_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        """Everything is read and checked beside the live weights; the session's end swaps it in."""
        if meta.kind == "lora":
            swap = {"load_inplace": True, "weight_version": str(meta.version)}
            load = {"lora_name": meta.adapter, "lora_path": meta.path, **swap}
            return UpdatePlan(after=[_control("/load_lora_adapter", load)], is_staged=True)
        before, buckets = [_control("/begin_weight_update", {})], []
        if meta.kind == "disk":
            before.append(_control("/update_weights_from_disk", {"model_path": meta.path, "flush_cache": False}))
        elif meta.kind == "shm":
            described = {"path": meta.path, "slots": [as_record(slot) for slot in meta.slots]}
            before.append(_control("/update_weights_from_shm", {**described, "flush_cache": False}))
        else:
            buckets = [self._bucket_call(meta, start, end) for start, end in meta.buckets]
        swap = {
            "weight_version": str(meta.version),
            "flush_cache": pause_mode != "in_place",
            "checksum_names": sorted(meta.checksums),
        }
        return UpdatePlan(before, buckets, [_control("/end_weight_update", swap)], is_staged=True)

    def parse_receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        super().parse_receipt(answers, meta, server_id)
        checksums = answers[-1].get("checksums")
        if not isinstance(checksums, dict):
            raise WeightSyncError(f"{server_id} took version {meta.version} without checksums of its parameters")
        return {name: int(value) for name, value in checksums.items()}


def _control(path: str, body: dict[str, Any]) -> Call:
    return Call(path, body, is_control=True)


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
