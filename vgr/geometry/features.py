"""Features of a shot's frames and their matches, looked for where the picture's motion leads (specs/benchmarks 4.3).

Where textures repeat, as a game's do, a feature's likeness is a tile further as often as not, and the better the more
frames lie between. Dense flow from frame to frame, followed, tells where a point has gone to within a few pixels, so
only what lies there is compared, and only it has to be told apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from vgr.geometry.conventions import Array

FEATURES, CELLS = 1500, (6, 8)  # of a picture; down and across
NEAR = 0.04  # of the longer side: how far from where flow leads a match may lie
_FEW = 0.1  # of the features; flow has lost its way where fewer are matched, and the whole picture is searched
_RATIO, _FARTHEST = 0.8, 0.7  # a match's distance to that of the next best, and at most (Lowe; COLMAP's limits)


class Features(NamedTuple):
    """points (N,2): pixels, from the picture's corner, so that the first pixel's centre is at a half; descriptors
    (N,128) float32: square roots of SIFT's, of unit length."""

    points: Array
    descriptors: NDArray[np.float32]


def detect(gray_HW: NDArray[np.uint8]) -> Features:
    """SIFT, FEATURES of them: the strongest of every cell of CELLS, then the next strongest of every cell, and so on.

    By strength alone most lie on what is bright and finely drawn, which in a dark scene is one window, or foliage that
    turns to the eye.
    """
    import cv2

    keypoints, descriptors = cv2.SIFT_create(contrastThreshold=0.01).detectAndCompute(gray_HW, None)
    if not keypoints:
        return Features(np.zeros((0, 2)), np.zeros((0, 128), np.float32))
    points, strength = np.array([k.pt for k in keypoints], np.float64) + 0.5, np.array([k.response for k in keypoints])
    cell = np.ravel_multi_index(tuple((points[:, ::-1] / gray_HW.shape * CELLS).astype(int).T), CELLS, "clip")
    order = np.lexsort((-strength, cell))
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order)) - np.searchsorted(cell[order], cell[order])
    kept = np.sort(np.lexsort((-strength, rank))[:FEATURES])
    points, descriptors = points[kept], descriptors[kept]
    return Features(points, np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9)))


def flows(gray_FHW: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Dense flow (H,W,2) in pixels from every frame to the next."""
    import cv2

    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return [flow.calc(a, b, None) for a, b in zip(gray_FHW, gray_FHW[1:])]


def follow(points: Array, flow_HW2: NDArray[np.float32]) -> Array:
    """Where points (N,2) are in the next frame; those that leave the picture stay outside."""
    height, width = flow_HW2.shape[:2]
    x, y = np.clip(points.astype(np.int64).T, 0, [[width - 1], [height - 1]])
    return points + flow_HW2[y, x]


def match(a: Features, b: Features, led: Array, near_px: float) -> NDArray[np.int64]:
    """Indices (M,2) of features of a and b that are each other's best within near_px of where a's are led (N,2), and
    clearly better than the next; over the whole picture where those are few."""
    found = _mutual(a, b, *_candidates(led, b.points, near_px))
    if len(found) < _FEW * len(a.points):
        found = max(found, _mutual(a, b, *np.indices((len(a.points), len(b.points))).reshape(2, -1)), key=len)
    return found


def _candidates(led: Array, points: Array, near_px: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not len(led) or not len(points):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    near = cKDTree(led).sparse_distance_matrix(cKDTree(points), near_px, output_type="ndarray")
    return near["i"], near["j"]


def _mutual(a: Features, b: Features, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of candidate pairs (i, j), those that are best for both and told apart from a's next best."""
    if not len(i):
        return np.zeros((0, 2), np.int64)
    if 4 * len(i) > len(a.points) * len(b.points):  # one product of all costs less than rows gathered for many pairs
        likeness = (a.descriptors @ b.descriptors.T)[i, j]
    else:
        likeness = np.einsum("nd,nd->n", a.descriptors[i], b.descriptors[j])
    order = np.lexsort((j, -likeness, i))
    i, j, likeness = i[order], j[order], likeness[order]
    first = np.flatnonzero(np.diff(i, prepend=-1))
    distance = np.arccos(likeness.clip(-1, 1))
    second = np.full(len(first), np.inf)
    more = np.diff(first, append=len(i)) > 1
    second[more] = distance[first[more] + 1]
    best_of_b = np.full(len(b.points), -1)
    back = np.lexsort((i, likeness))  # the last that is written stays: the most like
    best_of_b[j[back]] = i[back]
    kept = (distance[first] < _FARTHEST) & (distance[first] < _RATIO * second) & (best_of_b[j[first]] == i[first])
    return np.stack([i[first], j[first]], axis=1)[kept]
