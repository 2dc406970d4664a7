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
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from arealite.kernels import build

logger = logging.getLogger(__name__)

PANEL, DEPTH = 64, 32  # columns and rows of a packed weight are filled up to a multiple
DIM_STEP = 32  # head dims and widths must be multiples
MAX_SUMS = 8  # threads that add up gradients of keys and values, each for itself


def _struct(pointers: str, sizes: str, scale: str = "", numbers: str = "") -> type[ctypes.Structure]:
    """A struct of cpu.c, whose fields are in this order."""
    kinds = (pointers, c_void_p), (sizes, c_int64), (scale, c_float), (numbers, c_int32)
    fields = [(name, kind) for names, kind in kinds for name in names.split()]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


_Strides = _struct("base", "head token")  # [heads, tokens, dim], strides in elements
_Attention = _struct("pieces tables", "num_pieces max_keys heads kv_heads dim pool_pages window", "scale", "threads")
_Sampling = _struct("logits temperature uniform token logprob ok", "rows vocab", "", "is_float threads")
_Scoring = _struct(
    "logits edges targets logsum entropy logp logp_grad entropy_grad", "rows vocab", "temperature", "threads"
)
_Tree = _struct("runs path", "num_runs max_keys nodes heads kv_heads dim window", "scale", "threads")

# Of each function, whether it lasts, and its arguments: a pointer, size, float, number, or one of the structs.
_KINDS: dict[str, Any] = {"p": c_void_p, "s": c_int64, "f": c_float, "n": c_int32, "R": POINTER(_Strides)}
_KINDS |= {"A": POINTER(_Attention), "D": POINTER(_Sampling), "L": POINTER(_Scoring), "T": POINTER(_Tree)}
_SIGNATURES = {
    "product": (True, "ppppsssn"),
    "pack": (True, "ppsssn"),
    "rms_norm": (False, "psppssfnn"),
    "rms_norm_grad": (True, "pppppssfnn"),
    "silu_times": (False, "ppspssn"),
    "silu_times_grad": (True, "pppppsn"),
    "rotate": (False, "RRppsssnn"),
    "attention": (True, "ARRRppp"),
    "tree_attention": (True, "TRRRp"),
    "tree_attention_grad": (True, "TRRRRppp"),
    "score": (True, "L"),
    "score_grad": (True, "L"),
    "sample": (True, "D"),
}


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
        self._c = SimpleNamespace()
        lasting, short = ctypes.CDLL(str(library)), ctypes.PyDLL(str(library))
        for function_name, (lasts, kinds) in _SIGNATURES.items():
            function = (lasting if lasts else short)[function_name]
            function.argtypes, function.restype = [_KINDS[kind] for kind in kinds], None
            setattr(self._c, function_name, function)

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
            self._c.pack(weight.data_ptr(), packed.data_ptr(), len(weight), width, first, torch.get_num_threads())
            first += len(weight)
        return packed

    def product(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
        """x [..., K] times the transpose of packed weights of n rows together, plus bias [n]; [..., n]."""
        x = x.contiguous()
        width = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], n)
        shift = None if bias is None else bias.data_ptr()
        places = x.data_ptr(), packed.data_ptr(), shift, out.data_ptr()
        self._c.product(*places, x.numel() // width, n, width, torch.get_num_threads())
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
        """x [..., N] normed; times the weight after rounding or, `plus_one`, times 1 + weight before it."""
        x = x.contiguous()
        out = torch.empty_like(x)
        n = x.shape[-1]
        places = x.data_ptr(), n, weight.data_ptr(), out.data_ptr()
        self._c.rms_norm(*places, x.numel() // n, n, eps, plus_one, torch.get_num_threads())
        return out

    def add_rms_norm(
        self, x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + added, and `rms_norm` of that."""
        x = x + added
        return x, self.rms_norm(x, weight, eps, plus_one)

    def rms_norm_grad(
        self, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float, plus_one: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of x and weight from that of the result of `rms_norm`."""
        x, grad, threads, n = x.contiguous(), grad.contiguous(), torch.get_num_threads(), x.shape[-1]
        by_x, by_weight = torch.empty_like(x), torch.zeros(threads, n)
        places = [tensor.data_ptr() for tensor in (x, weight, grad, by_x, by_weight)]
        self._c.rms_norm_grad(*places, x.numel() // n, n, eps, plus_one, threads)
        return by_x, by_weight.sum(0).to(weight.dtype)

    def silu_times(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up; both [..., N], rows as far apart in one as in the other."""
        n = gate.shape[-1]
        stride = gate.stride(-2)
        if up.stride(-2) != stride:
            gate, up, stride = gate.contiguous(), up.contiguous(), n
        out = gate.new_empty(gate.shape)
        places = gate.data_ptr(), up.data_ptr(), stride, out.data_ptr()
        self._c.silu_times(*places, gate.numel() // n, n, torch.get_num_threads())
        return out

    def silu_times_grad(
        self, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of gate and up from that of the result of `silu_times`."""
        gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
        by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
        places = [tensor.data_ptr() for tensor in (gate, up, grad, by_gate, by_up)]
        self._c.silu_times_grad(*places, gate.numel(), torch.get_num_threads())
        return by_gate, by_up

    def rotate(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, back: bool = False
    ) -> None:
        """Rotary embedding of x [1, heads, T, D] into `out`, which may be x itself; cos and sin [1, T, D], contiguous.
        `back`: of the result's gradient x, the input's."""
        places = _strides(x[0]), _strides(out[0]), cos.data_ptr(), sin.data_ptr()
        self._c.rotate(*places, *x.shape[1:], back, torch.get_num_threads())

    def score(self, logits: torch.Tensor, first: int, scores: Scores, temperature: float) -> None:
        """Fill `scores` from row `first` on, by contiguous logits [r, V] / temperature."""
        self._c.score(_scoring(logits, first, scores, temperature))

    def score_grad(
        self, logits: torch.Tensor, first: int, scores: Scores, temperature: float, out: torch.Tensor
    ) -> None:
        """Put the gradient of the logits in their place (`out` is logits), from those of logprobs and entropies. Where
        the logits are of a slice of the vocabulary, targets count from its first token; those outside of it are left
        out."""
        assert out is logits
        self._c.score_grad(_scoring(logits, first, scores, temperature))

    def tree_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: TreeRuns, scale: float
    ) -> torch.Tensor:
        """q [S, H, D] over k and v [S, K, D], S nodes of a prefix tree; [S, H, D]."""
        out = torch.empty(q.shape, dtype=q.dtype)
        places = [_strides(x.transpose(0, 1)) for x in (q, k, v)]
        self._c.tree_attention(_tree(q, k, seen, scale, torch.get_num_threads()), *places, out.data_ptr())
        return out

    def tree_attention_grad(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, up: torch.Tensor, seen: TreeRuns, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v from that of the result of `tree_attention`."""
        threads = min(torch.get_num_threads(), MAX_SUMS)
        by_q, sums = torch.empty(q.shape, dtype=q.dtype), torch.zeros(2, threads, *k.shape)
        places = [_strides(x.transpose(0, 1)) for x in (q, k, v, up)]
        results = [x.data_ptr() for x in (by_q, *sums)]
        self._c.tree_attention_grad(_tree(q, k, seen, scale, threads), *places, *results)
        by_k, by_v = sums.sum(1).to(k.dtype)
        return by_q, by_k, by_v

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
        places = keys, keys + pool.stride(0) * 2, out.data_ptr()
        self._c.attention(byref(setting), _strides(q), _strides(k), _strides(v), *places)
        return out

    def sample(
        self, logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As GpuKernels.sample, of logits bf16 or float32; the logprobs are float64."""
        logits = logits.contiguous()
        token, logprob = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits), dtype=torch.float64)
        ok = torch.empty(len(logits), dtype=torch.bool)
        places = [x.data_ptr() for x in (logits, temperature, uniform, token, logprob, ok)]
        is_float = logits.dtype == torch.float32
        self._c.sample(byref(_Sampling(*places, *logits.shape, is_float, torch.get_num_threads())))
        return token, logprob, ok


def _strides(x: torch.Tensor) -> Any:
    head, token, step = x.stride()
    assert step == 1
    return byref(_Strides(x.data_ptr(), head, token))


def _tree(q: torch.Tensor, k: torch.Tensor, seen: TreeRuns, scale: float, threads: int) -> Any:
    shape = (len(seen.runs), int(seen.runs[:, 1].max()), *q.shape[:2], k.shape[1], q.shape[2], seen.window)
    return byref(_Tree(seen.runs.ctypes.data, seen.path.ctypes.data, *shape, scale, threads))


def _scoring(logits: torch.Tensor, first: int, scores: Scores, temperature: float) -> Any:
    assert logits.is_contiguous()
    logsum, entropy = (x.data_ptr() + 4 * first for x in (scores.logsum, scores.entropy))
    grads: tuple[int | None, int | None] = None, None
    if scores.logp_grad is not None and scores.entropy_grad is not None:
        grads = scores.logp_grad.data_ptr(), scores.entropy_grad.data_ptr() + 4 * first
    edges = scores.edges.data_ptr() + 8 * first
    places = logits.data_ptr(), edges, scores.targets.data_ptr(), logsum, entropy, scores.logp.data_ptr(), *grads
    return byref(_Scoring(*places, *logits.shape, temperature, torch.get_num_threads()))


@functools.cache
def load() -> Kernels | None:
    """The kernels of this machine; None, and a line in the log, where PyTorch computes. Raises as build.wanted."""
    name, path, _ = build.library()
    logger.info("CPU kernels: %s", build.description())
    return None if path is None else Kernels(path, name)
