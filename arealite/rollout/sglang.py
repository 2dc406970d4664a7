"""SGLang's wire protocol, by the server's version. Checked against SGLang 0.5.10 to 0.5.23.

Called by generate.py, fleet.py and updates.py through backend.py; the built-in server's is native.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arealite.api.errors import ConfigError, RequestError, WeightSyncError
from arealite.api.types import GenerationRequest, WeightUpdateMeta
from arealite.rollout.backend import UNNAMED_VERSION, Call, Part, UpdatePlan, finite, token_versions


class SGLangBackend:
    """SGLang as released (a rollout.backend.Backend). It cannot confirm single tensors: its updates have no receipt."""

    name = "sglang"
    health_path = "/health"
    facts_paths: tuple[str, ...] = ("/server_info",)
    num_ranks = 1

    def detect(self, facts: Mapping[str, Any], server_id: str) -> SGLangBackend:
        return self

    def generate_call(self, request: GenerationRequest, wire_id: str, so_far: list[int]) -> Call:
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
        body = {
            "rid": wire_id,
            "input_ids": [*request.input_ids, *so_far],
            "sampling_params": {key: value for key, value in sampling.items() if value is not None and value != []},
            "return_logprob": True,
            "stream": False,
            "routing_key": request.group_id,
        }
        if request.lora:
            body["lora_path"] = request.lora  # SGLang's word for the adapter's name
        return Call("/generate", body)

    def parse_part(self, answer: Any, server_id: str) -> Part:
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
        )

    def score_call(self, tokens: list[int], wire_id: str) -> Call:
        body = {
            "rid": wire_id,
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
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
        return Call("/pause_generation", {"mode": mode})

    def resume_call(self) -> Call:
        return Call("/continue_generation", {})

    def lora_call(self, name: str, path: str) -> Call:
        return Call("/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload_lora_call(self, name: str) -> Call:
        return Call("/unload_lora_adapter", {"lora_name": name})

    def group_call(self, address: str, port: int, rank_offset: int, world_size: int, name: str, backend: str) -> Call:
        body = {"master_address": address, "master_port": port, "rank_offset": rank_offset, "world_size": world_size}
        return Call("/init_weights_update_group", {**body, "group_name": name, "backend": backend})

    def update_plan(self, meta: WeightUpdateMeta, pause_mode: str) -> UpdatePlan:
        if meta.kind != "disk":
            raise ConfigError(f"weight_update is {meta.kind!r}, which SGLang cannot read; set weight_update=disk")
        # In place, requests keep their KV cache, and SGLang refuses an update that would flush it.
        flush = pause_mode != "in_place"
        body = {"model_path": meta.path, "weight_version": str(meta.version), "flush_cache": flush}
        return UpdatePlan(after=[Call("/update_weights_from_disk", body)])

    def parse_receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        for answer in answers:
            if not isinstance(answer, dict) or answer.get("success") is not True:
                raise WeightSyncError(f"{server_id} did not take the weights of version {meta.version}: {answer}")
        return None


def _check_error(finish: dict[str, Any], server_id: str) -> None:
    """An abort with an error class is the server's failure (NaN logits, say), not an interruption to go on from."""
    if finish["type"] == "abort" and finish.get("err_type"):
        raise RequestError(f"{server_id} ended the request with {finish['err_type']}: {finish.get('message')}")
