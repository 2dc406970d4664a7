"""Logprobs of given tokens straight from hidden states, never a [tokens, vocabulary] array. For packed_model.py."""

from __future__ import annotations

from typing import Any

import torch

from arealite.devices import is_gpu
from arealite.kernels import functions
from arealite.kernels.cpu import Kernels, Scores

ROWS_IN_CACHE = 32  # logit rows that are worked on at one time: their float32 copy stays in the processor's cache
GPU_LOGITS = 1 << 27  # that exist at one time on a GPU: the products of fewer do not fill it
GPU_WIDTH = 128  # of slices of the vocabulary there: a multiple keeps rows aligned


class _TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`. The backward pass computes the logits again: of all rows for a slice of the vocabulary at a
    time, so that each slice of the weight has its gradient from one product."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        row_of: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, pairs = len(hidden), len(targets)
        logsum = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logsum)
        logp = torch.empty(pairs, dtype=torch.float32, device=hidden.device)
        # Pairs are sorted by row, so each block of rows owns one slice of them.
        first_pair = torch.searchsorted(row_of, torch.arange(rows + 1, device=row_of.device))
        scores = Scores(first_pair, targets, logsum, entropy, logp)
        kernels = _kernels_for(hidden, weight)
        edges = first_pair.tolist() if kernels is None else []
        packed = kernels.pack([weight.contiguous()]) if isinstance(kernels, Kernels) else None
        for start in range(0, rows, chunk):
            part = hidden[start : start + chunk]
            if isinstance(kernels, Kernels) and packed is not None:
                logits = kernels.product(part, packed, None, len(weight))
            else:
                logits = functions.head_product(part, weight)
            if kernels is not None:
                kernels.score(logits, start, scores, temperature)
                continue
            for begin, block in _blocks(logits, start, temperature):
                stop = begin + len(block)
                span = slice(edges[begin], edges[stop])
                largest = block.amax(-1, keepdim=True)
                picked = block[row_of[span] - begin, targets[span]]
                block.sub_(largest)
                exponentials = block.exp()
                total = exponentials.sum(-1)
                logsum[begin:stop] = total.log() + largest[:, 0]
                logp[span] = picked - logsum[row_of[span]]
                # H = logsumexp(z) - sum(p * z), with z shifted by its maximum
                entropy[begin:stop] = total.log() - exponentials.mul_(block).sum(-1) / total
        ctx.save_for_backward(hidden, weight, row_of, targets, logsum, entropy, logp, first_pair)
        ctx.temperature, ctx.chunk, ctx.edges, ctx.kernels = temperature, chunk, edges, kernels
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, _, targets, logsum, entropy, logp, first_pair = ctx.saved_tensors
        if not len(hidden):  # a gradient of zeros all the same: FSDP sums over all ranks
            return torch.zeros_like(hidden), torch.zeros_like(weight), None, None, None, None
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight)
        grads = grad_logp.contiguous(), grad_entropy.contiguous()
        # As many logits at one time as in the forward pass.
        width = max(ctx.chunk * len(weight) // len(hidden), 1)
        if is_gpu(hidden):
            width = max(width // GPU_WIDTH * GPU_WIDTH, GPU_WIDTH)
        for first in range(0, len(weight), width):
            part = weight[first : first + width]
            logits = functions.head_product(hidden, part)
            slopes = logits if logits.dtype == hidden.dtype else torch.empty_like(logits, dtype=hidden.dtype)
            if ctx.kernels is None:
                _plain_grad(ctx, logits, slopes, first, grad_logp, grad_entropy)
            else:
                scores = Scores(first_pair, targets - first, logsum, entropy, logp, *grads)
                ctx.kernels.score_grad(logits, 0, scores, ctx.temperature, slopes)
            grad_hidden += functions.head_product(slopes, part.t())
            grad_weight[first : first + width] = functions.matmul(slopes.t(), hidden)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _kernels_for(hidden: torch.Tensor, weight: torch.Tensor) -> functions.AnyKernels | None:
    """Those that can read these tensors."""
    is_readable = functions.fits(hidden, weight, on=hidden.device.type) and hidden.shape[1] % 2 == 0
    return functions.for_device(hidden.device) if is_readable else None


def _plain_grad(
    ctx: Any,
    logits: torch.Tensor,
    slopes: torch.Tensor,
    first: int,
    grad_logp: torch.Tensor,
    grad_entropy: torch.Tensor,
) -> None:
    """Put the gradient of logits, those of the tokens from `first` on, into `slopes`, which may be the logits."""
    _, _, row_of, targets, logsum, entropy, _, _ = ctx.saved_tensors
    row_grad = torch.zeros_like(logsum).index_add_(0, row_of, grad_logp)
    has_entropy = bool(grad_entropy.any())
    for begin, block in _blocks(logits, 0, ctx.temperature):
        stop = begin + len(block)
        span = slice(ctx.edges[begin], ctx.edges[stop])
        block.sub_(logsum[begin:stop, None])
        if has_entropy:  # dH/dz_j = -p_j (log p_j + H)
            scale = (block + entropy[begin:stop, None]).mul_(grad_entropy[begin:stop, None])
            scale.add_(row_grad[begin:stop, None])
            block.exp_().mul_(scale).neg_()
        else:
            block.exp_().mul_(-row_grad[begin:stop, None])
        column = targets[span] - first
        own = (column >= 0) & (column < logits.shape[1])
        block.index_put_((row_of[span][own] - begin, column[own]), grad_logp[span][own], accumulate=True)
        slopes[begin:stop] = block.div_(ctx.temperature)


def _blocks(logits: torch.Tensor, start: int, temperature: float) -> Any:
    """(first row, float32 logits / temperature [<= ROWS_IN_CACHE, V]) of a chunk that begins at row `start`."""
    step = ROWS_IN_CACHE if logits.device.type == "cpu" else len(logits)
    for offset in range(0, len(logits), step):
        block = logits[offset : offset + step].to(torch.float32, copy=True)
        yield start + offset, block.div_(temperature) if temperature != 1.0 else block


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    row_of: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs of `targets` and entropies of the rows, under softmax(hidden @ weight.T / temperature).

    `hidden` [R, H] and `weight` [V, H] in the compute dtype; `targets` int64 [P] with their rows `row_of` int64 [P],
    ascending (a row may be asked for several tokens, or none). Returns float32 logp [P] and entropy [R], both
    differentiable. Logits are kernels.functions.head_product, as the server makes them; all that follows is float32. At
    most `chunk` x V logits exist at one time, in the backward pass too; on a GPU GPU_LOGITS if these are more.
    """
    if is_gpu(hidden):
        chunk = max(chunk, GPU_LOGITS // len(weight) // GPU_WIDTH * GPU_WIDTH)
    return _TokenLogprobs.apply(hidden, weight, row_of, targets, temperature, chunk)
