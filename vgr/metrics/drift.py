"""Coherence drift without weights: how statistics of a video move with time (benchmarks spec, section 5).

A statistic is measured per frame (or per pair of frames), averaged over windows of equal length, and its
Theil-Sen slope over the windows' centres is the video's trend in units a second. A video drifts only as far
as its trend exceeds that of the true video of the same clip.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.metrics.statistics import Interval, theil_sen

Array = NDArray[np.float64]

UNITS = {
    "lightness": "L*",
    "chroma": "C*",
    "contrast": "L*",
    "sharpness": "ln",
    "noise": "L*",
    "motion": "diagonals/s",
    "flicker": "share",
    "structure": "correlation",
}
# The primary statistics, declared beforehand.
COMPOSITE = ("lightness", "chroma", "contrast", "sharpness", "motion")


class Drift(NamedTuple):
    """Of one video, by statistic: slope a second, last minus first 15 %, mean level, and the windows' means.

    `times_J` are the windows' centres in seconds from the first frame used.
    """

    slope: dict[str, float]
    start_end: dict[str, float]
    level: dict[str, float]
    times_J: Array
    curve: dict[str, Array]


def measure_drift(frames_FHW3: NDArray[np.uint8], fps: float, window_s: float = 1.0) -> Drift:
    """Trends of one video, uint8 (F,H,W,3), frames copied from the input left out by the caller.

    Raises ValueError when fewer than three windows fit.
    """
    duration = len(frames_FHW3) / fps
    count = int(duration / window_s + 1e-6)
    if count < 3:
        raise ValueError(
            f"drift: {len(frames_FHW3)} frames at {fps:g} a second hold {count} windows of {window_s:g} s; "
            "a trend needs 3, choose a shorter metrics.drift.window_s or longer videos"
        )
    # Centred, so that a reversed video has the same windows in reverse order.
    edges = (duration - count * window_s) / 2 + window_s * np.arange(count + 1)
    slope, start_end, level, curve = {}, {}, {}, {}
    for name, (times, values) in frame_statistics(frames_FHW3, fps).items():
        index = np.digitize(times, edges) - 1
        index[np.abs(times[:, None] - edges).min(1) < 1e-6] = -1  # on an edge: in neither window, or time has a side
        means = np.array([values[index == j].mean() if (index == j).any() else np.nan for j in range(count)])
        first, last = times < 0.15 * duration - 1e-6, times > 0.85 * duration + 1e-6
        curve[name], level[name] = means, float(values.mean())
        slope[name] = theil_sen(means, (edges[1:] + edges[:-1]) / 2)
        start_end[name] = float(values[last].mean() - values[first].mean()) if first.any() and last.any() else np.nan
    return Drift(slope, start_end, level, (edges[1:] + edges[:-1]) / 2, curve)


def frame_statistics(frames_FHW3: NDArray[np.uint8], fps: float) -> dict[str, tuple[Array, Array]]:
    """Name -> (times in seconds, values): at frame centres, or between two frames for motion and flicker.

    lightness, contrast (mean and sd of CIE L*), chroma (mean C*), sharpness (ln of the variance of the
    Laplacian of L*), noise (Immerkaer's sigma on L*), motion (median optical flow in image diagonals a
    second), flicker (1 - mean |I_t+1 - I_t| / 255), structure (correlation of a 16x12 thumbnail of L* with
    the first frame's).
    """
    import cv2

    lab = np.stack([cv2.cvtColor(f.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for f in frames_FHW3])
    light = np.ascontiguousarray(lab[..., 0])
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
    laplace = np.array([cv2.Laplacian(x, cv2.CV_32F, ksize=1).var(dtype=np.float64) for x in light])
    residual = np.array([np.abs(cv2.filter2D(x, cv2.CV_32F, mask)[1:-1, 1:-1]).mean() for x in light])
    thumbs = np.stack([cv2.resize(x, (16, 12), interpolation=cv2.INTER_AREA).ravel() for x in light])
    step = np.abs(np.diff(frames_FHW3.astype(np.int16), axis=0)).mean((1, 2, 3)) / 255
    centres = (np.arange(len(light)) + 0.5) / fps
    between = np.arange(1, len(light)) / fps
    return {
        "lightness": (centres, light.mean((1, 2), dtype=np.float64)),
        "chroma": (centres, np.hypot(lab[..., 1], lab[..., 2]).mean((1, 2), dtype=np.float64)),
        "contrast": (centres, light.std((1, 2), dtype=np.float64)),
        "sharpness": (centres, np.log(laplace + 1e-3)),
        "noise": (centres, np.sqrt(np.pi / 2) / 6 * residual.astype(np.float64)),
        "motion": (between, _flow_speed(frames_FHW3) * fps),
        "flicker": (between, 1 - step),
        "structure": (centres, _correlation(thumbs)),
    }


def composite(excess_VK: Array, real_sd_K: Array, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean over statistics of |mean excess trend| in units of the true videos' between-video sd (spec 5.2,
    7).

    excess_VK (V,K): trend of each video minus that of its true video; real_sd_K (K,). A percentile bootstrap
    over videos. Being a mean of sizes it is never negative and is biased upward by noise: for ranking, never
    alone.
    """
    keep = np.isfinite(excess_VK).all(1)
    x, sd = excess_VK[keep], np.maximum(real_sd_K, 1e-9)
    if len(x) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    value = float((np.abs(x.mean(0)) / sd).mean())
    if len(x) == 1:
        return Interval(value, np.nan, np.nan, 1)
    picks = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    low, high = np.percentile((np.abs(x[picks].mean(1)) / sd).mean(1), [2.5, 97.5])
    return Interval(value, float(low), float(high), len(x))


def _flow_speed(frames: NDArray[np.uint8]) -> Array:
    """Median length of dense optical flow between neighbours, in image diagonals a frame, (F - 1,)."""
    import cv2

    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    diagonal = float(np.hypot(*grey[0].shape))
    return np.array(
        [np.median(np.linalg.norm(flow.calc(a, b, None), axis=-1)) / diagonal for a, b in zip(grey, grey[1:])]
    )


def _correlation(thumbs_FL: Array) -> Array:
    x = thumbs_FL.astype(np.float64)
    x = x - x.mean(1, keepdims=True)
    norm = np.linalg.norm(x, axis=1)
    flat = norm < 1e-6 * max(1.0, norm.max())  # a blank frame agrees with a blank first frame only
    cosine = (x @ x[0]) / np.maximum(norm * norm[0], 1e-12)
    return np.where(flat, float(flat[0]), cosine)
