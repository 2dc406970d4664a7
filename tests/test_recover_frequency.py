"""When recurring things are due: steps, epochs, seconds; alone, after a resume, and on several ranks."""

import pytest
from support.ranks import Alone, Meeting, on_ranks

from arealite.api.run_args import FrequencyConfig
from arealite.observe.frequency import Frequency


def due_steps(frequency, steps):
    return [step for step in steps if frequency.due(step, step // 3, Alone())]


@pytest.mark.parametrize("first", [1, 4, 5, 6, 8])
def test_steps_and_epochs_are_due_after_a_resume_as_before(first):
    """The run begins, or goes on, with step `first`; an epoch has three steps."""
    for config, wanted in ((FrequencyConfig(freq_steps=4), [4, 8, 12]), (FrequencyConfig(freq_epochs=2), [6, 12])):
        frequency = Frequency(config)
        frequency.restart((first - 1) // 3)
        assert due_steps(frequency, range(first, 15)) == [step for step in wanted if step >= first]


def test_nothing_given_is_never_and_silent_and_the_last_step_is_always_one():
    assert not any(Frequency(FrequencyConfig()).due(step, 0, None) for step in range(1, 50))
    assert all(Frequency(config).due(7, 0, None, last=True) for config in (FrequencyConfig(), FrequencyConfig(2)))


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
