"""Means, paired differences, and tests over units: the one place of all of them (benchmarks spec, section 8).

The unit of analysis is a prompt or scene; seeds of one are averaged first. A unit without a value has failed, and is
counted: never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
DRAWS = 9999


class Interval(NamedTuple):
    """A value with its 95 % interval, the number of units behind it and of those that failed; low and high may be NaN.

    imputed: the value with every failed unit at what `mean_interval` was told, NaN where it was told nothing.
    """

    value: float
    low: float
    high: float
    count: int
    failed: int = 0
    imputed: float = np.nan


def by_unit(values: ArrayLike, units: Sequence[Hashable] | None = None) -> Array:
    """Mean of each unit's values, (U,), units in the order of their first; NaN where all of a unit's values are.

    values (V,); units (V,): the prompt or scene of each, None where every value is a unit of its own; or ValueError.
    """
    v = np.asarray(values, dtype=np.float64).ravel()
    v = np.where(np.isfinite(v), v, np.nan)
    if units is None:
        return v
    if len(units) != len(v):
        raise ValueError(f"{len(v)} values and {len(units)} units; give the prompt or scene of each value")
    order = {u: i for i, u in enumerate(dict.fromkeys(units))}
    index, known = np.array([order[u] for u in units], dtype=int), np.isfinite(v)
    total, count = (np.bincount(index[known], w, len(order)) for w in (v[known], None))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mean_interval(
    values: ArrayLike, draws: int = DRAWS, units: Sequence[Hashable] | None = None, impute: float = np.nan
) -> Interval:
    """Mean over units with its BCa bootstrap interval over units (fixed random numbers).

    values (V,), NaN: failed; of a difference a - b it is the paired interval. impute: what a failed unit counts as in
    `imputed`. One value alone has no interval (NaN); equal values have one of no width.
    """
    from scipy import stats

    every = by_unit(values, units)
    v = every[np.isfinite(every)]
    failed = every.size - v.size
    imputed = float(np.where(np.isfinite(every), every, impute).mean()) if every.size else np.nan
    if v.size < 2:
        return Interval(float(v[0]) if v.size else np.nan, np.nan, np.nan, v.size, failed, imputed)
    mean = float(v.mean())
    if np.ptp(v) <= 1e-12 * max(1.0, abs(mean)):  # BCa's acceleration is 0/0 there
        return Interval(mean, mean, mean, v.size, failed, imputed)
    low, high = stats.bootstrap(
        (v,), np.mean, n_resamples=draws, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(mean, float(low), float(high), v.size, failed, imputed)


class Paired(NamedTuple):
    """a - b over units both have: its interval, the two-sided p of a sign-flip permutation, rank-biserial correlation.

    rank_biserial: 1 where a is larger in every unit, -1 where b is; its size is that of the effect, free of units.
    """

    difference: Interval
    p: float
    rank_biserial: float


def paired(a: ArrayLike, b: ArrayLike, units: Sequence[Hashable] | None = None, draws: int = DRAWS) -> Paired:
    """Compare two columns measured on the same units, (V,) each, in the same order; failures of either are counted.

    p and rank_biserial are NaN below 2 units. The permutations are all 2^U where that is no more than draws.
    """
    from scipy import stats

    d = by_unit(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), units)
    known = d[np.isfinite(d)]
    difference = mean_interval(d, draws)
    if known.size < 2:
        return Paired(difference, np.nan, np.nan)
    test = stats.permutation_test(
        (known, np.zeros_like(known)), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples",
        vectorized=True, n_resamples=draws, rng=np.random.default_rng(0),
    )  # fmt: skip
    moved = known[known != 0]
    ranks = stats.rankdata(np.abs(moved))
    effect = float((np.sign(moved) * ranks).sum() / ranks.sum()) if moved.size else 0.0
    return Paired(difference, float(test.pvalue), effect)


def discoveries(p_values: ArrayLike, q: float = 0.05) -> NDArray[np.bool_]:
    """Which tests of one family, (K,) p values, stand at false-discovery rate q (Benjamini-Hochberg); NaN never do."""
    from scipy import stats

    p = np.asarray(p_values, dtype=np.float64)
    found = np.zeros(p.shape, dtype=bool)
    known = np.isfinite(p)
    if known.any():
        found[known] = stats.false_discovery_control(p[known], method="bh") <= q
    return found
