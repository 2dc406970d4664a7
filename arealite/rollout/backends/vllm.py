"""vLLM's wire protocol: tokens in, tokens out, with the routes of its development mode. Checked against vLLM 0.32.0.

Called through protocol.py. Its workers' end of weight updates is
weights/vllm_worker.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arealite.api.errors import ConfigError, WeightSyncError
from arealite.api.types import VLLM_WORKER_EXTENSION, GenerationRequest, GroupPlace, WeightUpdateMeta, as_record
from arealite.rollout.backends.protocol import (
    Backend,
    Call,
    Segment,
    UpdatePlan,
    token_versions,
    version_number,
)

VERSION, WEIGHTS = "/version", "/weight_info"
SETTINGS, ROUTES = "/server_info?config_format=json", "/openapi.json"
FLUSH = "/reset_prefix_cache?reset_running_requests=true"
GENERATE = "/inference/v1/generate"
LOGPROB_FLOOR = -9999.0  # what vLLM sends in place of -inf and NaN
SEED_STEP = 1_000_003
PAUSES = {
    "abort": "mode=abort&clear_cache=true",
    "retract": "mode=keep&clear_cache=true",  # the cache of kept requests is computed anew, with the new weights
    "in_place": "mode=keep&clear_cache=false",
}


class VLLMBackend(Backend):
    """vLLM with --enable-scale-out.

    `takes_seed`: on CPUs it does not, so sampling there is not reproducible: vLLM 0.32 ends with "CPU Generator does
    not use offset" once it computes the prompt of a request that has a seed in parts.
    """

    name, title = "vllm", "vLLM"
    expected_part = "choices with token_ids, logprobs and finish_reason, as vLLM sends them"
    expected_scores = "prompt_logprobs"
    health_path = "/health"
    is_healthy_paused = True
    has_whole_events = False
    version_path = WEIGHTS
    facts_paths: tuple[str, ...] = (VERSION, WEIGHTS, SETTINGS, ROUTES)
    id_format = "generate-tokens-{}"  # what vLLM calls a request that was sent under an id of ours

    def __init__(
        self, num_ranks: int = 1, has_extension: bool = True, takes_seed: bool = True, version: int = 0
    ) -> None:
        self.num_ranks = num_ranks
        self._has_extension = has_extension
        self._takes_seed = takes_seed
        self._version = version  # of the last update

    def detect(self, facts: Mapping[str, Any], server_id: str) -> VLLMBackend:
        version = facts.get(VERSION, {}).get("version", "unknown")
        wrong = f"{server_id} is vLLM {version} that cannot be used as it was started:"
        if SETTINGS not in facts:
            raise ConfigError(
                f"{wrong} it has no control routes (pause, weight updates); set VLLM_SERVER_DEV_MODE=1 for it"
            )
        settings = facts[SETTINGS]["vllm_config"]
        mode = settings["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ConfigError(
                f"{wrong} its logprobs are {mode!r}, those before the temperature; start it with --logprobs-mode"
                " processed_logprobs"
            )
        parallel = settings["parallel_config"]
        has_extension = parallel["worker_extension_cls"] == VLLM_WORKER_EXTENSION
        weights = version_number(facts[WEIGHTS]["weight_version"], server_id)
        kind = VLLMBackend if GENERATE in facts.get(ROUTES, {}).get("paths", {}) else VLLMCompletionsBackend
        return kind(parallel["world_size"], has_extension, settings["device_config"]["device"] != "cpu", weights)

    # -- requests ------------------------------------------------------------------------------------------------

    def generate_call(
        self, request: GenerationRequest, wire_id: str, so_far: list[int], is_followed: bool = False
    ) -> Call:
        tokens = [*request.input_ids, *so_far]
        sampling = _sampling(request, len(so_far))
        if request.seed is not None and self._takes_seed:
            # The server draws its numbers in order: after an interruption the same seed would draw the first ones again
            sampling["seed"] = (request.seed + SEED_STEP * len(so_far)) % 2**31
        call = self._sample_call(wire_id, tokens, sampling, request.lora)
        followed = {"stream": True, "stream_options": {"include_usage": True}}
        return replace(call, body={**(call.body or {}), **followed}) if is_followed else call

    def _joined(self, so_far: Any, event: Any) -> Any:
        """Of vLLM's events, each of which has what is new; only the last tells why it ended, and the versions."""
        ended = {"finish_reason": "abort", "stop_reason": None, "weight_versions": None}  # unless one says so
        whole = so_far or {"choices": [{"token_ids": [], "logprobs": {}, "text": "", **ended}]}
        whole["usage"] = event.get("usage") or whole.get("usage")
        [choice] = whole["choices"]
        for new in event["choices"]:  # none with the usage
            choice["token_ids"] += new["token_ids"] or []
            for key, entries in (new.get("logprobs") or {}).items():
                choice["logprobs"].setdefault(key, []).extend(entries or [])
            choice["text"] += new.get("text") or ""
            choice |= {key: new[key] for key in ended if new.get(key) is not None}
        return whole

    def _ids(self, answer: Any) -> list[int]:
        return [int(t) for t in answer["choices"][0]["token_ids"]]

    def score_call(self, tokens: list[int], wire_id: str, lora: str | None) -> Call:
        return self._sample_call(wire_id, tokens, {"max_tokens": 1, "prompt_logprobs": 0}, lora)

    def _sample_call(self, wire_id: str, tokens: list[int], sampling: dict[str, Any], lora: str | None) -> Call:
        body = {"request_id": wire_id, "token_ids": tokens, "sampling_params": sampling}
        return Call(GENERATE, body | ({"model": lora} if lora else {}))

    def _part(self, answer: Any, server_id: str) -> Segment:
        choice = answer["choices"][0]
        token_ids = self._ids(answer)
        logprobs = self._logprobs(choice) if token_ids else []
        known = [math.nan if value is None or value <= LOGPROB_FLOOR else value for value in logprobs]
        versions = self._versions(choice, len(token_ids), server_id)
        reason, matched = choice["finish_reason"], choice["stop_reason"]
        if reason == "stop" and matched is None and token_ids:
            matched = token_ids[-1]  # vLLM does not name the end-of-sequence token
        details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}  # of --enable-prompt-tokens-details
        cached = details.get("cached_tokens") or 0
        return Segment(token_ids, known, versions, reason, matched, choice.get("text") or "", num_cached=cached)

    def _scores(self, answer: Any, server_id: str) -> list[Any]:
        entries = self._prompt_logprobs(answer)
        return [0.0, *[next(iter(entry.values()))["logprob"] for entry in entries[1:]]]

    def _logprobs(self, choice: dict[str, Any]) -> list[float]:
        return [entry["logprob"] for entry in choice["logprobs"]["content"]]

    def _prompt_logprobs(self, answer: Any) -> list[Any]:
        return list(answer["prompt_logprobs"])

    def _versions(self, choice: dict[str, Any], num_tokens: int, server_id: str) -> list[int]:
        spans = choice["weight_versions"] or []  # none in a stream that was aborted
        return token_versions(spans, spans[-1]["version"] if spans else self._version, num_tokens, server_id)

    # -- control -------------------------------------------------------------------------------------------------

    def abort_call(self, wire_id: str) -> Call:
        return Call("/abort_requests", {"request_ids": [self.id_format.format(wire_id)]})

    def pause_call(self, mode: str) -> Call:
        return Call(f"/pause?{PAUSES[mode]}")

    def resume_call(self) -> Call:
        return Call("/resume")

    def lora_call(self, name: str, path: str) -> Call:
        return Call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, expects_json=False)

    def unload_lora_call(self, name: str) -> Call:
        return Call("/v1/unload_lora_adapter", {"lora_name": name}, expects_json=False)

    def group_call(self, place: GroupPlace, rank: int) -> Call:
        return _on_workers("arealite_join", rank_offset=rank, **as_record(place))

    def update_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        if meta.kind == "lora":
            return self._adapter_plan(meta, pause_mode)
        if meta.kind != "disk" and not self._has_extension:
            raise ConfigError(
                f"weight_update is {meta.kind!r}, which this vLLM server cannot read: set weight_update=disk, or start"
                f" it with --worker-extension-cls {VLLM_WORKER_EXTENSION}"
            )
        # Requests that are kept in place keep their cache; otherwise nothing computed by the old weights may stay.
        flush = [] if pause_mode == "in_place" else [Call(FLUSH)]
        stamp = [*flush, Call("/update_weight_version", {"new_version": str(meta.version)})]
        if not self._has_extension:
            return UpdatePlan(after=[_on_workers("reload_weights", weights_path=meta.path), *stamp])
        confirmed = sorted(meta.checksums)
        if meta.kind != "distributed":
            record = {"kind": meta.kind, "version": meta.version, "path": meta.path}
            slots = [as_record(slot) for slot in meta.slots]
            load = _on_workers("arealite_load", **record, slots=slots, checksum_names=confirmed)
            return UpdatePlan(after=[load, *stamp])
        buckets = [
            _on_workers("arealite_receive", group=meta.group, slots=[as_record(s) for s in meta.slots[start:end]])
            for start, end in meta.buckets
        ]
        begin = _on_workers("arealite_begin", checksum_names=confirmed)
        return UpdatePlan([begin], buckets, [_on_workers("arealite_end"), *stamp])

    def _adapter_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        """Requests remember the folder that their adapter came from, so those that were queued since the pause go too.
        The cache knows adapters by name alone."""
        stamp = Call("/update_weight_version", {"new_version": str(meta.version)})
        end_queued = Call("/abort_requests", {})
        return UpdatePlan(after=[*self._replace_lora(meta, pause_mode), end_queued, Call(FLUSH), stamp])

    def parse_receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        """Checksums of the tensors as they reached the loaders: the live ones are fused, sharded or repacked."""
        receipt = self._receipt(answers, meta, server_id)
        self._version = meta.version
        return receipt

    def _receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        if meta.kind == "lora":  # it has no answer that tells the adapter's numbers
            return None
        receipt: dict[str, int] | None = None
        for answer in answers:
            if not isinstance(answer, dict) or answer.get("success") is False:
                raise WeightSyncError(f"{server_id} did not take the weights of version {meta.version}: {answer}")
            for result in answer.get("results", []):
                if not isinstance(result, dict) or "checksums" not in result:
                    continue
                if result["absent"]:
                    raise WeightSyncError(
                        f"{server_id} found no weights of version {meta.version} for {', '.join(result['absent'][:4])}"
                        f" ({len(result['absent'])} parameters): the update must name every parameter of the model"
                    )
                receipt = {name: int(value) for name, value in result["checksums"].items()}
        return receipt


class VLLMCompletionsBackend(VLLMBackend):
    """vLLM without --enable-scale-out: by /v1/completions, whose answers do not tell the weight version. A request
    then must not outlive the weights that it was started with, so that only pause_mode=abort will do."""

    id_format = "cmpl-{}-0"

    def _sample_call(self, wire_id: str, tokens: list[int], sampling: dict[str, Any], lora: str | None) -> Call:
        # Without it, the model's generation_config would have its say.
        body = {"request_id": wire_id, "prompt": tokens, "repetition_penalty": 1.0, "return_token_ids": True}
        return Call("/v1/completions", body | sampling | ({"model": lora} if lora else {}))

    def _logprobs(self, choice: dict[str, Any]) -> list[float]:
        return list(choice["logprobs"]["token_logprobs"])

    def _prompt_logprobs(self, answer: Any) -> list[Any]:
        return list(answer["choices"][0]["prompt_logprobs"])

    def _versions(self, choice: dict[str, Any], num_tokens: int, server_id: str) -> list[int]:
        return [self._version] * num_tokens

    def pause_call(self, mode: str) -> Call:
        if mode != "abort":
            raise ConfigError(
                f"rollout.pause_mode is {mode}, but this vLLM server cannot tell which weights made which token: start"
                " it with --enable-scale-out, or set rollout.pause_mode=abort"
            )
        return super().pause_call(mode)


def _sampling(request: GenerationRequest, num_so_far: int) -> dict[str, Any]:
    """vLLM's sampling parameters for the tokens after the first `num_so_far`."""
    return {
        "max_tokens": request.max_new_tokens - num_so_far,
        "min_tokens": max(0, request.min_new_tokens - num_so_far),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": max(0, request.top_k),  # 0 is all
        "min_p": request.min_p,
        "stop": list(request.stop),
        "stop_token_ids": list(request.stop_token_ids),
        "ignore_eos": request.ignore_eos,
        "skip_special_tokens": False,  # a stop string may be one
        "logprobs": 0,  # the sampled token's own
    }


def _on_workers(method: str, **arguments: Any) -> Call:
    """Calls a method of every worker process of the server."""
    return Call("/collective_rpc", {"method": method, "kwargs": arguments})
