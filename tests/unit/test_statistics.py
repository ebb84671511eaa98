import numpy as np
import pytest

from vgr.metrics.statistics import mean_interval


def test_mean_interval_of_a_large_sample_is_the_normal_one_and_repeats():
    values = np.random.default_rng(1).gamma(2.0, 3.0, 2000)
    ours = mean_interval(values, draws=2000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert ours.value == pytest.approx(values.mean(), rel=1e-14) and ours.count == 2000
    assert (ours.low, ours.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert ours == mean_interval(values, draws=2000)


def test_the_interval_of_paired_differences_is_narrower_than_two_intervals():
    rng = np.random.default_rng(2)
    level = rng.normal(0, 10, 50)
    a, b = level + 1 + rng.normal(0, 0.3, 50), level + rng.normal(0, 0.3, 50)
    difference, apart = mean_interval(a - b), mean_interval(a)
    assert 0.8 < difference.low < 1 < difference.high < 1.2
    assert apart.high - apart.low > 10 * (difference.high - difference.low)


def test_mean_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        interval = mean_interval(rng.normal(2.0, 1.0, 30), draws=400)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_mean_interval_edges():
    assert mean_interval([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0, 3)
    one = mean_interval([1.5, np.nan])
    assert one.value == 1.5 and one.count == 1 and np.isnan(one.low) and np.isnan(one.high)
    assert mean_interval([np.nan]).count == 0
