"""StatsTracker: the last scalar counts, timers add up, an export starts anew."""

import pytest

from arealite.observe.stats import StatsTracker


def test_the_last_scalar_counts_and_an_export_starts_anew():
    stats = StatsTracker()
    stats.scalar("lr", 1.0)
    stats.update({"lr": 2, "loss": 0.5})
    assert stats.export() == {"lr": 2.0, "loss": 0.5}
    assert stats.export() == {}


def test_timer_adds_up_also_through_errors():
    stats = StatsTracker()
    with stats.timer("sync"):
        pass
    first = stats._values["sync_s"]
    with pytest.raises(RuntimeError), stats.timer("sync"):
        raise RuntimeError
    assert 0 <= first < stats.export()["sync_s"]
