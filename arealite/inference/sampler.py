"""One token per row from the model's logits, with its logprob. Called by the engine thread after each forward pass.

The randomness of a request is a stream of its own: the token at absolute position i uses a uniform number that is a
function of (seed, i) only, so a request that is stopped and sent again with its tokens appended goes on as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from arealite.inference.requests import SamplingParams
from arealite.kernels import cpu

BLOCK = 256  # the inverse CDF is searched block by block, then within one block
NUM_LIKELIEST = 1024  # candidates that are sorted first; the whole row only where a nucleus holds more
_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sampled:
    """One entry per row. A row whose logits were not finite has `ok` False; its other entries mean nothing. `cut` maps
    restricted rows to the share of the probability that top-k, top-p and min-p leave out."""

    tokens: list[int]
    logprobs: list[float]
    ok: list[bool]
    cut: dict[int, float] = field(default_factory=dict)


def uniform_numbers(seeds: Iterable[int], positions: Iterable[int]) -> list[float]:
    """Numbers in [0, 1), each from a seed and an absolute position: splitmix64 (Steele, Lea, Flood 2014) of both."""
    state = _mix(_words(seeds) * _GOLDEN + np.uint64(0x632BE59BD9B4E019))
    mixed: list[float] = ((_mix(state + _words(positions) * _GOLDEN) >> np.uint64(11)) * 2.0**-53).tolist()
    return mixed


def _words(numbers: Iterable[int]) -> np.ndarray:
    """Modulo 2**64."""
    return np.fromiter((number & _MASK for number in numbers), np.uint64)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> Sampled:
    """Draw from softmax(logits / temperature), restricted by top-k, top-p and min-p.

    The logprob is that of the full vocabulary after temperature (temperature 1 where greedy), not renormalised over
    the restriction. Each restriction is taken on that full distribution, and their intersection is sampled. Every row
    is computed by itself: its result does not depend on the other rows.

    Args:
        logits: [B, V], any float dtype; not changed.
        params: B entries.
        uniforms: B numbers in [0, 1); not looked at for greedy rows.
    """
    restricted = [i for i, p in enumerate(params) if p.temperature > 0 and (p.top_k or p.top_p < 1 or p.min_p > 0)]
    compiled = cpu.load() if logits.device.type == "cpu" and logits.dtype != torch.float16 else None
    if compiled is None or len(restricted) == len(params):
        return _sample(logits, params, uniforms)
    drawn = Sampled(*compiled.sample(logits.contiguous(), [p.temperature for p in params], uniforms))
    if restricted:
        again = _sample(logits[restricted], [params[i] for i in restricted], [uniforms[i] for i in restricted])
        for i, token, logprob in zip(restricted, again.tokens, again.logprobs, strict=True):
            drawn.tokens[i], drawn.logprobs[i] = token, logprob
        drawn.cut.update((restricted[i], cut) for i, cut in again.cut.items())
    return drawn


def _sample(logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> Sampled:
    """The same in PyTorch."""
    num_rows, vocab = logits.shape
    # One temporary of the size of the logits, padded to whole blocks: fp32 logits, then weights relative to the max.
    weights = torch.zeros(num_rows, -(-vocab // BLOCK) * BLOCK, dtype=torch.float32, device=logits.device)
    scores = weights[:, :vocab]
    scores.copy_(logits)
    temperatures = [p.temperature or 1.0 for p in params]
    if any(t != 1.0 for t in temperatures):
        scores.div_(torch.tensor(temperatures, device=logits.device)[:, None])
    top, best = scores.max(-1)
    scores.sub_(top[:, None]).exp_()
    block_sums = weights.view(num_rows, -1, BLOCK).sum(-1, dtype=torch.float64)
    total = block_sums.sum(-1)
    at = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    tokens = best
    if any(p.temperature > 0 for p in params):
        greedy = torch.tensor([p.temperature == 0 for p in params], device=logits.device)
        tokens = torch.where(greedy, best, _inverse_cdf(weights, block_sums, at, vocab))
    kept = torch.ones_like(total)
    restricted = [i for i, p in enumerate(params) if p.temperature > 0 and (p.top_k or p.top_p < 1 or p.min_p > 0)]
    for i in restricted:
        tokens[i], kept[i] = _restricted(scores[i], total[i], params[i], uniforms[i])
    logprobs = scores.gather(1, tokens[:, None])[:, 0].double().log() - total.log()
    ok = torch.isfinite(total) & torch.isfinite(top)
    packed = torch.stack([tokens.double(), logprobs, ok.double(), (1 - kept).clamp(min=0)]).cpu().numpy()
    cut = {i: float(packed[3, i]) for i in restricted}
    return Sampled(packed[0].astype(np.int64).tolist(), packed[1].tolist(), (packed[2] > 0).tolist(), cut)


def _inverse_cdf(weights: torch.Tensor, block_sums: torch.Tensor, at: torch.Tensor, vocab: int) -> torch.Tensor:
    """The token whose share of the cumulative weight holds `at`; [B]. Two searches: over blocks, then in one block."""
    num_rows, num_blocks = block_sums.shape
    upto = block_sums.cumsum(-1)
    target = at * upto[:, -1]
    block = torch.searchsorted(upto, target[:, None], right=True)[:, 0].clamp_(max=num_blocks - 1)
    rows = torch.arange(num_rows, device=weights.device)
    inside = weights.view(num_rows, num_blocks, BLOCK)[rows, block].double().cumsum(-1)
    left = target - (upto[rows, block] - block_sums[rows, block])
    # Rounding may leave the target at or past the block's end: the last token that has weight is meant then.
    target = torch.minimum(left, torch.nextafter(inside[:, -1], torch.zeros_like(left))).clamp_(min=0)
    return (block * BLOCK + torch.searchsorted(inside, target[:, None], right=True)[:, 0]).clamp_(max=vocab - 1)


def _restricted(
    weights: torch.Tensor, total: torch.Tensor, params: SamplingParams, at: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse CDF over the likeliest tokens of one row [V] that pass top-k, top-p and min-p; the token, and the share
    of the probability that these tokens have."""
    vocab = weights.shape[0]
    wanted = min(params.top_k or vocab, vocab)
    num = min(wanted, NUM_LIKELIEST)
    ordered, order = weights.topk(num)
    probs = ordered.double() / total
    upto = probs.cumsum(-1)
    covered = upto[-1] >= params.top_p or (params.min_p > 0 and probs[-1] < params.min_p * probs[0])
    if num < wanted and not covered:
        ordered, order = weights.topk(wanted)
        probs = ordered.double() / total
        upto = probs.cumsum(-1)
    kept = (upto - probs < params.top_p) & (probs >= params.min_p * probs[0])
    kept[0] = True
    upto = (probs * kept).cumsum(-1)
    target = torch.minimum(at * upto[-1], torch.nextafter(upto[-1], torch.zeros_like(upto[-1])))
    return order[torch.searchsorted(upto, target.reshape(1), right=True)[0]], upto[-1]
