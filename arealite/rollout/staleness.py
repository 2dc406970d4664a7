"""How many groups may be in flight, and which of the finished ones a step takes, so that no group is ever too old.

Called by executor.py with what its table holds. Pure rules: no state, no clock, no input or output.

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
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StalenessBound:
    """Counts in prompt groups. `running` and `ready` are {ordinal of a group: version when it was started}; `version`
    is that of the current weights.

    Args:
        max_staleness: eta, how many versions a trained token may be behind.
        batch_size: B, groups per step.
        max_concurrent: groups running at one time.
    """

    max_staleness: int
    batch_size: int
    max_concurrent: int

    def capacity(self, version: int, num_consumed: int, num_running: int, num_ready: int) -> int:
        """Groups that may be started now; may be negative. With `num_accepted` = consumed + ready this is
        min(max_concurrent - running, (eta + version + 1) * B - (num_accepted + running)), but versions that passed
        without a full batch give no credit."""
        num_used = max(num_consumed, version * self.batch_size)
        num_places = (self.max_staleness + version + 1) * self.batch_size - num_used
        return min(self.max_concurrent - num_running, num_places - num_ready - num_running)

    def select(
        self, version: int, running: Mapping[int, int], ready: Mapping[int, int], num_groups: int
    ) -> list[int] | None:
        """Ordinals of the ready groups for a step of `num_groups`, in ordinal order: those started at the oldest
        version first, then by ordinal. None while too few are ready, or while a running one must be waited for."""
        if len(ready) < num_groups:
            return None
        chosen = sorted(ready, key=lambda o: (ready[o], o))[:num_groups]
        taken = Counter(ready[o] for o in chosen)
        num_taken = 0
        for started, num_due in self.due(version, running, ready):
            num_taken += taken[started]
            if num_taken < min(num_due, num_groups):
                return None
        return sorted(chosen)

    def awaited(self, version: int, running: Mapping[int, int], ready: Mapping[int, int]) -> list[int]:
        """Running groups that hold up the next step, however many others are ready."""
        for started, num_due in self.due(version, running, ready):
            if sum(v <= started for v in ready.values()) < num_due:
                return sorted(o for o, v in running.items() if v <= started)
        return []

    def due(self, version: int, running: Mapping[int, int], ready: Mapping[int, int]) -> list[tuple[int, int]]:
        """(start version w, how many of the groups started up to w the next step must take), oldest first: those that
        do not fit into the (D - version) * B places of the steps after it, up to their deadline D."""
        waiting = Counter(running.values()) + Counter(ready.values())
        due, num_up_to = [], 0
        for started in sorted(waiting):
            num_up_to += waiting[started]
            num_steps_later = max(0, started + self.max_staleness - version)
            due.append((started, max(0, num_up_to - num_steps_later * self.batch_size)))
        return due
