"""Several data sets drawn as one: their shares, levels of difficulty that follow one another, rows that rest.

The state of the data loader (loader.py), which alone calls this. Which data sets there are, says sources.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Generic, TypeVar

import numpy as np

from arealite.api.cli_args import DatasetConfig
from arealite.api.types import Task
from arealite.dataset.examples import Example

Drawn = TypeVar("Drawn", Task, Example)


class Stream(Generic[Drawn]):
    """The rows of one part without end: epoch after epoch, each in an order of its own, without those that rest."""

    def __init__(self, rows: Sequence[Drawn], seed: int, number: int, shuffle: bool) -> None:
        """`number`: of this stream among those of the same seed."""
        self._rows: Sequence[Drawn] = rows
        self._seed, self._number, self._shuffle = seed, number, shuffle
        self._order: tuple[int, np.ndarray] | None = None
        self.position = 0  # rows that were drawn or passed over
        self.rests: dict[str, int] = {}  # id of a row -> the last epoch that it is left out of

    def draw(self) -> Drawn:
        while True:  # at most through the epochs that all rows rest
            epoch, place = divmod(self.position, len(self._rows))
            row = self._rows[int(self._order_of(epoch)[place])]
            self.position += 1
            if self.rests.get(row.id, -1) < epoch:
                return replace(row, id=f"e{epoch}-{row.id}")

    def num_resting(self) -> int:
        epoch = self.position // len(self._rows)
        return sum(until >= epoch for until in self.rests.values())

    def _order_of(self, epoch: int) -> np.ndarray:
        """int64 [number of rows], which row stands at which place of the epoch; the last one used is kept."""
        if self._order is None or self._order[0] != epoch:
            count = len(self._rows)
            random = np.random.default_rng([self._seed, epoch, self._number])
            self._order = (epoch, random.permutation(count) if self._shuffle else np.arange(count))
        return self._order[1]


@dataclass
class Source(Generic[Drawn]):
    """A data set of a mixture: a stream for each level of its curriculum (one without), of which one is drawn from.

    `weight`: its share of all draws, beside the others'. `rewards`: mean rewards of this level's last groups.
    """

    name: str
    config: DatasetConfig
    streams: list[Stream[Drawn]]
    weight: float
    num_drawn: int = 0
    level: int = 0
    rewards: list[float] = field(default_factory=list)

    def draw(self) -> Drawn:
        self.num_drawn += 1
        return self.streams[self.level].draw()

    def note(self, level: int, reward: float, window: int) -> None:
        """A group of `level` had this mean reward. The next level is due once the last `window` groups' mean is
        what `curriculum` asks for."""
        wanted = self.config.curriculum
        if wanted is None or level != self.level or level + 1 == len(self.streams):
            return
        self.rewards = [*self.rewards, reward][-window:]
        if len(self.rewards) == window and fmean(self.rewards) >= wanted:
            self.level, self.rewards = level + 1, []

    def state_dict(self) -> dict[str, Any]:
        streams = [{"position": stream.position, "rests": dict(stream.rests)} for stream in self.streams]
        return {"num_drawn": self.num_drawn, "level": self.level, "rewards": self.rewards, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_drawn, self.level, self.rewards = state["num_drawn"], state["level"], list(state["rewards"])
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.position, stream.rests = saved["position"], dict(saved["rests"])


def next_source(sources: Sequence[Source[Drawn]]) -> Source[Drawn]:
    """The one that is furthest behind its share, so that any number of draws has all shares right to within one."""
    return min(sources, key=lambda source: (source.num_drawn + 0.5) / source.weight)
