"""cpu.c as functions of CPU bf16 tensors; None where it cannot be had.

Used by inference/ and by engine/, partly through functions.py (with gradients). Server and trainer of a machine both
take it or both leave it to PyTorch, whose results differ by rounding. Calls release the interpreter lock only where
they last.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from arealite.kernels import build

logger = logging.getLogger(__name__)

PANEL, DEPTH = 64, 32  # columns and rows of a packed weight are filled up to a multiple
DIM_STEP = 32  # head dims and widths must be multiples
MAX_SUMS = 8  # threads that add up gradients of keys and values, each for itself


class _Rows(ctypes.Structure):
    """[heads, tokens, dim] with the strides of heads and tokens in elements."""

    _fields_ = [("base", c_void_p), ("head", c_int64), ("token", c_int64)]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("pieces", c_void_p),
        ("tables", c_void_p),
        *((name, c_int64) for name in ["num_pieces", "max_keys", "heads", "kv_heads", "dim", "pool_pages", "window"]),
        ("scale", c_float),
        ("threads", c_int32),
    ]


class _Sampling(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ["logits", "temperature", "uniform", "token", "logprob", "ok"]),
        *((name, c_int64) for name in ["rows", "vocab"]),
        *((name, c_int32) for name in ["is_float", "threads"]),
    ]


class _Scoring(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ["logits", "edges", "targets"]),
        *((name, c_void_p) for name in ["logsum", "entropy", "logp", "logp_grad", "entropy_grad"]),
        *((name, c_int64) for name in ["rows", "vocab"]),
        ("temperature", c_float),
        ("threads", c_int32),
    ]


class _Tree(ctypes.Structure):
    _fields_ = [
        ("runs", c_void_p),
        ("path", c_void_p),
        *((name, c_int64) for name in ["num_runs", "max_keys", "nodes", "heads", "kv_heads", "dim", "window"]),
        ("scale", c_float),
        ("threads", c_int32),
    ]


@dataclass(frozen=True)
class TreeRuns:
    """Who sees whom in a prefix tree. `runs` [n, 3] int32, the largest first: a run sees the nodes path[first : first +
    keys] (int32), and the last ones of them ask: (first, keys, queries). `window`: keys seen at most; 0 for all."""

    runs: np.ndarray
    path: np.ndarray
    window: int


@dataclass(frozen=True)
class Scores:
    """Of R rows and P targets, contiguous: logsumexp and entropy [R], logprobs [P] (float32); the gradients of the last
    two, where these are known. Row r is asked for the targets [edges[r], edges[r + 1]) (int64 [R + 1] and [P])."""

    edges: torch.Tensor
    targets: torch.Tensor
    logsum: torch.Tensor
    entropy: torch.Tensor
    logp: torch.Tensor
    logp_grad: torch.Tensor | None = None
    entropy_grad: torch.Tensor | None = None


@dataclass(frozen=True)
class PagedSpans:
    """What the tokens of a pass see. `pieces` [n, 4] int32: first token of the pass, its position in its sequence,
    count, and where in `tables` (int32) its sequence's page numbers begin. The pieces cover `num_tokens` tokens."""

    pieces: np.ndarray
    tables: np.ndarray
    num_tokens: int
    max_keys: int


class Kernels:
    """The functions of one compiled library, for the instruction set `name`."""

    device = torch.device("cpu")

    def __init__(self, library: Path, name: str) -> None:
        self.name = name
        long, short = ctypes.CDLL(str(library)), ctypes.PyDLL(str(library))
        self._product, self._pack, self._attention, self._sample = long.product, long.pack, long.attention, long.sample
        self._norm, self._silu, self._rotate = short.rms_norm, short.silu_times, short.rotate
        self._norm_grad, self._silu_grad = long.rms_norm_grad, long.silu_times_grad
        self._score, self._score_grad = long.score, long.score_grad
        self._tree, self._tree_grad = long.tree_attention, long.tree_attention_grad
        pointer, size, number = c_void_p, c_int64, c_int32
        self._product.argtypes = [pointer, pointer, pointer, pointer, size, size, size, number]
        self._pack.argtypes = [pointer, pointer, size, size, size, number]
        self._attention.argtypes = [POINTER(_Attention), *[POINTER(_Rows)] * 3, pointer, pointer, pointer]
        self._sample.argtypes = [POINTER(_Sampling)]
        self._norm.argtypes = [pointer, size, pointer, pointer, size, size, c_float, number, number]
        self._silu.argtypes = [pointer, pointer, size, pointer, size, size, number]
        self._rotate.argtypes = [*[POINTER(_Rows)] * 2, pointer, pointer, size, size, size, number, number]
        self._norm_grad.argtypes = [*[pointer] * 5, size, size, c_float, number, number]
        self._silu_grad.argtypes = [*[pointer] * 5, size, number]
        self._tree.argtypes = [POINTER(_Tree), *[POINTER(_Rows)] * 3, pointer]
        self._tree_grad.argtypes = [POINTER(_Tree), *[POINTER(_Rows)] * 4, *[pointer] * 3]
        self._score.argtypes = self._score_grad.argtypes = [POINTER(_Scoring)]
        for function in (value for key, value in vars(self).items() if key != "name"):
            function.restype = None

    def pack(self, weights: list[torch.Tensor], packed: torch.Tensor | None = None) -> torch.Tensor:
        """Weights [n, K] below each other, in the order that `product` reads; into `packed` if it is given."""
        width = weights[0].shape[1]
        if packed is None:
            num_columns = sum(len(weight) for weight in weights)
            size = -(-num_columns // PANEL) * PANEL * -(-width // DEPTH) * DEPTH
            packed = (weights[0].new_empty if size == num_columns * width else weights[0].new_zeros)(size)
        first = 0
        for weight in weights:
            assert weight.is_contiguous() and width % 2 == 0
            self._pack(weight.data_ptr(), packed.data_ptr(), len(weight), width, first, torch.get_num_threads())
            first += len(weight)
        return packed

    def product(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
        """x [..., K] times the transpose of packed weights of n rows together, plus bias [n]; [..., n]."""
        x = x.contiguous()
        width = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], n)
        shift = None if bias is None else bias.data_ptr()
        num = x.numel() // width
        self._product(x.data_ptr(), packed.data_ptr(), shift, out.data_ptr(), num, n, width, torch.get_num_threads())
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
        """x [..., N] normed; times the weight after rounding or, `plus_one`, times 1 + weight before it."""
        x = x.contiguous()
        out = torch.empty_like(x)
        n = x.shape[-1]
        num, threads = x.numel() // n, torch.get_num_threads()
        self._norm(x.data_ptr(), n, weight.data_ptr(), out.data_ptr(), num, n, eps, plus_one, threads)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + added, and `rms_norm` of that."""
        x = x + added
        return x, self.rms_norm(x, weight, eps, plus_one)

    def silu_times(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up; both [..., N], rows as far apart in one as in the other."""
        n = gate.shape[-1]
        stride = gate.stride(-2)
        if up.stride(-2) != stride:
            gate, up, stride = gate.contiguous(), up.contiguous(), n
        out = gate.new_empty(gate.shape)
        num, threads = gate.numel() // n, torch.get_num_threads()
        self._silu(gate.data_ptr(), up.data_ptr(), stride, out.data_ptr(), num, n, threads)
        return out

    def rotate(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, back: bool = False
    ) -> None:
        """Rotary embedding of x [1, heads, T, D] into `out`, which may be x itself; cos and sin [1, T, D], contiguous.
        `back`: of the result's gradient x, the input's."""
        _, heads, tokens, dim = x.shape
        places = _rows(x[0]), _rows(out[0]), cos.data_ptr(), sin.data_ptr()
        self._rotate(*places, heads, tokens, dim, back, torch.get_num_threads())

    def rms_norm_grad(
        self, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float, plus_one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of x and weight from that of the result of `rms_norm`."""
        x, grad, threads, n = x.contiguous(), grad.contiguous(), torch.get_num_threads(), x.shape[-1]
        by_x = torch.empty_like(x)
        by_weight = torch.zeros(threads, n)
        places = [tensor.data_ptr() for tensor in (x, weight, grad, by_x, by_weight)]
        self._norm_grad(*places, x.numel() // n, n, eps, plus_one, threads)
        return by_x, by_weight.sum(0).to(weight.dtype)

    def silu_times_grad(
        self, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of gate and up from that of the result of `silu_times`."""
        gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
        by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
        places = [tensor.data_ptr() for tensor in (gate, up, grad, by_gate, by_up)]
        self._silu_grad(*places, gate.numel(), torch.get_num_threads())
        return by_gate, by_up

    def score(self, logits: torch.Tensor, first: int, scores: Scores, temperature: float) -> None:
        """Fill `scores` from row `first` on, by contiguous logits [r, V] / temperature."""
        self._score(_scoring(logits, first, scores, temperature))

    def score_grad(
        self, logits: torch.Tensor, first: int, scores: Scores, temperature: float, out: torch.Tensor
    ) -> None:
        """Put the gradient of the logits in their place (`out` is logits), from those of logprobs and entropies. Where
        the logits are of a slice of the vocabulary, targets count from its first token; those outside of it are left
        out."""
        assert out is logits
        self._score_grad(_scoring(logits, first, scores, temperature))

    def tree_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: TreeRuns, scale: float
    ) -> torch.Tensor:
        """q [S, H, D] over k and v [S, K, D], S nodes of a prefix tree; [S, H, D]."""
        out = torch.empty(q.shape, dtype=q.dtype)
        tree = _tree(q, k, seen, scale, torch.get_num_threads())
        self._tree(tree, *(_rows(x.transpose(0, 1)) for x in (q, k, v)), out.data_ptr())
        return out

    def tree_attention_grad(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, up: torch.Tensor, seen: TreeRuns, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v from that of the result of `tree_attention`."""
        threads = min(torch.get_num_threads(), MAX_SUMS)
        by_q = torch.empty(q.shape, dtype=q.dtype)
        sums = torch.zeros(2, threads, *k.shape)
        places = [_rows(x.transpose(0, 1)) for x in (q, k, v, up)]
        self._tree_grad(
            _tree(q, k, seen, scale, threads), *places, by_q.data_ptr(), sums[0].data_ptr(), sums[1].data_ptr()
        )
        by_k, by_v = sums.sum(1).to(k.dtype)
        return by_q, by_k, by_v

    def sample(
        self, logits: torch.Tensor, temperatures: list[float], uniforms: list[float]
    ) -> tuple[list[int], list[float], list[bool]]:
        """Tokens, logprobs and whether the row is sound; logits [B, V] bf16 or float32, temperature 0 for the best."""
        num, vocab = logits.shape
        temperature, uniform = np.asarray(temperatures, np.float32), np.asarray(uniforms, np.float64)
        tokens, logprobs, ok = np.zeros(num, np.int64), np.zeros(num), np.zeros(num, np.uint8)
        places = [array.ctypes.data for array in (temperature, uniform, tokens, logprobs, ok)]
        is_float = logits.dtype == torch.float32
        self._sample(byref(_Sampling(logits.data_ptr(), *places, num, vocab, is_float, torch.get_num_threads())))
        return tokens.tolist(), logprobs.tolist(), (ok > 0).tolist()

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool: torch.Tensor,
        spans: PagedSpans,
        window: int,
        scale: float,
    ) -> torch.Tensor:
        """Store keys and values [kv heads, T, D] in one layer of the pool [2, kv heads, pages, 16, D], and let queries
        [heads, T, D] see their sequences; [T, heads, D], zeros for tokens of no piece."""
        heads, tokens, dim = q.shape
        out = q.new_empty(tokens, heads, dim)
        if tokens > spans.num_tokens:
            out[spans.num_tokens :] = 0
        shape = (len(spans.pieces), spans.max_keys, heads, len(k), dim, pool.shape[2], window)
        setting = _Attention(spans.pieces.ctypes.data, spans.tables.ctypes.data, *shape, scale, torch.get_num_threads())
        keys = pool.data_ptr()
        values = keys + pool.stride(0) * 2
        self._attention(byref(setting), _rows(q), _rows(k), _rows(v), keys, values, out.data_ptr())
        return out


def _tree(q: torch.Tensor, k: torch.Tensor, seen: TreeRuns, scale: float, threads: int) -> ctypes._Pointer[_Tree]:
    shape = (len(seen.runs), int(seen.runs[:, 1].max()), *q.shape[:2], k.shape[1], q.shape[2], seen.window)
    return byref(_Tree(seen.runs.ctypes.data, seen.path.ctypes.data, *shape, scale, threads))  # type: ignore[return-value]


def _rows(x: torch.Tensor) -> ctypes._Pointer[_Rows]:
    head, token, step = x.stride()
    assert step == 1
    return byref(_Rows(x.data_ptr(), head, token))  # type: ignore[return-value]


def _scoring(logits: torch.Tensor, first: int, scores: Scores, temperature: float) -> ctypes._Pointer[_Scoring]:
    assert logits.is_contiguous()
    by_row = [x.data_ptr() + 4 * first for x in (scores.logsum, scores.entropy)]
    grads: tuple[int | None, int | None] = None, None
    if scores.logp_grad is not None and scores.entropy_grad is not None:
        grads = scores.logp_grad.data_ptr(), scores.entropy_grad.data_ptr() + 4 * first
    edges = scores.edges.data_ptr() + 8 * first
    places = [logits.data_ptr(), edges, scores.targets.data_ptr(), *by_row, scores.logp.data_ptr(), *grads]
    return byref(_Scoring(*places, *logits.shape, temperature, torch.get_num_threads()))  # type: ignore[return-value]


@functools.cache
def load() -> Kernels | None:
    """The kernels of this machine; None, and a line in the log, where PyTorch computes. Raises as build.wanted."""
    name, path, _ = build.library()
    logger.info("CPU kernels: %s", build.description())
    return None if path is None else Kernels(path, name)
