"""The numbers of one step, collected where they arise; `export()` feeds StatsLogger.commit. Used by the trainer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from arealite.observe.timeline import span


class StatsTracker:
    """Scalars, and timers that add up until the next export. Not thread-safe: each thread keeps its own tracker."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def scalar(self, name: str, value: float) -> None:
        """The last value given counts."""
        self._values[name] = float(value)

    def update(self, values: Mapping[str, float]) -> None:
        """Every entry as a scalar, such as the numbers of the engine."""
        for name, value in values.items():
            self.scalar(name, value)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `<name>_s`, also when the block raises; a span of the timeline."""
        start = time.monotonic()
        try:
            with span(name):
                yield
        finally:
            self._values[f"{name}_s"] = self._values.get(f"{name}_s", 0.0) + time.monotonic() - start

    def export(self) -> dict[str, float]:
        """Everything since the last export, by name. Starts anew."""
        out, self._values = self._values, {}
        return out
