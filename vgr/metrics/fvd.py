"""Frechet distances between sets of feature vectors, with their bias and an interval.

Only features of the published I3D network make a "FVD"; on others the distance is called `fd_<features>`.
Everything is float64 NumPy; D features, N and M rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.metrics.statistics import Interval

Array = NDArray[np.float64]


def moments(features_ND: ArrayLike, ddof: int = 1) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D,D), divided by N - ddof. Raises ValueError unless (N,D) with N >= 2, or on NaN."""
    x = np.asarray(features_ND, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"features have shape {x.shape}; a covariance needs (N, D) with N of at least 2")
    if not np.isfinite(x).all():
        raise ValueError("features hold NaN or infinity; drop or recompute those videos")
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / (len(x) - ddof)


def frechet_distance(a_ND: ArrayLike, b_MD: ArrayLike, ddof: int = 1) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2 of two feature sets (spec 2.1).

    a_ND (N,D), b_MD (M,D); ddof 1 divides covariances by N - 1, 0 by N (StyleGAN-V, cd-fvd). Two symmetric
    eigendecompositions, so it is real and finite for N < D as well. Raises ValueError on unequal D or NaN.
    """
    (mean_a, cov_a), (mean_b, cov_b) = moments(a_ND, ddof), moments(b_MD, ddof)
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"feature sizes differ: {mean_a.size} and {mean_b.size}; use one extractor for both sets")
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ cov_b @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave -1e-12 for equal sets


def null_bias(covariance_DD: ArrayLike, n: int, m: int) -> float:
    """Expected distance between samples of n and m rows of one Gaussian with this covariance (spec 2.4).

    [2 tr S + sum_ij l_i l_j (1 + delta_ij) / (l_i + l_j)] (1/n + 1/m) / 2, first order in 1/n and 1/m.
    """
    eig = np.linalg.eigvalsh(np.asarray(covariance_DD, dtype=np.float64)).clip(0)
    eig = eig[eig > 1e-12 * max(eig.max(initial=0.0), 1e-300)]
    pairs = eig[:, None] * eig[None, :] / (eig[:, None] + eig[None, :])
    return float(2 * eig.sum() + pairs.sum() + np.trace(pairs)) * (1 / n + 1 / m) / 2


def frechet_interval(
    a_ND: ArrayLike, b_MD: ArrayLike, a_video: ArrayLike, b_video: ArrayLike, draws: int = 200
) -> Interval:
    """The distance with an interval from sub-samples of half of the videos, drawn without replacement.

    a_video (N,), b_video (M,): the video each row comes from; rows of one video stay together. A bootstrap
    with replacement would be biased upward (spec 2.5). The half-samples' own upward bias (half the rows) is
    not in the interval: only their spread is used, which for half-samples estimates the spread at full size
    (delete-half jackknife). count is the number of videos in a; below 4 videos there is no interval (NaN).
    """
    a, b = np.asarray(a_ND, dtype=np.float64), np.asarray(b_MD, dtype=np.float64)
    value = frechet_distance(a, b)
    rng = np.random.default_rng(0)

    def half(rows: Array, video: ArrayLike) -> Array:
        names = np.unique(video)
        return rows[np.isin(video, rng.permutation(names)[: len(names) // 2])]

    count = len(np.unique(a_video))
    if min(count, len(np.unique(b_video))) < 4:
        return Interval(value, np.nan, np.nan, count)
    spread = np.std([frechet_distance(half(a, a_video), half(b, b_video)) for _ in range(draws)], ddof=1)
    return Interval(value, max(value - 1.96 * float(spread), 0.0), value + 1.96 * float(spread), count)


def frechet_gain(a_VWD: ArrayLike, b_VWD: ArrayLike, truth_VWD: ArrayLike, draws: int = 400) -> Interval:
    """How much nearer to the truth a lies than b, FD(b, truth) - FD(a, truth), with a paired interval over videos.

    a_VWD, b_VWD, truth_VWD (V,W,D): W windows of the same V videos. Every draw takes one random half of the videos in
    all three, and the spread of the difference makes the interval, as in `frechet_interval`. ValueError unless the
    shapes are equal and there are 4 videos or more.
    """
    a, b, truth = (np.asarray(x, dtype=np.float64) for x in (a_VWD, b_VWD, truth_VWD))
    if a.ndim != 3 or not a.shape == b.shape == truth.shape or len(a) < 4:
        raise ValueError(
            f"features have shapes {a.shape}, {b.shape} and {truth.shape}; a paired comparison needs three equal "
            "(videos, windows, features) of 4 videos or more"
        )

    def gain(videos: NDArray[np.int64]) -> float:
        ours, others, known = (x[videos].reshape(-1, x.shape[-1]) for x in (a, b, truth))
        return frechet_distance(others, known) - frechet_distance(ours, known)

    rng = np.random.default_rng(0)
    value = gain(np.arange(len(a)))
    half = 1.96 * float(np.std([gain(rng.permutation(len(a))[: len(a) // 2]) for _ in range(draws)], ddof=1))
    return Interval(value, value - half, value + half, len(a))
