"""Does a place look the same when the camera comes back? (benchmarks spec, 5.4), for one video with its commanded path.

Pairs of frames with one view, after the camera was elsewhere, are compared with each other; a control pair with the
same time between but two views tells what blur, colour drift and dull scenes alone would give. A camera that never
left, or did not come back, has remembered nothing: with estimated poses such pairs are dropped, and counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from vgr.metrics.camera_pose import pose_errors
from vgr.metrics.image import mean_ssim, psnr

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]

METRES, DEGREES = 0.5, 20.0  # SANA-WM's rule: closer is the same view
MOST, APART_S = 5, 0.5  # pairs of a video, and how far apart in time their second frames are
SPARE = 0.1  # of the tolerances, by which a pair may be further apart than the video's closest
MOVED = 0.3  # share of the commanded way, or turning, that the video must make between


class Pair(NamedTuple):
    """Frames first and second with one view, and the shift in frames of the control pair; None where there is none."""

    first: int
    second: int
    control: int | None


class Revisit(NamedTuple):
    """Of one video: pairs scored, and dropped because the camera did not return or never left (or was not found).

    psnr_db, ssim: at the return, means over pairs kept; memory_db, memory_ssim: those minus the control's, over pairs
    that have one: above 0 it remembers. NaN where nothing is left.
    """

    pairs: int
    dropped: int
    psnr_db: float
    ssim: float
    memory_db: float
    memory_ssim: float


def find_pairs(c2w_F44: ArrayLike, fps: float, gap_s: float = 2.0) -> list[Pair]:
    """At most MOST pairs of frames `gap_s` or more apart that a path (F,4,4) in metres gives one view, with something
    between them that is another view; only those about as close as the closest, so that exact returns stay exact."""
    c2w = np.asarray(c2w_F44, dtype=np.float64)
    metres, degrees = _apart(c2w)
    size = np.maximum(metres / METRES, degrees / DEGREES)  # below 1: one view
    gap = max(1, round(gap_s * fps))
    candidates = []
    for second in range(gap, len(c2w)):
        first = int(size[: second - gap + 1, second].argmin())
        if size[first, second] < 1 and size[first, first:second].max() >= 2:
            candidates.append((round(float(size[first, second]), 6), second, first))
    pairs: list[Pair] = []
    for close, second, first in sorted(candidates):
        if close <= min(candidates)[0] + SPARE and len(pairs) < MOST and all(abs(second - p.second) >= APART_S * fps for p in pairs):
            others = np.arange(-first, len(c2w) - second)
            others = others[size[first + others, second + others] >= 2]
            shift = int(others[np.abs(others).argmin()]) if len(others) else None
            pairs.append(Pair(first, second, shift))
    return pairs


def returned(pair: Pair, commanded: ArrayLike, estimated: ArrayLike) -> bool:
    """Whether an estimated path (F,4,4), scaled to the commanded one, comes back to the view and was away.

    Its pose from first to second frame may differ from the commanded by twice the tolerances, and between them it must
    make MOVED of the commanded way and of the commanded turning. Frames not registered (NaN) are no return.
    """
    est, ref = (np.asarray(x, dtype=np.float64)[pair.first : pair.second + 1] for x in (estimated, commanded))
    if not np.isfinite(est[[0, -1]]).all():
        return False
    known = np.isfinite(est).all((1, 2))
    est, ref = est[known], ref[known]
    for made, view in ((_way, METRES), (_turning, DEGREES)):
        if made(ref) >= view and made(est) < MOVED * made(ref):
            return False
    back = np.linalg.inv(np.linalg.inv(ref[0]) @ ref[-1]) @ np.linalg.inv(est[0]) @ est[-1]
    turned = np.rad2deg(Rotation.from_matrix(back[:3, :3]).magnitude())
    return bool(np.linalg.norm(back[:3, 3]) < 2 * METRES and turned < 2 * DEGREES)


def measure_revisit(
    frames_FHW3: Pixels, c2w_F44: ArrayLike, fps: float, estimated_c2w: ArrayLike | None = None, gap_s: float = 2.0
) -> Revisit:
    """Score one video (F,H,W,3) against its commanded path (F,4,4). estimated_c2w: of the video itself, any scale; None
    leaves the check of the return out, which a frozen video passes. pairs 0 where the path never comes back.
    """
    pairs = find_pairs(c2w_F44, fps, gap_s)
    kept = pairs
    if estimated_c2w is not None:
        scale = pose_errors(estimated_c2w, c2w_F44, align="first_frame")["scale"]
        estimate = np.array(estimated_c2w, dtype=np.float64)
        estimate[:, :3, 3] *= scale if np.isfinite(scale) else 1.0
        kept = [p for p in pairs if returned(p, c2w_F44, estimate)]
    scores = []
    for pair in kept:
        at = [(pair.first, pair.second)]
        at += [(pair.first + pair.control, pair.second + pair.control)] if pair.control is not None else []
        found = [(_psnr(frames_FHW3[i], frames_FHW3[j]), mean_ssim(frames_FHW3[i], frames_FHW3[j])) for i, j in at]
        gain = np.subtract(*found) if len(found) == 2 else np.full(2, np.nan)
        scores.append([*found[0], *gain])
    means = [float(np.mean(x[np.isfinite(x)])) if np.isfinite(x).any() else np.nan for x in np.array(scores).T]
    return Revisit(len(kept), len(pairs) - len(kept), *(means or [np.nan] * 4))


def _psnr(a: Pixels, b: Pixels) -> float:
    return float(psnr(a[None], b[None])[0])


def _apart(c2w: Array) -> tuple[Array, Array]:
    """Metres and degrees between all poses, (F,F)."""
    centres, R = c2w[:, :3, 3], c2w[:, :3, :3]
    square = (centres**2).sum(1)
    metres = np.sqrt(np.maximum(square[:, None] + square - 2 * centres @ centres.T, 0.0))
    flat = R.reshape(-1, 9)  # trace(Ri' Rj)
    return metres, np.rad2deg(np.arccos(np.clip((flat @ flat.T - 1) / 2, -1, 1)))


def _way(path: Array) -> float:
    return float(np.linalg.norm(np.diff(path[:, :3, 3], axis=0), axis=1).sum())


def _turning(path: Array) -> float:
    steps = Rotation.from_matrix(path[:-1, :3, :3]).inv() * Rotation.from_matrix(path[1:, :3, :3])
    return float(np.rad2deg(steps.magnitude()).sum())
