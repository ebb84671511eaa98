"""Distances between sets of feature vectors: Frechet and MMD, their bias, intervals and statistics files.

Only features of the published I3D network make a "FVD"; on others the distance is called `fd_<features>`. Everything
is float64 NumPy; D features, N and M rows. Features stream: `Moments` of any split merge to those of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.geometry.camera_file import arrays
from vgr.metrics.statistics import Interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """count of rows, their mean (D,) and the sum of outer products of centred rows (D,D)."""

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features_ND: ArrayLike) -> Moments:
        """Of (N,D) features. Raises ValueError unless N >= 1, or on NaN."""
        x = np.asarray(features_ND, dtype=np.float64)
        if x.ndim != 2 or x.shape[0] < 1:
            raise ValueError(f"features have shape {x.shape}; needed are (N, D) with N of at least 1")
        if not np.isfinite(x).all():
            raise ValueError("features hold NaN or infinity; drop or recompute those videos")
        centred = x - x.mean(0)
        return cls(len(x), x.mean(0), centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """Of both parts' rows together (Chan's update: no cancellation). Raises ValueError on unequal D."""
        _same_size(self.mean, other.mean)
        count, apart = self.count + other.count, other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter)

    def covariance(self, ddof: int = 1) -> Array:
        """(D,D), divided by count - ddof. Raises ValueError below 2 rows."""
        if self.count < 2:
            raise ValueError(f"{self.count} feature vector; a covariance needs at least 2")
        return self.scatter / (self.count - ddof)

    def save(self, file: BinaryIO, about: dict[str, Any]) -> None:
        """As an npz without pickles; about: extractor, its hash, frames, sampling: what the features are."""
        words = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
        np.savez(file, count=np.int64(self.count), mean=self.mean, scatter=self.scatter, about=words)

    @classmethod
    def load(cls, path: Path, about: dict[str, Any]) -> Moments:
        """From `save`'s file, sizes checked before anything is allocated. ValueError: damaged, or other features."""
        try:
            found = arrays(path, {"count", "mean", "scatter", "about"})
            told = json.loads(found["about"].astype(np.uint8).tobytes())
            moments = cls(int(found["count"]), found["mean"].astype(np.float64), found["scatter"].astype(np.float64))
            fit = moments.scatter.shape == 2 * moments.mean.shape and moments.mean.ndim == 1 and moments.count > 1
            if not fit or not np.isfinite(moments.scatter).all() or not np.isfinite(moments.mean).all():
                raise ValueError("arrays that do not fit, or are not finite")
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no file of feature statistics ({error}); make it again") from error
        if wrong := sorted(k for k in about.keys() | told.keys() if about.get(k) != told.get(k)):
            differ = ", ".join(f"{k}: {told.get(k)} there, {about.get(k)} here" for k in wrong)
            raise ValueError(f"{path} holds statistics of other features ({differ})")
        return moments


def _same_size(a: Array, b: Array) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"feature sizes differ: {a.shape[-1]} and {b.shape[-1]}; use one extractor for both sets")


def frechet_distance(a_ND: ArrayLike, b_MD: ArrayLike, ddof: int = 1) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2 of two feature sets (spec 2.1).

    a_ND (N,D), b_MD (M,D); ddof 1 divides covariances by N - 1, 0 by N (StyleGAN-V, cd-fvd). Raises ValueError on
    unequal D, NaN and fewer than 2 rows.
    """
    return frechet_between(Moments.of(a_ND), Moments.of(b_MD), ddof)


def frechet_between(a: Moments, b: Moments, ddof: int = 1) -> float:
    """`frechet_distance` of moments, by two symmetric eigendecompositions: real, and finite for few rows as well."""
    _same_size(a.mean, b.mean)
    cov_a, cov_b = a.covariance(ddof), b.covariance(ddof)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ cov_b @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)  # rounding can leave -1e-12 for equal sets


def kernel_distance(a_ND: ArrayLike, b_MD: ArrayLike, subsets: int = 100, size: int = 1000) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, the mean over random subsets of equal size (spec 2.3).

    Its expectation does not depend on N and M and is 0 for equal distributions: it can be slightly negative, and is
    not clipped. subsets of min(size, N, M) rows; one where that is everything on both sides.
    """
    a, b = np.asarray(a_ND, dtype=np.float64), np.asarray(b_MD, dtype=np.float64)
    _same_size(a, b)
    m, rng = min(size, len(a), len(b)), np.random.default_rng(0)
    if m < 2:
        raise ValueError(f"{len(a)} and {len(b)} feature vectors; MMD needs at least 2 on each side")
    found = []
    for _ in range(1 if m == len(a) == len(b) else subsets):
        x, y = (z[rng.permutation(len(z))[:m]] for z in (a, b))
        xx, yy, xy = (k * k * k for k in (p @ q.T / a.shape[1] + 1 for p, q in ((x, x), (y, y), (x, y))))
        found.append((xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean())
    return float(np.mean(found))


def null_bias(covariance_DD: ArrayLike, n: int, m: int) -> float:
    """Expected distance between samples of n and m rows of one Gaussian with this covariance (spec 2.4).

    [2 tr S + sum_ij l_i l_j (1 + delta_ij) / (l_i + l_j)] (1/n + 1/m) / 2, first order in 1/n and 1/m.
    """
    eig = np.linalg.eigvalsh(np.asarray(covariance_DD, dtype=np.float64)).clip(0)
    eig = eig[eig > 1e-12 * max(eig.max(initial=0.0), 1e-300)]
    pairs = eig[:, None] * eig[None, :] / (eig[:, None] + eig[None, :])
    return float(2 * eig.sum() + pairs.sum() + np.trace(pairs)) * (1 / n + 1 / m) / 2


def frechet_interval(
    a_ND: ArrayLike, b_MD: ArrayLike, a_video: ArrayLike, b_video: ArrayLike, draws: int = 200,
    distance: Callable[[Array, Array], float] = frechet_distance,
) -> Interval:  # fmt: skip
    """The distance with an interval from the spread of half-samples of the videos, drawn without replacement.

    a_video (N,), b_video (M,): the video each row comes from; rows of one video stay together. A bootstrap with
    replacement would be biased upward (spec 2.5); the spread of half-samples is that at full size (delete-half
    jackknife), and their own bias is not used. count: videos in a; below 4 there is no interval (NaN).
    """
    a, b = np.asarray(a_ND, dtype=np.float64), np.asarray(b_MD, dtype=np.float64)
    value = distance(a, b)
    rng = np.random.default_rng(0)

    def half(rows: Array, video: ArrayLike) -> Array:
        names = np.unique(video)
        return rows[np.isin(video, rng.permutation(names)[: len(names) // 2])]

    count = len(np.unique(a_video))
    if min(count, len(np.unique(b_video))) < 4:
        return Interval(value, np.nan, np.nan, count)
    spread = 1.96 * float(np.std([distance(half(a, a_video), half(b, b_video)) for _ in range(draws)], ddof=1))
    low = value - spread
    return Interval(value, max(low, 0.0) if distance is frechet_distance else low, value + spread, count)
