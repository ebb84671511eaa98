"""Does a place look the same when the camera comes back? (benchmarks spec, 5.4), for one video with its commanded path.

Pairs of frames with one view, after the camera was elsewhere, are compared; a control pair as far apart in time with
two views tells what blur, colour drift and dull scenes alone would give. A camera that never left, or did not come
back, has remembered nothing: with estimated poses such pairs are dropped, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from vgr.metrics.camera_pose import pose_errors
from vgr.metrics.image import mean_ssim, psnr

Array = NDArray[np.float64]

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
    """Of one video: pairs scored, and dropped because the camera was not seen to leave and return; means over pairs
    kept of PSNR and SSIM, of SSIM with a uniform window and LPIPS as SANA-WM prints them, and of the first two minus
    the control's (above 0 it remembers). NaN where nothing is left, and LPIPS without its network."""

    pairs: int
    dropped: int
    psnr_db: float
    ssim: float
    ssim_uniform: float
    lpips: float
    memory_db: float
    memory_ssim: float


def find_pairs(c2w_F44: ArrayLike, fps: float, gap_s: float = 2.0) -> list[Pair]:
    """At most MOST pairs of frames `gap_s` or more apart that a path (F,4,4) in metres gives one view, with another
    view between them; only those about as close as the closest, so that exact returns stay exact."""
    c2w = np.asarray(c2w_F44, dtype=np.float64)
    metres = np.linalg.norm(c2w[:, None, :3, 3] - c2w[:, :3, 3], axis=-1)
    flat = c2w[:, :3, :3].reshape(-1, 9)  # its products are the traces of Ri' Rj
    degrees = np.rad2deg(np.arccos(np.clip((flat @ flat.T - 1) / 2, -1, 1)))
    size = np.maximum(metres / METRES, degrees / DEGREES)  # below 1: one view
    gap = max(1, round(gap_s * fps))
    found = []
    for second in range(gap, len(c2w)):
        first = int(size[: second - gap + 1, second].argmin())
        if size[first, second] < 1 and size[first, first:second].max() >= 2:
            found.append((round(float(size[first, second]), 6), second, first))
    pairs: list[Pair] = []
    for close, second, first in sorted(found):
        near = any(abs(second - p.second) < APART_S * fps for p in pairs)
        if close <= min(found)[0] + SPARE and len(pairs) < MOST and not near:
            shifts = np.arange(-first, len(c2w) - second)
            shifts = shifts[size[first + shifts, second + shifts] >= 2]
            pairs.append(Pair(first, second, int(shifts[np.abs(shifts).argmin()]) if len(shifts) else None))
    return pairs


def returned(pair: Pair, commanded: ArrayLike, estimated: ArrayLike) -> bool:
    """Whether an estimated path (F,4,4), scaled to the commanded one, was away and is back within twice the tolerances.

    Between the frames it must make MOVED of the commanded way and turning. Frames not registered (NaN) are no return.
    """
    est, ref = (np.asarray(x, dtype=np.float64)[pair.first : pair.second + 1] for x in (estimated, commanded))
    if not np.isfinite(est[[0, -1]]).all():
        return False
    known = np.isfinite(est).all((1, 2))
    (est, made), (ref, asked) = ((x[known], _moved(x[known])) for x in (est, ref))
    if any(a >= view and m < MOVED * a for m, a, view in zip(made, asked, (METRES, DEGREES))):
        return False
    back = np.linalg.inv(np.linalg.inv(ref[0]) @ ref[-1]) @ np.linalg.inv(est[0]) @ est[-1]
    turned = np.rad2deg(Rotation.from_matrix(back[:3, :3]).magnitude())
    return bool(np.linalg.norm(back[:3, 3]) < 2 * METRES and turned < 2 * DEGREES)


def _moved(path: Array) -> tuple[float, float]:
    """Metres and degrees made along a path."""
    steps = np.linalg.inv(path[:-1]) @ path[1:]
    turns = Rotation.from_matrix(steps[:, :3, :3]).magnitude()
    return float(np.linalg.norm(steps[:, :3, 3], axis=1).sum()), float(np.rad2deg(turns).sum())


def measure_revisit(
    frames_FHW3: NDArray[np.uint8], c2w_F44: ArrayLike, fps: float, estimated: ArrayLike | None, gap_s: float = 2.0,
    lpips: Callable[[NDArray[np.uint8], NDArray[np.uint8]], Array] | None = None,
) -> Revisit:  # fmt: skip
    """Score one video (F,H,W,3) with its commanded path (F,4,4). estimated (F,4,4): its own, at any scale; None leaves
    the check of the return out, which a frozen video passes. lpips: two clips to a distance a frame."""
    kept = pairs = find_pairs(c2w_F44, fps, gap_s)
    if estimated is not None:
        scale = pose_errors(estimated, c2w_F44, align="first_frame")["scale"]
        estimate = np.array(estimated, dtype=np.float64)
        estimate[:, :3, 3] *= scale if np.isfinite(scale) else 1.0
        kept = [p for p in pairs if returned(p, c2w_F44, estimate)]
    scores = np.full((len(kept), 6), np.nan)
    for row, (first, second, control) in zip(scores, kept):
        row[:2] = _alike(frames_FHW3, first, second)
        row[2] = mean_ssim(frames_FHW3[first], frames_FHW3[second], uniform=True)
        if lpips is not None:
            row[3] = lpips(frames_FHW3[first, None], frames_FHW3[second, None])[0]
        if control is not None:
            row[4:] = row[:2] - _alike(frames_FHW3, first + control, second + control)
    means = [float(x[np.isfinite(x)].mean()) if np.isfinite(x).any() else np.nan for x in scores.T]
    return Revisit(len(kept), len(pairs) - len(kept), *means)


def _alike(frames: NDArray[np.uint8], i: int, j: int) -> Array:
    return np.array([psnr(frames[i : i + 1], frames[j : j + 1])[0], mean_ssim(frames[i], frames[j])])
