"""What happened since the last step: counts and means, which the trainer drains after each step.

Written by executor.py, generate.py and router.py, in the client's asyncio loop.
"""

from __future__ import annotations

from collections import Counter, defaultdict

# Reported also when they are 0.
COUNTS = (
    "num_issued", "num_accepted", "num_rejected", "num_failed", "num_untrained", "num_retries", "num_reward_errors",
    "num_stale", "num_generated_tokens", "num_interruptions", "num_request_failures", "num_request_timeouts",
    "num_requests_moved", "num_server_failures", "num_servers_joined", "num_servers_drained", "num_unexpected_versions",
)  # fmt: skip


class Counters:
    """Counts and observations. `num_events`: answers, failures and ended groups since the start; it shows a waiting
    caller that something happens."""

    def __init__(self) -> None:
        self.num_events = 0
        self._counts: Counter[str] = Counter()
        self._observed: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, number: int = 1) -> None:
        self._counts[name] += number

    def observe(self, name: str, value: float) -> None:
        self._observed[name].append(value)

    def drain(self) -> dict[str, float]:
        """Counts under their names; observations as NAME_mean and NAME_max, the mean of seconds (NAME_s) as NAME_s.
        Then all start from 0."""
        drained = {name: float(self._counts[name]) for name in COUNTS}
        for name, values in self._observed.items():
            drained[name if name.endswith("_s") else f"{name}_mean"] = sum(values) / len(values)
            drained[f"{name}_max"] = max(values)
        self._counts.clear()
        self._observed.clear()
        return drained
