"""When something that recurs is due: every so many steps, epochs or seconds.

Used by the Saver, the RecoverHandler and the Evaluator, on every trainer rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from arealite.api.config_rules import has_frequency

if TYPE_CHECKING:
    from arealite.api.protocols import Collective
    from arealite.api.run_args import FrequencyConfig


class Frequency:
    """Decides on rank 0 and tells the other ranks: their clocks differ, and only rank 0 draws from the data.

    Ask once per step. Steps are finished ones, so a resumed run is due at the same steps as a straight one;
    seconds count from the construction or from the last time it was due; epochs count from 0, in a resumed run from
    the epoch given to `restart` (without it, its first step is due at once).
    """

    def __init__(self, config: FrequencyConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._last_s = clock()
        self._last_epoch = 0

    def restart(self, epoch: int) -> None:
        """Count seconds from now and epochs from `epoch`."""
        self._last_s, self._last_epoch = self._clock(), epoch

    def due(self, step: int, epoch: int, collective: Collective, last: bool = False) -> bool:
        """Is it due after `step` finished steps, in (0-based) `epoch`? After the `last` step of the run always.
        Collective; the same answer on all ranks."""
        if last:
            return True
        if not has_frequency(self._config):
            return False
        decision = bool(collective.on_head(lambda: self._decide(step, epoch)))
        if decision:
            self.restart(epoch)
        return decision

    def _decide(self, step: int, epoch: int) -> bool:
        steps, epochs, seconds = self._config.freq_steps, self._config.freq_epochs, self._config.freq_s
        if steps is not None and step % steps == 0:
            return True
        if epochs is not None and epoch // epochs > self._last_epoch // epochs:
            return True
        return seconds is not None and self._clock() - self._last_s >= seconds
