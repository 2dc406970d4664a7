"""Proof that the servers hold the trainer's weights: checksums after every update, logprobs of a probe now and then.

Called by the train engine's `upload_weights` (verify) and by the training loop (MismatchGuard).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from arealite.api.errors import WeightSyncError
from arealite.api.types import Batch, WeightUpdateMeta

if TYPE_CHECKING:
    from arealite.api.cli_args import StatsLoggerConfig
    from arealite.api.engine import InferenceEngine, TrainEngine

logger = logging.getLogger(__name__)

NUM_PROBE_SEQUENCES = 4


def verify(
    meta: WeightUpdateMeta,
    receipts: dict[str, dict[str, int]],
    previous: WeightUpdateMeta | None = None,
    must_differ: bool = False,
) -> None:
    """Every server's checksums equal the trainer's, and the update changed something where it had to.

    `receipts` maps server id to {tensor name: CRC-32 of the live parameter}. `must_differ`: an optimiser step lies
    between `previous` and `meta`, and its effect is no smaller than the rounding to the wire dtype.

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
    if must_differ and previous is not None and (same := unchanged(meta, previous)):
        raise WeightSyncError(
            f"the update from version {previous.version} to {meta.version} changed nothing: {_listed(list(same))} are"
            " the same bytes although the optimiser made a step that shows in the trainer's weights: the copy is stale"
        )


def unchanged(meta: WeightUpdateMeta, previous: WeightUpdateMeta) -> dict[str, int]:
    """{tensor: CRC-32} of those whose checksums both have, if all of them are the same; else none."""
    common = {name: meta.checksums[name] for name in sorted(meta.checksums.keys() & previous.checksums.keys())}
    return common if all(previous.checksums[name] == value for name, value in common.items()) else {}


class MismatchGuard:
    """Compares trainer and servers on the same tokens and the same weights, now and then.

    Two comparisons: what the servers' prefill gives a few trajectories of the batch (at temperature 1), and what they
    recorded when they sampled those tokens, for the tokens that the current version produced. Of an answer's first
    `min_new_tokens` servers record the logprobs of a distribution without its stop tokens, which is not the trainer's:
    these are left out.
    """

    def __init__(self, config: StatsLoggerConfig, min_new_tokens: int = 0) -> None:
        self._every = config.probe_every_steps
        self._min_new_tokens = min_new_tokens
        self._warn, self._stop = config.mismatch_warn, config.mismatch_stop

    def check(self, step: int, batch: Batch, actor: TrainEngine, rollout: InferenceEngine) -> dict[str, float]:
        """Call between `prepare_batch` and the update. Collective; nothing ({}) when it is not due.

        Returns mismatch_mean and mismatch_max of |logp_train - logp_infer| (natural log).

        Raises:
            WeightSyncError: on all ranks, the mean is above `mismatch_stop`, or a logprob is NaN or infinite.
        """
        if not self._every or step % self._every:
            return {}
        shares = None
        if actor.collective.rank == 0:
            none, probe = (batch.select(list(range(min(n, batch.num_sequences)))) for n in (0, NUM_PROBE_SEQUENCES))
            shares = [probe, *[none] * (actor.collective.num_shares - 1)]
        part = actor.collective.scatter(shares)  # ranks that compute one sequence together need the same ones
        ours = np.concatenate([actor.compute_logp(part, temperature=1.0), actor.compute_logp(part)])

        def compare() -> dict[str, float]:
            rows = [row.tolist() for row in np.split(part.tokens, part.cu_seqlens[1:-1])]
            scored = [logp for row in (rollout.score(rows) if part.num_sequences else []) for logp in row]
            version = rollout.get_version()
            fresh = part.loss_mask & (part.versions == version) & (places_in_answers(part) >= self._min_new_tokens)
            theirs = np.concatenate([np.asarray(scored, np.float64), part.logprobs])
            return self._judge(
                logprob_gap(ours, theirs, np.concatenate([part.loss_mask, fresh])), rollout.get_version()
            )

        found: dict[str, float] = actor.collective.on_head(compare)
        return found

    def _judge(self, gap: np.ndarray, version: int) -> dict[str, float]:
        if not gap.size:
            return {}
        mean = float(gap.mean())
        told = f"trainer and server logprobs of {gap.size} tokens differ by {mean:.4f} on average at version {version}"
        if self._stop is not None and mean > self._stop:
            raise WeightSyncError(
                f"{told}; stats_logger.mismatch_stop allows {self._stop}. Compare server.dtype with actor.dtype, and"
                " the server's logprob temperature"
            )
        if mean > self._warn:
            logger.warning("%s; expected at most %g (stats_logger.mismatch_warn)", told, self._warn)
        return {"mismatch_mean": mean, "mismatch_max": float(gap.max())}


def places_in_answers(batch: Batch) -> np.ndarray:
    """int64 [T]: of each generated token the number of those right before it; -1 elsewhere. The first token of a
    sequence is never generated, so that answers are apart."""
    index = np.arange(len(batch.tokens))
    begins = np.maximum.accumulate(np.where(batch.loss_mask, 0, index + 1))
    return np.where(batch.loss_mask, index - begins, -1)


def logprob_gap(trainer: np.ndarray, server: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """|trainer - server| where `mask` (bool [T]) is True; `trainer`, `server`: float [T] logprobs of the same tokens.

    Raises:
        WeightSyncError: a logprob is NaN or infinite.
    """
    gap: np.ndarray = np.abs(np.asarray(trainer, np.float64) - np.asarray(server, np.float64))[mask]
    if not np.isfinite(gap).all():
        raise WeightSyncError("a probe's logprob is NaN or infinite: look for NaN in the weights of trainer and server")
    return gap


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
