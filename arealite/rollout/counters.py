"""What happened since the last step: counts and means, drained by the trainer after each step.

Written by the client's asyncio loop, drained through it; so one thread only.
"""

from __future__ import annotations

from collections import Counter

COUNTS = (
    "num_issued",
    "num_accepted",
    "num_rejected",
    "num_failed",
    "num_retries",
    "num_reward_errors",
    "num_stale",
    "num_generated_tokens",
    "num_interruptions",
    "num_request_failures",
    "num_request_timeouts",
    "num_unexpected_versions",
)


class Counters:
    """Counts of events (present even when 0), means and largest values of observations."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._observed: dict[str, list[float]] = {}

    def add(self, name: str, number: int) -> None:
        if name not in COUNTS:
            raise KeyError(name)
        self._counts[name] += number

    def observe(self, name: str, value: float) -> None:
        self._observed.setdefault(name, []).append(value)

    def drain(self) -> dict[str, float]:
        """Counts under their names, observations as `NAME` (mean) and `NAME_max`; then all start from 0."""
        drained = {name: float(self._counts[name]) for name in COUNTS}
        for name, values in self._observed.items():
            drained[name] = sum(values) / len(values)
            drained[f"{name}_max"] = max(values)
        self._counts.clear()
        self._observed.clear()
        return drained
