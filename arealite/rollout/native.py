"""The built-in server's wire protocol: SGLang's, with shared memory and checksums of live parameters added.

Called by generate.py, fleet.py and updates.py through backend.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arealite.api.errors import WeightSyncError
from arealite.api.types import WeightUpdateMeta, as_record
from arealite.rollout.backend import Call, UpdatePlan
from arealite.rollout.sglang import SGLangBackend


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
