import numpy as np
import pytest
from scipy import stats

from vgr.metrics.statistics import mean_interval, paired_difference, theil_sen, wilson


@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_mean_interval_equals_scipy_bootstrap(method):
    values = np.random.default_rng(1).gamma(2.0, 3.0, 40)
    ours = mean_interval(values, method=method, draws=999, seed=5)
    rng = np.random.default_rng(5)
    ref = stats.bootstrap((values,), np.mean, n_resamples=999, method=method, rng=rng).confidence_interval
    assert ours.value == pytest.approx(values.mean(), rel=1e-14)
    assert (ours.low, ours.high) == pytest.approx((ref.low, ref.high), rel=1e-12)
    assert ours == mean_interval(values, method=method, draws=999, seed=5)


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


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(2)
    level = rng.normal(0, 10, 50)
    a, b = level + 1 + rng.normal(0, 0.3, 50), level + rng.normal(0, 0.3, 50)
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx((a - b).mean())
    assert 0.8 < difference.low < 1 < difference.high < 1.2
    apart = mean_interval(a)
    assert apart.high - apart.low > 10 * (difference.high - difference.low)
    with pytest.raises(ValueError, match="same videos"):
        paired_difference(a, b[:-1])


def test_theil_sen_is_the_median_of_pairwise_slopes():
    rng = np.random.default_rng(3)
    t = np.sort(rng.uniform(0, 10, 15))
    y = 0.7 * t + rng.normal(0, 0.2, 15)
    y[4] = 100.0
    i, j = np.triu_indices(15, 1)
    assert theil_sen(y, t) == pytest.approx(np.median((y[j] - y[i]) / (t[j] - t[i])), rel=1e-12)
    assert abs(theil_sen(y, t) - 0.7) < 0.1
    assert theil_sen([1.0, np.nan, 3.0], [0.0, 1.0, 2.0]) == 1.0


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (37, 80)])
def test_wilson_closed_form(k, n):
    z = stats.norm.ppf(0.975)
    p = k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    ours = wilson(k, n)
    assert (ours.low, ours.high) == pytest.approx((max(centre - half, 0), min(centre + half, 1)), abs=1e-9)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="successes=5"):
        wilson(5, 4)
