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
    """Mean of each unit's values (V,), (U,) in order of first appearance; NaN where all of them are.

    units (V,): the prompt or scene of each, None where every value is a unit of its own; or ValueError.
    """
    v = np.asarray(values, dtype=np.float64).ravel()
    v = np.where(np.isfinite(v), v, np.nan)
    if units is None:
        return v
    if len(units) != len(v):
        raise ValueError(f"{len(v)} values and {len(units)} units; give the prompt or scene of each value")
    own = [v[[u == unit for u in units]] for unit in dict.fromkeys(units)]
    return np.array([x[np.isfinite(x)].mean() if np.isfinite(x).any() else np.nan for x in own])


def mean_interval(
    values: ArrayLike, draws: int = 9999, units: Sequence[Hashable] | None = None, impute: float = np.nan
) -> Interval:
    """Mean over units with its BCa bootstrap interval (fixed random numbers); of a - b it is the paired one.

    values (V,), NaN: failed. impute: what a failed unit counts as in `imputed`. One value alone has no interval (NaN);
    equal values have one of no width.
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
    found = stats.bootstrap((v,), np.mean, n_resamples=draws, method="BCa", rng=np.random.default_rng(0))
    return Interval(mean, *map(float, found.confidence_interval), v.size, failed, imputed)


def paired(
    a: ArrayLike, b: ArrayLike, units: Sequence[Hashable] | None = None, draws: int = 9999
) -> tuple[Interval, float, float]:
    """a - b of two columns (V,) of the same videos: its interval over units both have, failures of either counted; the
    two-sided p of sign flips, all 2^U where they are no more than draws; and the rank-biserial correlation, 1 where a
    is larger in every unit, -1 where b is. The last two are NaN below 2 units."""
    from scipy import stats

    d = by_unit(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), units)
    known = d[np.isfinite(d)]
    difference = mean_interval(d, draws)
    if known.size < 2:
        return difference, np.nan, np.nan
    test = stats.permutation_test(
        (known, np.zeros_like(known)), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples",
        vectorized=True, n_resamples=draws, rng=np.random.default_rng(0),
    )  # fmt: skip
    moved = known[known != 0]
    ranks = stats.rankdata(np.abs(moved))
    return difference, float(test.pvalue), float((np.sign(moved) * ranks).sum() / max(ranks.sum(), 1.0))


def crossed(values_SC: ArrayLike) -> tuple[Interval, float]:
    """Mean over training seeds (S) and clips (C) that are both a sample: its 95 % interval, and the two-sided p of it
    being zero; of a - b of two arms, seed by seed and clip by clip, they are the paired ones.

    By the mean squares of the two-way layout, MS_S + MS_C - MS_SC with Satterthwaite's degrees of freedom (the quasi-F
    of Clark 1973), never below the larger of MS_S and MS_C. A bootstrap of three seeds is too narrow; over clips alone,
    or over seeds alone, the other's spread is missing. One column: Student's interval over seeds. One seed: over
    clips, without a p, since another seed might have said otherwise. A clip that has no value in some seed has failed.
    """
    from scipy import stats

    every = np.atleast_2d(np.asarray(values_SC, dtype=np.float64))
    v = every[:, np.isfinite(every).all(0)]
    (seeds, clips), failed = v.shape, every.shape[1] - v.shape[1]
    if not v.size:
        return Interval(np.nan, np.nan, np.nan, 0, failed), np.nan
    mean, free = float(v.mean()), np.array([seeds - 1, clips - 1, (seeds - 1) * (clips - 1)])
    effects = [v.mean(1, keepdims=True) - mean, v.mean(0, keepdims=True) - mean]
    squares = np.array([(np.broadcast_to(x, v.shape) ** 2).sum() for x in (*effects, v - mean - sum(effects))])
    if not free[:2].any():
        return Interval(mean, np.nan, np.nan, clips, failed), np.nan
    terms = np.where(free > 0, squares / np.maximum(free, 1), 0.0) * (1, 1, -1)
    largest = int(terms[1] > terms[0])
    whole = max(terms.sum(), terms[largest])
    if whole <= 1e-24 * max(1.0, mean * mean):  # equal values, but for rounding
        return Interval(mean, mean, mean, clips, failed), (float(mean == 0) if seeds > 1 else np.nan)
    dof = free[largest] if whole == terms[largest] else whole**2 / (terms**2 / np.maximum(free, 1)).sum()
    error = np.sqrt(whole / v.size)
    half = float(stats.t.ppf(0.975, dof) * error)
    p = float(2 * stats.t.sf(abs(mean) / error, dof)) if seeds > 1 else np.nan
    return Interval(mean, mean - half, mean + half, clips, failed), p


def discoveries(p_values: ArrayLike, q: float = 0.05) -> NDArray[np.bool_]:
    """Which tests of one family, (K,) p values, stand at false-discovery rate q (Benjamini-Hochberg); NaN never do."""
    from scipy import stats

    p = np.asarray(p_values, dtype=np.float64)
    found, known = np.zeros(p.shape, dtype=bool), np.isfinite(p)
    if known.any():
        found[known] = stats.false_discovery_control(p[known], method="bh") <= q
    return found
