"""The numbers of one step, collected where they arise and formed into floats once, at the end of the step.

Used by the training script, the engine and the workflows; `export()` feeds StatsLogger.commit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np


class StatsTracker:
    """Scalars, counters, maxima, timers, and means that keep their sum and their denominator apart.

    A mean is formed only in `export()`, from all sums over all counts since the last export, so it does not depend on
    how the values were cut into calls. One name belongs to one kind; a second kind under the same name is an error.
    Not thread-safe: each thread keeps its own tracker.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._values: dict[str, float] = {}
        self._denominators: dict[str, float] = {}

    def scalar(self, name: str, value: float) -> None:
        """The last value given counts."""
        self._claim(name, "scalar")
        self._values[name] = float(value)

    def update(self, values: Mapping[str, float]) -> None:
        """Every entry as a scalar: numbers that are formed already, such as those of the engine."""
        for name, value in values.items():
            self.scalar(name, value)

    def count(self, name: str, amount: float = 1) -> None:
        """Adds `amount`."""
        self._claim(name, "count")
        self._values[name] = self._values.get(name, 0.0) + float(amount)

    def maximum(self, name: str, value: float) -> None:
        """The largest value given counts; NaN is kept once it is seen."""
        self._claim(name, "maximum")
        self._values[name] = float(np.maximum(self._values.get(name, -np.inf), value))

    def mean(self, name: str, total: float, denominator: float) -> None:
        """Adds a part of a mean: the sum of some values and how many (or how much weight) they are."""
        if denominator < 0:
            raise ValueError(f"mean {name!r}: the denominator is {denominator}, expected 0 or more")
        self._claim(name, "mean")
        self._values[name] = self._values.get(name, 0.0) + float(total)
        self._denominators[name] = self._denominators.get(name, 0.0) + float(denominator)

    def masked_mean(self, name: str, values: np.ndarray, mask: np.ndarray) -> None:
        """Adds the `values` (any shape) where `mask` (same shape, bool) is True to the mean `name`."""
        self.mean(name, float(np.sum(values, where=mask, dtype=np.float64)), int(np.count_nonzero(mask)))

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `<name>_s`, also when the block raises."""
        key = f"{name}_s"
        self._claim(key, "timer")
        start = time.monotonic()
        try:
            yield
        finally:
            self._values[key] = self._values.get(key, 0.0) + time.monotonic() - start

    def export(self) -> dict[str, float]:
        """Everything since the last export, by name; a mean with denominator 0 is left out. Starts anew."""
        out = {name: value for name, value in self._values.items() if self._kinds[name] != "mean"}
        for name, denominator in self._denominators.items():
            if denominator > 0:
                out[name] = self._values[name] / denominator
        self._kinds, self._values, self._denominators = {}, {}, {}
        return out

    def _claim(self, name: str, kind: str) -> None:
        known = self._kinds.setdefault(name, kind)
        if known != kind:
            raise ValueError(f"{name!r} is a {known} in this step and cannot be a {kind} too; choose another name")
