"""Triton kernels of NVIDIA GPUs: norms, rotary embedding, gated units, logprobs, attention of decode, sampling.

Imported by functions.for_device alone, where there is such a GPU. They run on the current device, wait for nothing and
read nothing back, so that all of them can be part of a CUDA graph.
"""

from __future__ import annotations

import torch
import triton

from arealite.kernels import gpu_programs as programs
from arealite.kernels.cpu import Scores

KEYS, SPLIT = 64, 512  # keys of decode that are worked on at one time (of 128 bf16), and by one program
DECODE = {"num_warps": 4, "num_stages": 3}  # with 3, page numbers are fetched ahead too
SCORE_BLOCK = SLOPE_BLOCK = SAMPLE_BLOCK = 2048  # logits of a row that are worked on at one time
GATE_BLOCK = 1024  # the same of gated units
TILE = 2048  # elements of a program of norms and of rotary embedding, where rows are short
NUM_SUMS = 512  # programs that add up the gradient of a norm's weight, each for itself


class GpuKernels:
    """The functions of cpu.Kernels that a GPU needs, where these are described: here of bf16, float16 or float32, for
    shapes and strides of any kind. Results are contiguous. `device`: where they compute."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
        return self._norm(x, None, weight, eps, plus_one)[1]

    def add_rms_norm(
        self, x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm(x, added.contiguous(), weight, eps, plus_one)

    def _norm(
        self, x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float, plus_one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        summed = x if added is None else torch.empty_like(out)
        rows, num = _as_rows(x), x.numel() // x.shape[-1]
        tile = _tile(x.shape[-1])
        programs.norm_rows[(triton.cdiv(num, tile["ROWS"]),)](
            rows, added, weight, out, summed, *rows.stride()[:2], rows.shape[1], num, x.shape[-1], eps,
            PLUS_ONE=plus_one, **tile,
        )  # fmt: skip
        return summed, out

    def rms_norm_grad(
        self, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float, plus_one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same bits in every call."""
        by_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, above, n = _as_rows(x), _as_rows(grad), x.shape[-1]
        num, tile = x.numel() // n, _tile(n, TILE // 2)
        sums = torch.empty(min(NUM_SUMS, triton.cdiv(num, tile["ROWS"])), n, dtype=torch.float32, device=x.device)
        steps = *rows.stride()[:2], *above.stride()[:2], rows.shape[1]
        programs.norm_grad_rows[(len(sums),)](
            rows, weight, above, by_x, sums, *steps, num, n, eps, PLUS_ONE=plus_one, **tile
        )
        return by_x, sums.sum(0).to(weight.dtype)

    def silu_times(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        n = gate.shape[-1]
        gates, ups = _flat(gate), _flat(up)
        grid = (len(gates), triton.cdiv(n, GATE_BLOCK))
        programs.gate_rows[grid](gates, ups, out, gates.stride(0), ups.stride(0), n, BLOCK=GATE_BLOCK)
        return out

    def silu_times_grad(
        self, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        by_gate, by_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        n, rows = gate.shape[-1], [_flat(x) for x in (gate, up, grad)]
        grid = (len(rows[0]), triton.cdiv(n, GATE_BLOCK))
        programs.gate_grad_rows[grid](*rows, by_gate, by_up, *(x.stride(0) for x in rows), n, BLOCK=GATE_BLOCK)
        return by_gate, by_up

    def rotate(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, back: bool = False
    ) -> None:
        """cos and sin may have any strides; of x and out, D has stride 1."""
        _, heads, tokens, dim = x.shape
        num, tile = heads * tokens, _tile(dim // 2)
        steps = *x.stride()[1:3], *out.stride()[1:3]
        programs.rotate_rows[(triton.cdiv(num, tile["ROWS"]),)](
            x, cos.contiguous(), sin.contiguous(), out, *steps, heads, num, dim // 2, BACK=back, **tile
        )

    def score(self, logits: torch.Tensor, first: int, scores: Scores, temperature: float) -> None:
        places = scores.edges, scores.targets, scores.logsum, scores.entropy, scores.logp
        programs.score_rows[(len(logits),)](
            logits, *places, logits.shape[1], first, 1 / temperature, BLOCK=SCORE_BLOCK, num_warps=8
        )

    def score_grad(
        self, logits: torch.Tensor, first: int, scores: Scores, temperature: float, out: torch.Tensor
    ) -> None:
        """`out` may be the logits themselves, or of another type."""
        places = scores.edges, scores.targets, scores.logsum, scores.entropy, scores.logp_grad, scores.entropy_grad
        grid = (len(logits), triton.cdiv(logits.shape[1], SLOPE_BLOCK))
        programs.score_grad_rows[grid](logits, out, *places, logits.shape[1], first, 1 / temperature, BLOCK=SLOPE_BLOCK)

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool_layer: torch.Tensor,
        tables: torch.Tensor,
        lens: torch.Tensor,
        window: int,
        scale: float,
        max_keys: int,
    ) -> torch.Tensor:
        """Store the newest key and value of each row in its page, and let its query see the row's keys.

        q [B, H, D], k and v [B, K, D]; pool_layer [2, K, pages, 16, D]; tables int32 [B, n], a row's pages in order;
        lens int32 [B], keys of each row with the newest one: 0 gives zeros and stores nothing. `window`: keys seen at
        most, 0 for all. `max_keys`: what no row exceeds; one that does is computed slowly, and in another order.

        Returns:
            [B, H, D].
        """
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        num_rows, heads, dim = q.shape
        group, width = heads // k.shape[1], max(16, triton.next_power_of_2(dim))
        splits = max(1, triton.cdiv(max_keys, SPLIT))
        keys = 2 * KEYS // (q.element_size() * max(1, width // 128))
        sums = torch.empty(num_rows, heads, splits, dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(num_rows, heads, splits, 2, dtype=torch.float32, device=q.device)
        out = torch.empty(num_rows, heads, dim, dtype=q.dtype, device=q.device)
        steps = [step for x in (q, k, v) for step in x.stride()[:2]]
        programs.decode_splits[(num_rows, k.shape[1], splits)](
            q, k, v, pool_layer, tables, lens, sums, stats, *steps, *pool_layer.stride()[:2], tables.stride(0),
            scale, window, heads, splits, GROUP=group, GROUP_ROWS=max(16, triton.next_power_of_2(group)),
            DIM=dim, WIDTH=width, KEYS=keys, SPLIT=SPLIT, **DECODE,
        )  # fmt: skip
        programs.decode_join[(num_rows * heads,)](sums, stats, out, splits, DIM=dim, WIDTH=width, JOINED=16)
        return out

    def sample(
        self, logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A token of each row from softmax(logits / temperature), by the inverse of its cumulative sum.

        logits [B, V]; temperature float32 [B], 0 for the likeliest token; uniform float64 [B] in [0, 1).

        Returns:
            Tokens int64, their logprobs float32 and whether the row is sound, bool: no score is NaN or +inf, and not
            all are -inf. Of other rows, token and logprob mean nothing.
        """
        logits = logits.contiguous()
        num_rows, vocab = logits.shape
        blocks = triton.cdiv(vocab, SAMPLE_BLOCK)
        peaks, sums = torch.empty(2, num_rows, blocks, dtype=torch.float32, device=logits.device)
        bests = torch.empty(num_rows, blocks, dtype=torch.int32, device=logits.device)
        kinds = torch.int64, torch.float32, torch.bool
        token, logprob, ok = (torch.empty(num_rows, dtype=kind, device=logits.device) for kind in kinds)
        blockwise = peaks, sums, bests
        programs.sample_blocks[(num_rows, blocks)](logits, temperature, *blockwise, vocab, blocks, BLOCK=SAMPLE_BLOCK)
        programs.sample_rows[(num_rows,)](
            logits, temperature, uniform, *blockwise, token, logprob, ok, vocab, blocks,
            BLOCK=SAMPLE_BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=8,
        )  # fmt: skip
        return token, logprob, ok


def _tile(n: int, size: int = TILE) -> dict[str, int]:
    """Rows of n elements that a program takes, and launch options."""
    width = triton.next_power_of_2(n)
    return {"ROWS": max(1, size // width), "WIDTH": width, "num_warps": min(max(width // 1024, 4), 16)}


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[outer, inner, N] of x [..., N]: what it is where strides allow, else a copy."""
    n = x.shape[-1]
    inner = x.shape[-2] if x.dim() > 1 else 1
    whole = x if x.stride(-1) == 1 else x.contiguous()
    return whole.reshape(x.numel() // (inner * n) if inner else 0, inner, n)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[rows, N] of x [..., N]: what it is where strides allow, else a copy."""
    n = x.shape[-1]
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(x.numel() // n, n)
