"""When recurring things are due: steps, epochs, seconds; alone, after a resume, and on several ranks."""

import pytest
from support.ranks import Alone, Meeting, on_ranks

from arealite.api.cli_args import FrequencyConfig
from arealite.observe.frequency import Frequency


def due_steps(frequency, steps, epoch_of=lambda step: 0):
    return [step for step in steps if frequency.due(step, epoch_of(step), Alone())]


def test_nothing_given_is_never_and_silent():
    assert not any(Frequency(FrequencyConfig()).due(step, 0, None) for step in range(1, 50))


def test_the_last_step_is_always_one():
    assert all(Frequency(config).due(7, 0, None, last=True) for config in (FrequencyConfig(), FrequencyConfig(2)))


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
        if frequency.due(step, 0, Alone()):
            due.append(step)
    assert due == list(range(3, 31, 3))


def test_rank_0_decides_for_all():
    """Rank 1's clock is faster and its epoch another one."""
    now = [0.0, 0.0]
    frequencies = [Frequency(FrequencyConfig(freq_s=10.0), lambda r=r: now[r]) for r in range(2)]
    meeting = Meeting(2)
    ranks = [meeting.of(0), meeting.of(1)]

    def due(rank):
        found = []
        for step in range(1, 20):
            now[rank] += (3, 7)[rank]
            found.append(frequencies[rank].due(step, 99 * rank, ranks[rank]))
        return found

    head, other = on_ranks(meeting, due)
    assert head == other
    assert any(head) and not all(head)
