"""One token per row from the model's logits, with its logprob. Called by the engine thread after each forward pass.

The randomness of a request is a stream of its own: the token at absolute position i uses a uniform number that is a
function of (seed, i) only, so a request that is stopped and sent again with its tokens appended goes on as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from arealite.inference.core.layout import to_device
from arealite.inference.requests import SamplingParams
from arealite.kernels.cpu import Kernels
from arealite.kernels.functions import for_device

if TYPE_CHECKING:
    from arealite.kernels.gpu import GpuKernels

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
    numbers: list[float] = uniforms_of(_words(seeds), _words(positions)).tolist()
    return numbers


def uniforms_of(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The same of arrays, the seeds uint64."""
    state = _mix(seeds * _GOLDEN + np.uint64(0x632BE59BD9B4E019))
    numbers: np.ndarray = (_mix(state + positions.astype(np.uint64) * _GOLDEN) >> np.uint64(11)) * 2.0**-53
    return numbers


def _words(numbers: Iterable[int]) -> np.ndarray:
    """Modulo 2**64."""
    return np.array([number & _MASK for number in numbers], np.uint64)


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
    restricted = [i for i, p in enumerate(params) if p.is_restricted]
    compiled = for_device(logits.device)
    if compiled is not None and not isinstance(compiled, Kernels):
        return _sample_on_gpu(compiled, logits, params, uniforms, restricted)
    if compiled is None or logits.dtype == torch.float16 or len(restricted) == len(params):
        return _sample(logits, params, uniforms)
    drawn = Sampled(*compiled.sample(logits.contiguous(), [p.temperature for p in params], uniforms))
    if restricted:
        again = _sample(logits[restricted], [params[i] for i in restricted], [uniforms[i] for i in restricted])
        for i, token, logprob in zip(restricted, again.tokens, again.logprobs, strict=True):
            drawn.tokens[i], drawn.logprobs[i] = token, logprob
        drawn.cut.update((restricted[i], cut) for i, cut in again.cut.items())
    return drawn


def _sample_on_gpu(
    kernels: GpuKernels,
    logits: torch.Tensor,
    params: list[SamplingParams],
    uniforms: list[float],
    restricted: list[int],
) -> Sampled:
    """The same by the kernels, which do not wait; and PyTorch for restricted rows."""
    arrays = [np.array([p.temperature for p in params], np.float32), np.array(uniforms), np.array(restricted, np.int64)]
    temperature, at, rows = to_device(arrays, logits.device)
    tokens, logprobs, ok = kernels.sample(logits, temperature, at)
    cut = torch.zeros_like(at)
    if restricted:
        weights = logits[rows].float().div_(temperature[rows, None])
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        total = weights.sum(-1, dtype=torch.float64)
        drawn, kept = _restricted(weights, total, [params[i] for i in restricted], at[rows])
        shares = weights.gather(1, drawn[:, None])[:, 0].double() / total
        tokens[rows], logprobs[rows], cut[rows] = drawn, shares.log().float(), (1 - kept).clamp(min=0)
    return read_drawn(pack_drawn(tokens, logprobs, ok, cut).cpu(), restricted)


def pack_drawn(tokens: torch.Tensor, logprobs: torch.Tensor, ok: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """All of one step in one tensor, float64 [4, B], to be read by `read_drawn` on the host."""
    return torch.stack([tokens.double(), logprobs.double(), ok.double(), cut])


def read_drawn(packed: torch.Tensor, restricted: list[int]) -> Sampled:
    """Of `pack_drawn`; `restricted` rows have a share that is left out."""
    tokens, logprobs, ok, cut = packed.numpy()
    return Sampled(
        tokens.astype(np.int64).tolist(), logprobs.tolist(), (ok > 0).tolist(), {i: float(cut[i]) for i in restricted}
    )


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
    restricted = [i for i, p in enumerate(params) if p.is_restricted]
    if restricted:
        rows = torch.tensor(restricted).to(logits.device)
        own = [params[i] for i in restricted]
        tokens[rows], kept[rows] = _restricted(scores[rows], total[rows], own, at[rows])
    logprobs = scores.gather(1, tokens[:, None])[:, 0].double().log() - total.log()
    ok = torch.isfinite(total) & torch.isfinite(top)
    return read_drawn(pack_drawn(tokens, logprobs, ok, (1 - kept).clamp(min=0)).cpu(), restricted)


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
    weights: torch.Tensor, total: torch.Tensor, params: list[SamplingParams], at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse CDF over the likeliest tokens of each row [B, V] that pass top-k, top-p and min-p; the tokens, and the
    share of the probability that these tokens have, both [B]. Where more than the first ones pass, all are sorted."""
    vocab = weights.shape[1]
    limits = [(min(p.top_k or vocab, vocab), p.top_p, p.min_p) for p in params]
    wanted, top_p, min_p = torch.tensor(limits, dtype=torch.float64).to(weights.device).unbind(1)
    most = max(num for num, _, _ in limits)
    tokens, kept, is_covered = _likeliest(min(most, NUM_LIKELIEST), weights, total, wanted, top_p, min_p, at)
    if most > NUM_LIKELIEST:
        for i in (~is_covered).nonzero()[:, 0].tolist():
            row = (x[i : i + 1] for x in (weights, total, wanted, top_p, min_p, at))
            tokens[i : i + 1], kept[i : i + 1], _ = _likeliest(most, *row)
    return tokens, kept


def _likeliest(
    num: int,
    weights: torch.Tensor,
    total: torch.Tensor,
    wanted: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    at: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same among the `num` likeliest of a row, and whether no other token would pass."""
    ordered, order = weights.topk(num)
    probs = ordered.double() / total[:, None]
    probs.masked_fill_(torch.arange(num, device=weights.device) >= wanted[:, None], 0)
    upto = probs.cumsum(-1)
    floor = min_p * probs[:, 0]
    is_covered = (wanted <= num) | (upto[:, -1] >= top_p) | ((min_p > 0) & (probs[:, -1] < floor))
    passed = (upto - probs < top_p[:, None]) & (probs >= floor[:, None])
    passed[:, 0] = True
    upto = (probs * passed).cumsum(-1)
    kept = upto[:, -1]
    target = torch.minimum(at * kept, torch.nextafter(kept, torch.zeros_like(kept)))
    place = torch.searchsorted(upto, target[:, None], right=True).clamp_(max=num - 1)
    return order.gather(1, place)[:, 0], kept, is_covered
