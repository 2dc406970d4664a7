"""One token per row from the model's logits, with its logprob. Called by the engine thread after each forward pass.

The randomness of a request is a stream of its own: the token at absolute position i uses a uniform number that is a
function of (seed, i) only, so a request that is stopped and sent again with its tokens appended goes on as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from arealite.devices import is_gpu
from arealite.inference.core.layout import to_device
from arealite.inference.core.requests import SamplingParams
from arealite.kernels.functions import for_device

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
    is computed by itself: its result does not depend on the other rows. The kernels of a GPU do not wait.

    Args:
        logits: [B, V], any float dtype; not changed.
        params: B entries.
        uniforms: B numbers in [0, 1); not looked at for greedy rows.
    """
    restricted = [i for i, p in enumerate(params) if p.is_restricted]
    arrays = [np.array([p.temperature for p in params], np.float32), np.array(uniforms), np.array(restricted, np.int64)]
    temperature, at, rows = to_device(arrays, logits.device)
    kernels = for_device(logits.device)
    if kernels is None or (logits.dtype == torch.float16 and not is_gpu(logits)):
        tokens, logprobs, ok = _draw(logits, temperature, at)
    else:
        tokens, logprobs, ok = kernels.sample(logits, temperature, at)
    cut = torch.zeros_like(at)
    if restricted:
        weights = _weights(logits[rows], temperature[rows])
        total = _totals(weights)
        drawn, kept = _restricted(weights, total, [params[i] for i in restricted], at[rows])
        shares = weights.gather(1, drawn[:, None])[:, 0].double() / total
        tokens[rows], logprobs[rows], cut[rows] = drawn, shares.log().to(logprobs), (1 - kept).clamp(min=0)
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


def _weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """exp of the distance to the row's largest logit / temperature; float32 [B, V]."""
    scores = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    return scores.sub_(scores.amax(-1, keepdim=True)).exp_()


def _totals(weights: torch.Tensor) -> torch.Tensor:
    """Float64 [B] sums of rows, on a CPU row by row: threads share one sum in a way that depends on the rows beside."""
    if is_gpu(weights):
        return weights.sum(-1, dtype=torch.float64)
    return torch.stack([row.sum(dtype=torch.float64) for row in weights])


def _draw(
    logits: torch.Tensor, temperature: torch.Tensor, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As GpuKernels.sample, in PyTorch: the token whose share of the cumulative weight holds `at`."""
    weights = _weights(logits, temperature)
    upto = weights.cumsum(-1, dtype=torch.float64)
    total = upto[:, -1]
    # Rounding may leave the target at the end: the last token that has weight is meant then.
    target = torch.minimum(at * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(upto, target[:, None], right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    tokens = torch.where(temperature > 0, drawn, logits.argmax(-1))
    logprobs = weights.gather(1, tokens[:, None])[:, 0].double().log() - total.log()
    return tokens, logprobs, torch.isfinite(total)


def _restricted(
    weights: torch.Tensor, total: torch.Tensor, params: list[SamplingParams], at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse CDF over the likeliest tokens of each row [B, V] that pass top-k, top-p and min-p; the tokens, and the
    share of the probability that these tokens have, both [B]. Where more than the first ones pass, all are sorted."""
    vocab = weights.shape[1]
    limits = [(min(p.top_k or vocab, vocab), p.top_p, p.min_p) for p in params]
    [bounds] = to_device([np.array(limits, np.float64)], weights.device)
    most = max(num for num, _, _ in limits)
    tokens, kept, is_covered = _likeliest(min(most, NUM_LIKELIEST), weights, total, bounds, at)
    if most > NUM_LIKELIEST:
        for i in (~is_covered).nonzero()[:, 0].tolist():
            row = (x[i : i + 1] for x in (weights, total, bounds, at))
            tokens[i : i + 1], kept[i : i + 1], _ = _likeliest(most, *row)
    return tokens, kept


def _likeliest(
    num: int, weights: torch.Tensor, total: torch.Tensor, bounds: torch.Tensor, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same among the `num` likeliest of a row, and whether no other token would pass. `bounds` [B, 3]: top-k,
    top-p, min-p."""
    wanted, top_p, min_p = bounds.unbind(1)
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
