"""StatsTracker: means do not depend on how values are cut into calls; kinds do not mix."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.observe.stats import StatsTracker


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 7))
def test_mean_does_not_depend_on_the_cut(values, width):
    stats = StatsTracker()
    for start in range(0, len(values), width):
        part = values[start : start + width]
        stats.mean("x", sum(part), len(part))
    assert stats.export()["x"] == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_mean_of_unequal_parts_is_not_the_mean_of_means():
    stats = StatsTracker()
    stats.masked_mean("x", np.array([1.0, 1.0, 1.0, 50.0]), np.array([True, True, True, False]))
    stats.masked_mean("x", np.array([[5.0]]), np.array([[True]]))
    assert stats.export()["x"] == 2.0


def test_masked_nan_does_not_leak():
    stats = StatsTracker()
    stats.masked_mean("x", np.array([2.0, np.nan]), np.array([True, False]))
    assert stats.export() == {"x": 2.0}


def test_mean_of_nothing_is_left_out():
    stats = StatsTracker()
    stats.mean("x", 0.0, 0)
    assert stats.export() == {}


def test_each_kind_and_the_drain():
    stats = StatsTracker()
    stats.scalar("lr", 1.0)
    stats.scalar("lr", 2.0)
    stats.count("retries")
    stats.count("retries", 3)
    stats.maximum("gap", -5.0)
    stats.maximum("gap", -7.0)
    stats.update({"loss": 0.5})
    assert stats.export() == {"lr": 2.0, "retries": 4.0, "gap": -5.0, "loss": 0.5}
    assert stats.export() == {}
    stats.count("lr")  # a new step, so the name is free again


def test_maximum_keeps_nan():
    stats = StatsTracker()
    for value in (1.0, math.nan, 2.0):
        stats.maximum("gap", value)
    assert math.isnan(stats.export()["gap"])


def test_timer_adds_up_also_through_errors():
    stats = StatsTracker()
    with stats.timer("sync"):
        pass
    first = stats._values["sync_s"]
    with pytest.raises(RuntimeError), stats.timer("sync"):
        raise RuntimeError
    assert 0 <= first < stats.export()["sync_s"]


def test_one_name_one_kind():
    stats = StatsTracker()
    stats.count("x")
    with pytest.raises(ValueError, match="'x' is a count"):
        stats.mean("x", 1.0, 1)
    with pytest.raises(ValueError, match="denominator is -1"):
        stats.mean("y", 1.0, -1)
