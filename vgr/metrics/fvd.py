"""Frechet distances between sets of feature vectors, with their bias, an unbiased companion and an interval.

Only features of the published I3D network make a "FVD"; on others the distance is called `fd_<features>`.
Everything is float64 NumPy; D features, N and M videos.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.metrics.statistics import Interval

Array = NDArray[np.float64]

I3D = {
    "file": "i3d_torchscript.pt",
    "git_blob_sha1": "93daef59c7ae0e9e8f76225521407e60cbafa6aa",
    "source": "huggingface.co/flateon/FVD-I3D-torchscript",
}


class Moments(NamedTuple):
    """mean (D,), covariance (D,D) and the number of rows behind them."""

    mean: Array
    covariance: Array
    count: int


def moments(features_ND: ArrayLike, ddof: int = 1) -> Moments:
    """Mean and covariance (divided by N - ddof). Raises ValueError on a shape other than (N,D), N < 2 or
    NaN.
    """
    x = np.asarray(features_ND, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"features have shape {x.shape}; a covariance needs (N, D) with N of at least 2")
    if not np.isfinite(x).all():
        raise ValueError("features hold NaN or infinity; drop or recompute those videos")
    centred = x - x.mean(0)
    return Moments(x.mean(0), centred.T @ centred / (len(x) - ddof), len(x))


def frechet_distance(a_ND: ArrayLike, b_ND: ArrayLike, ddof: int = 1) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2 of two feature sets (spec 2.1).

    a_ND (N,D), b_ND (M,D); ddof 1 divides covariances by N - 1, 0 by N (StyleGAN-V, cd-fvd). Two symmetric
    eigendecompositions, so it is real and finite for N < D as well. Raises ValueError on unequal D or NaN.
    """
    return frechet_of_moments(moments(a_ND, ddof), moments(b_ND, ddof))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """The same from means and covariances."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"feature sizes differ: {a.mean.size} and {b.mean.size}; use one extractor for both sets")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ b.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave -1e-12 for equal sets


def null_bias(covariance_DD: ArrayLike, count: int) -> float:
    """Expected distance between two samples of `count` rows of one Gaussian with this covariance (spec 2.4).

    [2 tr S + sum_ij l_i l_j (1 + delta_ij) / (l_i + l_j)] / N, first order in 1/N.
    """
    eig = np.linalg.eigvalsh(np.asarray(covariance_DD, dtype=np.float64)).clip(0)
    eig = eig[eig > 1e-12 * max(eig.max(initial=0.0), 1e-300)]
    pairs = eig[:, None] * eig[None, :] / (eig[:, None] + eig[None, :])
    return float((2 * eig.sum() + pairs.sum() + np.trace(pairs)) / count)


def polynomial_mmd(
    a_ND: ArrayLike, b_MD: ArrayLike, *, subsets: int = 100, size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Unbiased squared MMD with k(x, y) = (x.y / D + 1)^3: mean and sd over random subsets (spec 2.3).

    size: rows a subset takes from either set, at most 1000 (default: 1000 or all). It may be slightly
    negative.
    """
    a, b = np.asarray(a_ND, dtype=np.float64), np.asarray(b_MD, dtype=np.float64)
    m = min(size or 1000, 1000, len(a), len(b))
    if m < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"polynomial_mmd: shapes {a.shape} and {b.shape}; needs equal D and 2 rows or more")
    kernel_aa, kernel_bb, kernel_ab = (((x @ y.T) / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    rng = np.random.default_rng(seed)
    values = np.empty(subsets)
    for s in range(subsets):
        i, j = rng.permutation(len(a))[:m], rng.permutation(len(b))[:m]
        aa, bb, ab = kernel_aa[np.ix_(i, i)], kernel_bb[np.ix_(j, j)], kernel_ab[np.ix_(i, j)]
        within = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (m * (m - 1))
        values[s] = within - 2 * ab.mean()
    return float(values.mean()), float(values.std())


def frechet_interval(
    a_ND: ArrayLike,
    b_MD: ArrayLike,
    a_video: ArrayLike,
    b_video: ArrayLike,
    *,
    draws: int = 200,
    seed: int = 0,
) -> Interval:
    """The distance with an interval from sub-samples of half of the videos, drawn without replacement.

    a_video (N,), b_video (M,): the video each row comes from; rows of one video stay together. A bootstrap
    with replacement would be biased upward (spec 2.5). The half-samples' own upward bias (half the rows) is
    not in the interval: only their spread is used, which for half-samples estimates the spread at full size
    (delete-half jackknife). count is the number of videos in a. The low end stops at 0.
    """
    a, b = np.asarray(a_ND, dtype=np.float64), np.asarray(b_MD, dtype=np.float64)
    value = frechet_distance(a, b)
    rng = np.random.default_rng(seed)

    def half(rows: Array, video: ArrayLike) -> Array:
        video = np.asarray(video)
        names = np.unique(video)
        return rows[np.isin(video, rng.permutation(names)[: len(names) // 2])]

    count = len(np.unique(np.asarray(a_video)))
    if min(count, len(np.unique(np.asarray(b_video)))) < 4:
        return Interval(value, np.nan, np.nan, count)
    spread = np.std([frechet_distance(half(a, a_video), half(b, b_video)) for _ in range(draws)], ddof=1)
    return Interval(value, max(value - 1.96 * float(spread), 0.0), value + 1.96 * float(spread), count)
