"""Means with intervals over videos. The unit of analysis is one video (benchmarks spec, section 8)."""

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


def mean_interval(values: ArrayLike, draws: int = 9999) -> Interval:
    """Mean of one number per video with its BCa bootstrap interval over videos (fixed random numbers).

    values (V,), NaN entries are left out and not counted; of a difference a - b it is the paired interval. One
    value alone has no interval (NaN); equal values have an interval of no width.
    """
    from scipy import stats

    v = np.asarray(values, dtype=np.float64).ravel()
    v = v[np.isfinite(v)]
    if v.size < 2:
        return Interval(float(v[0]) if v.size else np.nan, np.nan, np.nan, v.size)
    mean = float(v.mean())
    if np.ptp(v) <= 1e-12 * max(1.0, abs(mean)):  # BCa's acceleration is 0/0 there
        return Interval(mean, mean, mean, v.size)
    low, high = stats.bootstrap(
        (v,), np.mean, n_resamples=draws, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(mean, float(low), float(high), v.size)
