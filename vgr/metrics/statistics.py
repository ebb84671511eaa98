"""Intervals and trends over videos. The unit of analysis is one video (benchmarks spec, section 8)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A value with its 95 % interval and the number of videos behind it; low and high may be NaN."""

    value: float
    low: float
    high: float
    count: int


def mean_interval(values: ArrayLike, *, method: str = "BCa", draws: int = 9999, seed: int = 0) -> Interval:
    """Mean of one number per video with a bootstrap interval over videos (fixed random numbers).

    values (V,), NaN entries are left out and not counted. method: "BCa" or "percentile". One value alone has
    no interval (NaN); equal values have an interval of no width.
    """
    from scipy import stats

    v = np.asarray(values, dtype=np.float64).ravel()
    v = v[np.isfinite(v)]
    if v.size == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(v.mean())
    if v.size == 1:
        return Interval(mean, np.nan, np.nan, 1)
    if np.ptp(v) <= 1e-12 * max(1.0, abs(mean)):  # BCa's acceleration is 0/0 there
        return Interval(mean, mean, mean, v.size)
    result = stats.bootstrap(
        (v,),
        np.mean,
        n_resamples=draws,
        confidence_level=0.95,
        method=method,
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high), v.size)


def paired_difference(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Interval:
    """Mean of a - b over videos present in both, with a BCa interval of the difference itself.

    a, b (V,) in the same order of videos. Raises ValueError when their lengths differ.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"paired_difference: a has shape {x.shape}, b {y.shape}; give the same videos in one order")
    return mean_interval(x - y, seed=seed)


def theil_sen(values: ArrayLike, times: ArrayLike) -> float:
    """Median of the slopes between all pairs of points, in units of values per unit of times; NaN below 2
    points.
    """
    from scipy import stats

    y, x = np.asarray(values, dtype=np.float64), np.asarray(times, dtype=np.float64)
    keep = np.isfinite(y)
    return float(stats.theilslopes(y[keep], x[keep])[0]) if keep.sum() >= 2 else float("nan")


def wilson(successes: int, count: int) -> Interval:
    """A share with Wilson's 95 % score interval. Raises ValueError unless 0 <= successes <= count, count >
    0.
    """
    from scipy import stats

    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"wilson: successes={successes} of count={count}; needs 0 <= successes <= count, count > 0")
    low, high = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    return Interval(successes / count, float(low), float(high), count)
