"""Coherence drift without weights: how statistics of a video move with time (benchmarks spec, section 5).

A statistic is measured per frame (or per pair of frames), averaged over windows of equal length, and its
Theil-Sen slope over the windows' centres is the video's trend in units a second. A video drifts only as far
as its trend exceeds that of the true video of the same clip.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.metrics.statistics import Interval

Array = NDArray[np.float64]

UNITS = {"lightness": "L*", "chroma": "C*", "contrast": "L*", "sharpness": "ln", "motion": "diagonals/s"}


class Drift(NamedTuple):
    """Of one video, by statistic: slope a second, mean level, windows' means; and the windows' centres in seconds."""

    slope: dict[str, float]
    level: dict[str, float]
    times_J: Array
    curve: dict[str, Array]


def measure_drift(frames_FHW3: NDArray[np.uint8], fps: float, window_s: float = 1.0) -> Drift:
    """Trends of one video, uint8 (F,H,W,3), frames copied from the input left out by the caller.

    Raises ValueError when fewer than three windows fit.
    """
    from scipy import stats

    duration = len(frames_FHW3) / fps
    count = int(duration / window_s + 1e-6)
    if count < 3:
        raise ValueError(
            f"drift: {len(frames_FHW3)} frames at {fps:g} a second hold {count} windows of {window_s:g} s; "
            "a trend needs 3, choose a shorter drift.window_s or longer videos"
        )
    # Centred, so that a reversed video has the same windows in reverse order.
    edges = (duration - count * window_s) / 2 + window_s * np.arange(count + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    slope, level, curve = {}, {}, {}
    for name, (times, values) in frame_statistics(frames_FHW3, fps).items():
        index = np.digitize(times, edges) - 1
        index[np.abs(times[:, None] - edges).min(1) < 1e-6] = -1  # on an edge: in neither window, or time has a side
        curve[name] = np.array([values[index == j].mean() for j in range(count)])
        slope[name], level[name] = float(stats.theilslopes(curve[name], centres)[0]), float(values.mean())
    return Drift(slope, level, centres, curve)


def frame_statistics(frames_FHW3: NDArray[np.uint8], fps: float) -> dict[str, tuple[Array, Array]]:
    """Name -> (times in seconds, values): at frame centres, or between two frames for motion.

    lightness, contrast (mean and sd of CIE L*), chroma (mean C*), sharpness (ln of the variance of the
    Laplacian of L*), motion (median optical flow in image diagonals a second).
    """
    import cv2

    lab = np.stack([cv2.cvtColor(f.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for f in frames_FHW3])
    light = np.ascontiguousarray(lab[..., 0])
    laplace = np.array([cv2.Laplacian(x, cv2.CV_32F, ksize=1).var(dtype=np.float64) for x in light])
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames_FHW3]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    steps = [np.median(np.linalg.norm(flow.calc(a, b, None), axis=-1)) for a, b in zip(grey, grey[1:])]
    centres = (np.arange(len(light)) + 0.5) / fps
    return {
        "lightness": (centres, light.mean((1, 2), dtype=np.float64)),
        "chroma": (centres, np.hypot(lab[..., 1], lab[..., 2]).mean((1, 2), dtype=np.float64)),
        "contrast": (centres, light.std((1, 2), dtype=np.float64)),
        "sharpness": (centres, np.log(laplace + 1e-3)),
        "motion": (np.arange(1, len(light)) / fps, np.array(steps) * fps / np.hypot(*grey[0].shape)),
    }


def composite(excess_VK: Array, real_sd_K: Array, draws: int = 2000) -> Interval:
    """Mean over statistics of |mean excess trend| in units of the true videos' between-video sd (spec 5.2, 7).

    excess_VK (V,K): trend of each video minus that of its true video; real_sd_K (K,). A percentile bootstrap
    over videos. Being a mean of sizes it is never negative and is biased upward by noise: for ranking, never
    alone.
    """
    sd = np.maximum(real_sd_K, 1e-9)
    picks = np.random.default_rng(0).integers(len(excess_VK), size=(draws, len(excess_VK)))
    low, high = np.percentile((np.abs(excess_VK[picks].mean(1)) / sd).mean(1), [2.5, 97.5])
    value = float((np.abs(excess_VK.mean(0)) / sd).mean())
    return Interval(value, float(low), float(high), len(excess_VK))
