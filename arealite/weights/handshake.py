"""Proof that the servers hold the trainer's weights: checksums after every update, logprobs of a probe now and then.

Called by the train engine's `upload_weights` (verify) and by the trainer loop (compare_logprobs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arealite.api.errors import WeightSyncError
from arealite.api.types import WeightUpdateMeta


def verify(
    meta: WeightUpdateMeta,
    receipts: dict[str, dict[str, int]],
    previous: WeightUpdateMeta | None = None,
    must_differ: bool = False,
) -> None:
    """Every server's checksums equal the trainer's, and the update changed something where it had to.

    `receipts` maps server id to {tensor name: CRC-32 of the live parameter}. `must_differ`: an optimiser step with a
    learning rate above 0 lies between `previous` and `meta`.

    Raises:
        WeightSyncError: names the server and the tensors.
    """
    for server, confirmed in receipts.items():
        absent = [name for name in meta.checksums if name not in confirmed]
        if absent:
            raise WeightSyncError(
                f"{server} took weights of version {meta.version} without confirming {_listed(absent)};"
                " expected the checksum of each"
            )
        wrong = [name for name, value in meta.checksums.items() if confirmed[name] != value]
        if wrong:
            raise WeightSyncError(
                f"{server} holds other weights than the trainer after the update to version {meta.version}:"
                f" {_listed(wrong)} differ (CRC-32 {confirmed[wrong[0]]:08x}, trainer {meta.checksums[wrong[0]]:08x})."
                " Training on would be off-policy without anyone knowing; check weight names, dtype and server"
                " version"
            )
    if must_differ and previous is not None:
        common = meta.checksums.keys() & previous.checksums.keys()
        if common and all(meta.checksums[name] == previous.checksums[name] for name in common):
            raise WeightSyncError(
                f"the update from version {previous.version} to {meta.version} changed nothing:"
                f" {_listed(sorted(common))} are the same bytes although the optimiser made a step."
                " Either the trainer sends a stale copy, or the learning rate is too small to move a weight in the wire"
                " dtype"
            )


@dataclass(frozen=True)
class Mismatch:
    """|logp_train - logp_infer| over the generated tokens of a probe, both at temperature 1 and the same weights."""

    mean: float
    max: float
    num_tokens: int


def compare_logprobs(trainer: np.ndarray, server: np.ndarray, mask: np.ndarray) -> Mismatch:
    """`trainer`, `server`: float [T] logprobs of the same tokens; `mask`: bool [T] where both are defined.

    Raises:
        WeightSyncError: a logprob is NaN or infinite.
    """
    gap = np.abs(np.asarray(trainer, np.float64) - np.asarray(server, np.float64))[mask]
    if not np.isfinite(gap).all():
        raise WeightSyncError("a probe's logprob is NaN or infinite: look for NaN in the weights of trainer and server")
    return Mismatch(float(gap.mean()), float(gap.max()), gap.size) if gap.size else Mismatch(0.0, 0.0, 0)


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
