"""Depth of a shot's frames by an estimator of one's choice (specs/warp-adapter 2.2): a callable from frames (F,H,W,3)
uint8 to planar depth (F,H,W) float32, 0 where unknown.

A network tells metres (`vgr.data.annotators.DepthModel`); without weights `SparseDepth` spreads the points of the
frames' own reconstruction between them, in its unit. `scale_to` brings the one to the other's unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.geometry.conventions import Array

MIN_POINTS = 12  # seen by a frame; from fewer, nothing is said of it
_MARGIN = 0.25  # of the picture: points so far beyond its edges still tell of what lies there
_NEAREST = 12  # neighbours in the picture that a point is held against
_NEARER, _ALIKE = 1.3, 1.15  # ratios of depths: in front of a point; of one surface with it


@dataclass(frozen=True)
class SparseDepth:
    """The estimator from sparse points (N,3) in the world and unit of c2w (F,4,4); intrinsics (4,), normalised."""

    points: ArrayLike
    c2w: ArrayLike
    intrinsics: ArrayLike

    def __call__(self, frames_FHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Planar depth (F,H,W) of the frames of these cameras; ValueError as `densify`, and for another count."""
        if len(frames_FHW3) != len(np.asarray(self.c2w)):
            raise ValueError(f"{len(frames_FHW3)} frames, but cameras of {len(np.asarray(self.c2w))}: hand over the "
                             "frames that were reconstructed")  # fmt: skip
        return densify(self.points, self.c2w, self.intrinsics, frames_FHW3.shape[1:3])


def densify(
    points_N3: ArrayLike, c2w_F44: ArrayLike, intrinsics: ArrayLike, size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """Planar depth (F,H,W) float32 of cameras (F,4,4) in the points' unit, 0 in frames that see too few points.

    Inverse depth is linear over the triangles between the points that a frame sees, which is exact on planes, and the
    nearest point's beyond them. intrinsics (4,), normalised; c2w may be NaN for frames that are not registered.
    ValueError for shapes that do not match and where no frame sees MIN_POINTS points.
    """
    points, c2w, k = _checked(points_N3, c2w_F44, intrinsics, len(np.atleast_1d(c2w_F44)))
    depth, most = np.zeros((len(c2w), *size_hw), np.float32), 0
    for f, pose in enumerate(c2w):
        pixels, z = seen(points, pose, k, size_hw)
        most = max(most, len(z))
        if len(z) >= MIN_POINTS:
            depth[f] = _spread(pixels, z, size_hw)
    if not depth.any():
        raise ValueError(f"{len(points)} sparse points, of which a frame sees {most} at the most; depth wants "
                         f"{MIN_POINTS}: reconstruct from more or sharper frames, or give a depth network")  # fmt: skip
    return depth


def seen(points_N3: Array, c2w_44: Array, k_4: Array, size_hw: tuple[int, int]) -> tuple[Array, Array]:
    """Pixels (M,2) and depths (M,) of the points that a camera sees, a margin about the picture included.

    Left out: points that nearer ones surround, which look through a surface, and points like none of those about them.
    """
    from scipy.spatial import cKDTree

    local = (points_N3 - c2w_44[:3, 3]) @ c2w_44[:3, :3]
    local = local[local[:, 2] > 1e-6] if np.isfinite(c2w_44).all() else local[:0]
    place = local[:, :2] / local[:, 2:] * k_4[:2] + k_4[2:]
    inside = ((place > -_MARGIN) & (place < 1 + _MARGIN)).all(1)
    pixels, z = place[inside] * size_hw[::-1], local[inside, 2]
    if len(z) <= _NEAREST:
        return pixels, z
    near = cKDTree(pixels).query(pixels, _NEAREST + 1)[1][:, 1:]
    ratio = z[:, None] / z[near]
    away = pixels[near] - pixels[:, None]
    angle = np.sort(np.where(ratio > _NEARER, np.arctan2(away[..., 1], away[..., 0]), np.nan), axis=1)
    gaps = np.diff(angle, axis=1)
    round_gap = np.nanmin(angle, 1, initial=np.inf) + 2 * np.pi - np.nanmax(angle, 1, initial=-np.inf)
    widest = np.fmax(np.nanmax(gaps, 1, initial=0), round_gap)
    alike = (np.abs(np.log(ratio)) < np.log(_ALIKE)).sum(1) >= 2
    kept = (widest > np.pi) & alike
    return pixels[kept], z[kept]


def _spread(pixels: Array, z: Array, size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Depth (H,W) between and beyond sparse depths (M,) at pixels (M,2)."""
    from scipy.spatial import Delaunay, QhullError, cKDTree

    height, width = size_hw
    y, x = np.divmod(np.arange(height * width), width)
    centres = np.stack([x, y], axis=1) + 0.5
    found = z[cKDTree(pixels).query(centres)[1]]
    try:
        mesh = Delaunay(pixels)
    except QhullError:  # all on a line
        return found.reshape(height, width).astype(np.float32)
    which = mesh.find_simplex(centres)
    inside = which >= 0
    which = which[inside]
    affine = mesh.transform[which]
    first = np.einsum("nij,nj->ni", affine[:, :2], centres[inside] - affine[:, 2])
    weights = np.concatenate([first, 1 - first.sum(1, keepdims=True)], axis=1)
    found[inside] = 1 / (weights / z[mesh.simplices[which]]).sum(1)
    return found.reshape(height, width).astype(np.float32)


def scale_to(depth_FHW: ArrayLike, points_N3: ArrayLike, c2w_F44: ArrayLike, intrinsics: ArrayLike) -> float:
    """What to multiply depth maps (F,H,W) of any size by to be in the unit of points (N,3) and cameras (F,4,4).

    The median over all frames and the points they see of sparse over dense depth, which no share of wrong ones below a
    half moves far (specs/warp-adapter 2.3 trims tenths before it takes the median, which is the same). ValueError
    where fewer than MIN_POINTS points fall on known depth.
    """
    depth = np.asarray(depth_FHW, np.float64)
    points, c2w, k = _checked(points_N3, c2w_F44, intrinsics, len(depth))
    size_hw, ratios = depth.shape[1:], [np.zeros(0)]
    for own, pose in zip(depth, c2w):
        pixels, z = seen(points, pose, k, size_hw)
        x, y = np.floor(pixels).astype(int).T
        inside = (x >= 0) & (y >= 0) & (x < size_hw[1]) & (y < size_hw[0])
        known = own[y[inside], x[inside]]
        ok = np.isfinite(known) & (known > 0)
        ratios.append(z[inside][ok] / known[ok])
    ratio = np.concatenate(ratios)
    if len(ratio) < MIN_POINTS:
        raise ValueError(f"{len(ratio)} sparse points fall on known depth; a scale wants {MIN_POINTS}: are cameras, "
                         "points and depth those of one shot?")  # fmt: skip
    return float(np.median(ratio))


def _checked(points: ArrayLike, c2w: ArrayLike, k: ArrayLike, frames: int) -> tuple[Array, Array, Array]:
    points, c2w, k = (np.asarray(x, np.float64) for x in (points, c2w, k))
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise ValueError(f"points must be finite, of shape (N, 3); got shape {points.shape}")
    if c2w.shape != (frames, 4, 4) or k.shape != (4,):
        raise ValueError(f"c2w must be ({frames}, 4, 4), one a frame, and intrinsics (4,); got {c2w.shape}, {k.shape}")
    return points, c2w, k
