"""Aligning an estimated camera path to a reference, in NumPy float64 (specs/benchmarks 4.2, 4.4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

#: a path whose second principal extent is below this share of the first leaves a rotation undetermined
FLAT_SHARE = 0.05
#: a path that never leaves its mean by more than this (metres) does not move
STILL_METRES = 1e-3


def path_rank(centres_F3: ArrayLike) -> int:
    """Dimensions a path of camera centres (F,3) spans: 0 stands still, 1 is straight, 2 a plane, 3 space.

    Below 2 a rotation fitted to the centres alone is undetermined: on straight lines it measured 90 degrees
    of "error" on sub-degree rotations (specs/benchmarks 4.4).
    """
    centres = np.asarray(centres_F3, dtype=np.float64)
    centred = centres - centres.mean(0)
    if len(centres) < 2 or np.linalg.norm(centred, axis=1).max() < STILL_METRES:
        return 0
    extents = np.linalg.svd(centred, compute_uv=False)
    return int((extents > FLAT_SHARE * extents[0]).sum())


def umeyama(src_F3: ArrayLike, dst_F3: ArrayLike, with_scale: bool = True) -> tuple[float, Array, Array]:
    """Scale s, rotation R (3,3) and translation t (3,) that minimise sum |dst - (s R src + t)|^2 (Umeyama 1991).

    s is 1 without `with_scale`, and where src does not move. R is undetermined where `path_rank` of either
    side is below 2: ask it first. ValueError if the shapes differ or there is no point.
    """
    src, dst = np.asarray(src_F3, dtype=np.float64), np.asarray(dst_F3, dtype=np.float64)
    if src.shape != dst.shape or src.ndim != 2 or src.shape[1] != 3 or len(src) == 0:
        raise ValueError(f"umeyama takes two arrays of one shape (F, 3), F >= 1; got {src.shape}, {dst.shape}")
    mean_src, mean_dst = src.mean(0), dst.mean(0)
    a, b = src - mean_src, dst - mean_dst
    u, _, vt = np.linalg.svd(b.T @ a)
    rotation = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt  # never a reflection
    spread = float((a * a).sum())
    scale = float((b * (a @ rotation.T)).sum()) / spread if with_scale and spread > 0 else 1.0
    return scale, rotation, mean_dst - scale * rotation @ mean_src


def rotation_mean(src_R: ArrayLike, dst_R: ArrayLike) -> Array:
    """The rotation R (3,3) closest to turning every src_R (F,3,3) into dst_R: min sum |dst_R - R src_R|_F^2.

    Defined on straight and rotation-only paths too, since it looks at orientations, not centres.
    """
    return (Rotation.from_matrix(dst_R) * Rotation.from_matrix(src_R).inv()).mean().as_matrix()


def turn_between(a_N3: Array, b_N3: Array, focal_px: float) -> tuple[Array, float]:
    """The rotation R (3,3) with b = R a for most unit bearings (Cauchy at one pixel), and the median left, pixels."""
    weight = np.ones(len(a_N3))
    for _ in range(10):
        u, _, vt = np.linalg.svd((b_N3 * weight[:, None]).T @ a_N3)
        rotation = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
        left = np.linalg.norm(b_N3 - a_N3 @ rotation.T, axis=1) * focal_px
        weight = 1 / (1 + left**2)
    return rotation, float(np.median(left))
