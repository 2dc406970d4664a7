"""How many groups may be in flight, and which of the finished ones a step takes, so that no group is ever too old.

Called by executor.py. Pure bookkeeping: no clock, no input or output.

The bound. A group started at version w may be trained at version w + eta at the latest: its deadline. Each step takes
B groups. Admission keeps at most (eta + 1) * B groups unconsumed, and a step only goes ahead when, for every deadline
D, the groups with deadlines up to D that stay behind fit into the steps that are left before D has passed, that is
(D - version) * B of them. By induction over steps the groups due now are never more than B, so the step can always
take them all, and nothing has to be thrown away for being slow. (Waiting only for the groups that are due now is not
enough for eta >= 2: fast young groups would use up the places of slow old ones.)
"""

from __future__ import annotations

from collections import Counter


class StalenessManager:
    """Counts in prompt groups. A group is identified by its ordinal.

    Args:
        max_staleness: eta, how many versions a trained token may be behind.
        consumer_batch_size: B, groups per step.
        max_concurrent: groups running at one time.
    """

    def __init__(self, max_staleness: int, consumer_batch_size: int, max_concurrent: int) -> None:
        self.max_staleness = max_staleness
        self.consumer_batch_size = consumer_batch_size
        self.max_concurrent = max_concurrent
        self.version = 0
        self.num_consumed = 0
        self._running: dict[int, int] = {}  # ordinal -> version at start
        self._ready: dict[int, int] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_accepted(self) -> int:
        """Groups that finished well and passed the filter: consumed or ready."""
        return self.num_consumed + len(self._ready)

    def capacity(self) -> int:
        """Groups that may be started now; may be negative."""
        size, ahead = self.consumer_batch_size, self.max_staleness + 1
        outstanding = len(self._running) + len(self._ready)
        return min(
            self.max_concurrent - len(self._running),
            (self.version + ahead) * size - (self.num_accepted + len(self._running)),
            ahead * size - outstanding,  # versions that passed without a full batch give no credit
        )

    def start(self, ordinal: int) -> None:
        self._running[ordinal] = self.version

    def accept(self, ordinal: int) -> None:
        """The group finished and may be consumed."""
        self._ready[ordinal] = self._running.pop(ordinal)

    def reject(self, ordinal: int) -> None:
        """The running group will never be consumed (filtered, failed): its place is free."""
        del self._running[ordinal]

    def discard(self, ordinal: int) -> None:
        """A ready group is not used after all (too old)."""
        del self._ready[ordinal]

    def restore(self, ordinal: int, started_version: int) -> None:
        """A ready group of a recovery point."""
        self._ready[ordinal] = started_version

    def started_version(self, ordinal: int) -> int:
        """The version at which a running or ready group was started."""
        return self._ready[ordinal] if ordinal in self._ready else self._running[ordinal]

    def select(self, num_groups: int) -> list[int] | None:
        """Ordinals of the ready groups for a step of `num_groups`, in ordinal order: those started at the oldest
        version first, then by ordinal. None while too few are ready, or while a running one must be waited for."""
        if len(self._ready) < num_groups:
            return None
        chosen = sorted(self._ready, key=lambda o: (self._ready[o], o))[:num_groups]
        taken = Counter(self._ready[o] for o in chosen)
        num_taken = 0
        for version, num_due in self._due():
            num_taken += taken[version]
            if num_taken < min(num_due, num_groups):
                return None
        return sorted(chosen)

    def consume(self, ordinals: list[int]) -> None:
        for ordinal in ordinals:
            del self._ready[ordinal]
        self.num_consumed += len(ordinals)

    def awaited(self) -> list[int]:
        """Running groups that hold up the next step, however many others are ready. Any thread may call."""
        for version, num_due in self._due():
            if sum(v <= version for v in list(self._ready.values())) < num_due:
                return sorted(o for o, v in list(self._running.items()) if v <= version)
        return []

    def _due(self) -> list[tuple[int, int]]:
        """(version, how many of the groups started up to it the next step must take at least), oldest first."""
        outstanding = Counter(self._running.values()) + Counter(self._ready.values())
        due, num_up_to = [], 0
        for version in sorted(outstanding):
            num_up_to += outstanding[version]
            steps_left = max(0, version + self.max_staleness - self.version)
            due.append((version, max(0, num_up_to - steps_left * self.consumer_batch_size)))
        return due
