"""When recurring things are due: steps, epochs, seconds; alone, after a resume, and on several ranks."""

import pytest

from arealite.api.cli_args import FrequencyConfig
from arealite.observe.frequency import Frequency


class Rank:
    """One rank whose broadcasts come from a shared list (rank 0 appends, others read)."""

    def __init__(self, rank=0, channel=None):
        self.rank, self.world_size = rank, 1 if channel is None else 2
        self.channel = channel if channel is not None else []
        self.read = 0

    def broadcast(self, value):
        if self.rank == 0:
            self.channel.append(value)
        self.read += 1
        return self.channel[self.read - 1]


def due_steps(frequency, steps, epoch_of=lambda step: 0, collective=None):
    collective = collective or Rank()
    return [step for step in steps if frequency.due(step, epoch_of(step), collective)]


def test_nothing_given_is_never_and_silent():
    collective = Rank()
    assert due_steps(Frequency(FrequencyConfig()), range(1, 50), collective=collective) == []
    assert collective.channel == []


def test_steps():
    assert due_steps(Frequency(FrequencyConfig(freq_steps=4)), range(1, 14)) == [4, 8, 12]


@pytest.mark.parametrize("resumed_at", [3, 4, 5])
def test_a_resumed_run_is_due_at_the_same_steps(resumed_at):
    frequency = Frequency(FrequencyConfig(freq_steps=4))
    assert due_steps(frequency, range(resumed_at + 1, 13)) == [step for step in (4, 8, 12) if step > resumed_at]


def test_epochs():
    frequency = Frequency(FrequencyConfig(freq_epochs=2))
    assert due_steps(frequency, range(1, 16), lambda step: step // 3) == [6, 12]
    resumed = Frequency(FrequencyConfig(freq_epochs=2))
    resumed.restart(2)  # at step 7, in epoch 2
    assert due_steps(resumed, range(8, 16), lambda step: step // 3) == [12]


def test_seconds():
    now = [100.0]
    frequency = Frequency(FrequencyConfig(freq_s=10.0), lambda: now[0])
    due = []
    for step in range(1, 31):
        now[0] += 4
        if frequency.due(step, 0, Rank()):
            due.append(step)
    assert due == list(range(3, 31, 3))


def test_rank_0_decides_for_all():
    channel = []
    slow, fast = [0.0], [0.0]
    head = Frequency(FrequencyConfig(freq_s=10.0), lambda: slow[0])
    other = Frequency(FrequencyConfig(freq_s=10.0), lambda: fast[0])
    head_rank, other_rank = Rank(0, channel), Rank(1, channel)
    for step in range(1, 20):
        slow[0] += 3
        fast[0] += 7
        assert head.due(step, 0, head_rank) == other.due(step, 99, other_rank)
    assert any(channel) and not all(channel)
