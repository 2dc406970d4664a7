"""The built-in server's wire protocol: SGLang's, with shared memory and checksums of live parameters added.

Called by generate.py, fleet.py and updates.py through backend.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
        confirmed = {"checksum_names": sorted(meta.checksums)}
        if meta.kind == "shm":
            body = {
                "path": meta.path,
                "slots": [as_record(slot) for slot in meta.slots],
                "weight_version": str(meta.version),
                "flush_cache": pause_mode != "in_place",
            }
            return UpdatePlan(after=[Call("/update_weights_from_shm", {**body, **confirmed})])
        plan = super().update_plan(meta, pause_mode)
        *others, last = plan.after
        return replace(plan, after=[*others, replace(last, body={**(last.body or {}), **confirmed})])

    def parse_receipt(self, answers: list[Any], meta: WeightUpdateMeta, server_id: str) -> dict[str, int] | None:
        super().parse_receipt(answers, meta, server_id)
        checksums = answers[-1].get("checksums")
        if not isinstance(checksums, dict):
            raise WeightSyncError(f"{server_id} took version {meta.version} without checksums of its parameters")
        return {name: int(value) for name, value in checksums.items()}
