"""How many groups may be in flight, and which of the finished ones a step takes, so that no group is ever too old.

Called by executor.py. Pure bookkeeping: no clock, no input or output.

The rule. Weights have versions 0, 1, 2, ...; the step at version v takes B groups and makes version v + 1. A group
started at version w holds tokens of version w or newer, so it may be trained at version D = w + eta at the latest: D
is its deadline. Let N(D) be the number of groups, running or finished, that wait for a step and whose deadline is D
or earlier. All are in time if, before the step at version v,

    (*)  N(D) <= (D - v + 1) * B   for every D >= v:   what is due by D fits into the steps v, v + 1, ..., D.

Three facts keep (*) true, so nothing is ever thrown away for being slow:

1. A group started at v has the latest deadline there is, v + eta, and changes N only from there on. `capacity` lets
   at most (eta + 1) * B groups wait, which is (*) for D = v + eta.
2. A step only goes ahead if it leaves N(D) <= (D - v) * B for every D >= v, which is (*) for version v + 1; for D = v
   it says that nothing due now stays behind. It takes the oldest finished groups, the best choice for every D.
3. A step can always go ahead in the end: once all that run have finished (each within its own limits), taking the
   oldest B leaves at most (D - v + 1) * B - B groups due by D. Groups that fail or are filtered out only lower N.

Waiting only for groups that are due at this very step would not do for eta >= 2: fast young groups would use up the
places that slow old ones need later. (A version that passes without a step breaks (*); executor.py then applies
`stale_policy`.)
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
        self.running: dict[int, int] = {}  # ordinal -> version at start
        self.ready: dict[int, int] = {}  # likewise, of finished groups

    def capacity(self) -> int:
        """Groups that may be started now; may be negative. With `num_accepted` = consumed + ready this is
        min(max_concurrent - running, (eta + version + 1) * B - (num_accepted + running)), but versions that passed
        without a full batch give no credit."""
        num_used = max(self.num_consumed, self.version * self.consumer_batch_size)
        num_places = (self.max_staleness + self.version + 1) * self.consumer_batch_size - num_used
        return min(self.max_concurrent - len(self.running), num_places - len(self.ready) - len(self.running))

    def start(self, ordinal: int) -> None:
        self.running[ordinal] = self.version

    def accept(self, ordinal: int) -> None:
        """The group finished and may be consumed."""
        self.ready[ordinal] = self.running.pop(ordinal)

    def reject(self, ordinal: int) -> None:
        """The running group will never be consumed (filtered, failed): its place is free."""
        del self.running[ordinal]

    def select(self, num_groups: int) -> list[int] | None:
        """Ordinals of the ready groups for a step of `num_groups`, in ordinal order: those started at the oldest
        version first, then by ordinal. None while too few are ready, or while a running one must be waited for."""
        if len(self.ready) < num_groups:
            return None
        chosen = sorted(self.ready, key=lambda o: (self.ready[o], o))[:num_groups]
        taken = Counter(self.ready[o] for o in chosen)
        num_taken = 0
        for version, num_due in self._due():
            num_taken += taken[version]
            if num_taken < min(num_due, num_groups):
                return None
        return sorted(chosen)

    def consume(self, ordinals: list[int]) -> None:
        for ordinal in ordinals:
            del self.ready[ordinal]
        self.num_consumed += len(ordinals)

    def awaited(self) -> list[int]:
        """Running groups that hold up the next step, however many others are ready. Any thread may call."""
        for version, num_due in self._due():
            if sum(v <= version for v in list(self.ready.values())) < num_due:
                return sorted(o for o, v in list(self.running.items()) if v <= version)
        return []

    def _due(self) -> list[tuple[int, int]]:
        """(start version w, how many of the groups started up to w the next step must take), oldest first: those that
        do not fit into the (D - version) * B places of the steps after it, up to their deadline D."""
        waiting = Counter(self.running.values()) + Counter(self.ready.values())
        due, num_up_to = [], 0
        for version in sorted(waiting):
            num_up_to += waiting[version]
            num_steps_later = max(0, version + self.max_staleness - self.version)
            due.append((version, max(0, num_up_to - num_steps_later * self.consumer_batch_size)))
        return due
