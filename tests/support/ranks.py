"""Trainer ranks without torch: one rank alone, or threads that meet in every call. Used by tests of collective code."""

import pickle
import threading

from arealite.api.errors import ArealiteError


class Alone:
    """api.protocols.Collective of a single rank."""

    rank, world_size, num_shares, divisions = 0, 1, 1, (1,)

    @property
    def background(self):
        return self

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value]

    def on_head(self, act):
        return act()

    def barrier(self, what):
        pass


class Meeting:
    """Threads as ranks: every call is a meeting of all, with a limit; ranks that make different calls fail at once."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.num_scatters = 0
        self.gate = threading.Barrier(world_size)
        self.brought = [None] * world_size
        self._lock, self._background = threading.Lock(), None

    @property
    def background(self):
        """A meeting of the ranks' other threads."""
        with self._lock:
            self._background = self._background or Meeting(self.world_size)
            return self._background

    def of(self, rank):
        return One(self, rank)


class One:
    """One rank of a meeting."""

    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.world_size = meeting, rank, meeting.world_size
        self.num_shares, self.divisions = self.world_size, (self.world_size,)

    @property
    def background(self):
        return self.meeting.background.of(self.rank)

    def _meet(self, call, value):
        meeting = self.meeting
        meeting.brought[self.rank] = (call, pickle.dumps(value))
        meeting.gate.wait(timeout=20)
        brought = list(meeting.brought)
        meeting.gate.wait(timeout=20)
        assert len({call for call, _ in brought}) == 1, f"ranks are in different calls: {[c for c, _ in brought]}"
        return [pickle.loads(value) for _, value in brought]

    def scatter(self, shares):
        self.meeting.num_scatters += self.rank == 0
        return self._meet("scatter", shares)[0][self.rank]

    def broadcast(self, value):
        return self._meet("broadcast", value)[0]

    def gather(self, value):
        return self._meet("gather", value)

    def barrier(self, what):
        self._meet(f"barrier {what}", None)

    def on_head(self, act):
        outcome = None
        if self.rank == 0:
            try:
                outcome = act()
            except ArealiteError as error:
                self.broadcast(error)
                raise
        outcome = self.broadcast(outcome)
        if isinstance(outcome, ArealiteError):
            raise outcome
        return outcome


def on_ranks(meeting, call):
    """Runs call(rank) in one thread per rank; what each returned, or the ArealiteError that it raised."""
    outcomes, unexpected = [None] * meeting.world_size, []

    def run(rank):
        try:
            outcomes[rank] = call(rank)
        except ArealiteError as error:
            outcomes[rank] = error
        except BaseException as error:
            unexpected.append(error)
            meeting.gate.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(meeting.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    if unexpected:
        raise unexpected[0]
    return outcomes
