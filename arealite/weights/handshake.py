"""Proof that trainer and servers compute the same: logprobs of the same tokens by both, now and then, in the training
loop. That the servers hold the trainer's weights is checked after every update, by link.py's `verify`.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from arealite.api.errors import WeightSyncError
from arealite.api.types import Batch, Completion, GenerationRequest, Group, Task, Trajectory

if TYPE_CHECKING:
    from arealite.api.cli_args import GenerationHyperparameters
    from arealite.api.protocols import InferenceEngine, Scorer
    from arealite.api.run_args import StatsLoggerConfig

logger = logging.getLogger(__name__)

NUM_PROBE_SEQUENCES = 4
NUM_PROBE_TOKENS = 16  # of an answer that is sampled for the probe alone


class MismatchGuard:
    """Compares trainer and servers on the same tokens and the same weights, now and then.

    Two comparisons: what the servers' prefill gives a few trajectories of the batch (at temperature 1), and what they
    recorded when they sampled those tokens, for the tokens that the current version produced. Where a batch has none of
    these (its groups are older when the servers run ahead) a few are sampled. Of an answer's first `min_new_tokens`
    servers record the logprobs of a distribution without its stop tokens, which is not the trainer's: these are left
    out. `gconfig`: the sampling of training answers.
    """

    def __init__(self, config: StatsLoggerConfig, gconfig: GenerationHyperparameters) -> None:
        self._every = config.probe_every_steps
        self._gconfig = gconfig
        self._warn, self._stop = config.mismatch_warn, config.mismatch_stop
        cut = {"top_p": gconfig.top_p < 1, "top_k": gconfig.top_k > 0, "min_p": gconfig.min_p > 0}
        if any(cut.values()):
            logger.warning(
                "gconfig.%s restricts what is sampled, while logprobs are recorded and trained over the full vocabulary"
                " (vLLM records what is left): the policy that is learned is not the one that sampled. The metric"
                " cut_mass_mean is the share of probability cut, with the built-in server",
                ", gconfig.".join(name for name, is_on in cut.items() if is_on),
            )

    def check(self, step: int, batch: Batch, actor: Scorer, rollout: InferenceEngine) -> dict[str, float]:
        """Call between `prepare_batch` and the update. Collective; nothing ({}) when it is not due.

        Returns mismatch_mean and mismatch_max of |logp_train - logp_infer| (natural log), and how many tokens were
        compared as they were sampled.

        Raises:
            WeightSyncError: on all ranks, the mean is above `mismatch_stop`, or a logprob is NaN or infinite.
        """
        if not self._every or step % self._every:
            return {}
        # Ranks that compute one sequence together need the same ones; the others have none.
        probe, num_forced = actor.collective.on_head(lambda: self._probe(batch, rollout))
        shares = [probe, *[probe.select([])] * (actor.collective.num_shares - 1)]
        part = actor.collective.scatter(shares if actor.collective.rank == 0 else None)
        ours = np.concatenate([actor.compute_logp(part, temperature=1.0), actor.compute_logp(part)])

        def compare() -> dict[str, float]:
            rows = [row.tolist() for row in np.split(part.tokens, part.cu_seqlens[1:-1])]
            scored = [logp for row in (rollout.score(rows) if part.num_sequences else []) for logp in row]
            fresh = fresh_tokens(part, rollout.get_version(), num_forced)
            theirs = np.concatenate([np.asarray(scored, np.float64), part.logprobs])
            gap = logprob_gap(ours, theirs, np.concatenate([part.loss_mask, fresh]))
            if not fresh.any():
                logger.warning("step %d: of %d sequences no token was compared as sampled", step, part.num_sequences)
            return {"num_mismatch_sampled": float(fresh.sum()), **self._judge(gap, rollout.get_version())}

        found: dict[str, float] = actor.collective.on_head(compare)
        return found

    def _probe(self, batch: Batch, rollout: InferenceEngine) -> tuple[Batch, int]:
        """The sequences with the most fresh tokens, or new answers to their prompts; and after how many tokens an
        answer might end."""
        version, num_forced = rollout.get_version(), self._gconfig.min_new_tokens
        owner = batch.owners
        num_fresh = np.bincount(owner[fresh_tokens(batch, version, num_forced)], minlength=batch.num_sequences)
        probe = batch.select(np.argsort(-num_fresh, kind="stable")[:NUM_PROBE_SEQUENCES])
        if num_fresh.any() or not batch.num_sequences:
            return probe, num_forced
        g, requests = self._gconfig, []
        for i, (start, end) in enumerate(pairwise(probe.cu_seqlens.tolist())):
            prompt = probe.tokens[start : start + int(probe.loss_mask[start:end].argmax())].tolist()
            num = min(NUM_PROBE_TOKENS, g.max_new_tokens)
            rid = f"probe-{version}.{i}"
            requests.append(GenerationRequest(rid, prompt, num, 0, g.temperature, g.top_p, g.top_k, g.min_p))
        answers = rollout.sample(requests)
        return Batch.pack([Group(Task("probe", prompt=""), 0, list(map(_trajectory, requests, answers)))]), 0

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


def _trajectory(request: GenerationRequest, c: Completion) -> Trajectory:
    ids, n = request.input_ids, len(request.input_ids)
    mask, logprobs, versions = [False] * n + [True] * len(c.token_ids), [0.0] * n + c.logprobs, [-1] * n + c.versions
    return Trajectory(request.rid, 0, [*ids, *c.token_ids], mask, logprobs, versions, 0.0, c.finish_reason)


def fresh_tokens(batch: Batch, version: int, num_forced: int) -> np.ndarray:
    """bool [T]: tokens that the weights of `version` sampled, but for the first `num_forced` of each answer."""
    is_free: np.ndarray = places_in_answers(batch) >= num_forced
    return batch.loss_mask & (batch.versions == version) & is_free


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
