"""Decode on a GPU without the host in between: one token of each of many sequences, as CUDA graphs of a few sizes.

Used by batcher.py. A graph is captured when its size is first met. It reads its inputs where one copy puts them, and
the tokens that it drew last where it left them: the next pass can begin before anybody has seen them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from arealite import devices
from arealite.inference.core.cache import PAGE_TOKENS, PagePool
from arealite.inference.core.layout import DecodeRows, GpuLayout, Transfer, table_width
from arealite.inference.core.sampler import Sampled, pack_drawn, read_drawn, uniforms_of
from arealite.inference.core.sequence import Sequence
from arealite.inference.core.served_model import ServedModel
from arealite.kernels.cpu import Kernels

if TYPE_CHECKING:
    from arealite.kernels.gpu import GpuKernels

logger = logging.getLogger(__name__)

VARIABLE = "AREALITE_GRAPHS"  # 0: no graphs
ROW_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
FEWEST_KEYS = 1024  # a graph is for this many keys of a row, or twice, four times ... as many
AS_DRAWN = -1  # instead of a token: the one that the row drew in the pass before


@dataclass(frozen=True)
class Started:
    """A pass on its way: `sequences` get their tokens, which `packed` (sampler.pack_drawn) has in locked memory once
    `is_there` is reached."""

    sequences: list[Sequence]
    packed: torch.Tensor
    is_there: torch.Event | None

    def wait(self) -> Sampled:
        if self.is_there is not None:
            self.is_there.synchronize()
        return read_drawn(self.packed, [])


class _DecodedRows:
    """What the host knows of the sequences that are decoded together, row by row, as arrays."""

    def __init__(self, sequences: list[Sequence], size: int, width: int) -> None:
        num = len(sequences)
        self.sequences = sequences
        self.tokens, self.lens = np.zeros(size, np.int64), np.zeros(size, np.int32)
        self.seeds, self.temperature = np.zeros(size, np.uint64), np.zeros(size, np.float32)
        self.tables = np.zeros((size, width), np.int32)
        self.lens[:num] = [s.num_computed + 1 for s in sequences]
        self.tokens[:num] = [s.tokens[-1] for s in sequences]
        self.seeds[:num] = [s.seed % 2**64 for s in sequences]
        self.temperature[:num] = [s.request.params.temperature for s in sequences]
        for row, sequence in zip(self.tables, sequences, strict=False):
            row[: len(sequence.pages)] = sequence.pages

    def advance(self, goes_on: list[bool]) -> None:
        """To the next token of the rows that go on; the others become padding."""
        self.tokens[:] = AS_DRAWN
        going = np.array(goes_on)
        lens = self.lens[: len(going)]
        lens += 1
        lens[~going] = 0
        for i in np.flatnonzero((lens - 1) % PAGE_TOKENS == 0):  # a new page
            self.tables[i, lens[i] // PAGE_TOKENS] = self.sequences[i].pages[lens[i] // PAGE_TOKENS]


@dataclass(frozen=True)
class _Graph:
    inputs: Transfer
    replay: Callable[[], None]
    result: Callable[[], torch.Tensor]


def decode_graphs(model: ServedModel, pool: PagePool, max_rows: int) -> DecodeGraphs | None:
    """None where the device has none, they are switched off, or every pass must have one size."""
    kernels = pool.kernels
    if kernels is None or isinstance(kernels, Kernels) or model.deterministic or os.environ.get(VARIABLE) == "0":
        return None
    return DecodeGraphs(model, pool, kernels, max_rows)


class DecodeGraphs:
    """The graphs of one model and one pool, at most `max_rows` rows each."""

    def __init__(self, model: ServedModel, pool: PagePool, kernels: GpuKernels, max_rows: int) -> None:
        self._model, self._pool, self._kernels = model, pool, kernels
        self.max_rows = max_rows
        self._sizes = [size for size in ROW_SIZES if size < max_rows] + [max_rows]
        self._drawn = torch.zeros(max_rows, dtype=torch.int64, device=model.device)
        self._rows = _DecodedRows([], max_rows, table_width(model.context_length))
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._recorder = devices.Recorder(model.device) if devices.is_gpu(model.device) else None

    def clear(self) -> None:
        """Forget all graphs: the pool's memory is about to change."""
        self._graphs.clear()

    def start(self, sequences: list[Sequence]) -> Started | None:
        """Begin a pass that draws the next token of each; None if it has to be made without a graph."""
        self._rows = _DecodedRows(sequences, self.max_rows, self._rows.tables.shape[1])
        return self._start()

    def start_next(self, goes_on: list[bool]) -> Started | None:
        """Begin the pass after the one begun last, for those of its sequences that go on."""
        self._rows.advance(goes_on)
        return self._start()

    def hidden(self, sequences: list[Sequence]) -> torch.Tensor | None:
        """Last hidden states [B, H] of a pass that draws nothing, to be used before the next one; None as above."""
        self._rows = _DecodedRows(sequences, self.max_rows, self._rows.tables.shape[1])
        states = self._run(draws=False)
        return None if states is None else states[: len(sequences)]

    def _start(self) -> Started | None:
        packed = self._run(draws=True)
        if packed is None:
            return None
        if self._recorder is None:
            return Started(self._rows.sequences, packed, None)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed, non_blocking=True)
        return Started(self._rows.sequences, host, devices.marked(self._model.device))

    def _run(self, draws: bool) -> torch.Tensor | None:
        rows = self._rows
        if not 0 < len(rows.sequences) <= self.max_rows:
            return None
        size = next(size for size in self._sizes if size >= len(rows.sequences))
        num_keys, longest = FEWEST_KEYS, int(rows.lens.max())
        while num_keys < longest:
            num_keys *= 2
        width = min(table_width(num_keys), rows.tables.shape[1])
        arrays: list[np.ndarray] = [
            rows.tokens,
            rows.lens,
            rows.temperature,
            uniforms_of(rows.seeds, rows.lens),
            rows.tables[:, :width],
        ]
        arrays = [array[:size] for array in arrays]
        graph = self._graphs.get((size, num_keys, draws)) or self._capture(size, num_keys, draws, arrays)
        if graph is None:
            return None
        graph.inputs.fill(arrays)
        graph.replay()
        return graph.result()

    def _capture(self, size: int, num_keys: int, draws: bool, arrays: list[np.ndarray]) -> _Graph | None:
        inputs = Transfer(arrays, self._model.device)
        inputs.fill([array * 0 for array in arrays])  # padding alone
        compute = partial(self._compute, inputs.tensors, num_keys, draws)
        if self._recorder is None:
            self._graphs[size, num_keys, draws] = _Graph(inputs, lambda: None, compute)
            return self._graphs[size, num_keys, draws]
        drawn = self._drawn.clone()
        try:
            replay, result = self._recorder.record(compute)
        except RuntimeError as error:
            logger.warning("decode goes on without graphs (%d rows of %d keys: %s)", size, num_keys, error)
            self.max_rows = 0
            self.clear()
            return None
        finally:
            self._drawn.copy_(drawn)
        self._graphs[size, num_keys, draws] = _Graph(inputs, replay, lambda: result)
        logger.info("graph %d: decode of %d rows of up to %d keys", len(self._graphs), size, num_keys)
        return self._graphs[size, num_keys, draws]

    def _compute(self, inputs: list[torch.Tensor], num_keys: int, draws: bool) -> torch.Tensor:
        """What a graph computes: hidden states, or the tokens drawn from them (sampler.pack_drawn)."""
        tokens, lens, temperature, uniform, tables = inputs
        drawn = self._drawn[: len(tokens)]
        layout = GpuLayout.of_rows(self._pool, self._kernels, DecodeRows(tables, lens, num_keys))
        positions = (lens - 1).clamp(min=0).long()
        hidden = self._model.run(torch.where(tokens == AS_DRAWN, drawn, tokens), positions, layout)
        if not draws:
            return hidden
        token, logprob, ok = self._kernels.sample(self._model.logits(hidden), temperature, uniform)
        drawn.copy_(token)
        return pack_drawn(token, logprob, ok, torch.zeros_like(uniform))
