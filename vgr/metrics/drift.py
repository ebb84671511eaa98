"""Coherence drift without weights: how statistics of a video move with time (benchmarks spec, section 5).

A statistic is measured per frame (or per pair of frames), averaged over windows of equal length, and the Theil-Sen
slope over the windows' centres is the video's trend in units a second. A video drifts only as far as its trend exceeds
that of the true video of the same clip. Windows and pairs of frames never cross a cut. Frames come one by one, so
memory does not grow with the video.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.metrics.image import mean_ssim
from vgr.metrics.statistics import Interval

Array = NDArray[np.float64]
Series = dict[str, tuple[Array, Array]]  # name -> times in seconds, values

PRIMARY = {"lightness": "L*", "chroma": "C*", "contrast": "L*", "sharpness": "ln", "motion": "diagonals/s"}
UNITS = PRIMARY | {
    "red_green": "a*", "yellow_blue": "b*", "clipped": "share", "detail": "share", "noise": "levels",
    "steadiness": "1 − range", "structure": "SSIM",
}  # fmt: skip
SIDE = 512  # longer side at which all but clipping, noise and steadiness are measured; smaller videos as they are
ENDS = 0.15  # share of a shot at either end that start and end are
_NOISE = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)


class Drift(NamedTuple):
    """Of one video, by statistic: slope a second, mean level, end minus start over its shots' windows, windows' means;
    their centres in seconds; and each step's mean absolute change in grey levels, NaN across cuts, (F-1,)."""

    slope: dict[str, float]
    level: dict[str, float]
    start_end: dict[str, float]
    times_J: Array
    curve: dict[str, Array]
    steps: Array


def measure_drift(
    frames_FHW3: Iterable[NDArray[np.uint8]], fps: float, window_s: float = 1.0, cuts: Sequence[int] = ()
) -> Drift:
    """Trends of one video, uint8 (H,W,3) each; frames copied from the input left out by the caller.

    cuts: first frames of new shots. Slopes are medians over pairs of windows of one shot: with no cut, Theil-Sen's.
    Raises ValueError when no shot holds three windows.
    """
    series, steps = frame_statistics(frames_FHW3, fps, cuts)
    count = len(steps) + 1
    edges_S = np.array([0, *cuts, count]) / fps
    shots = [e for a, b in zip(edges_S, edges_S[1:]) if (e := _edges(a, b, window_s)) is not None]
    if max((len(e) for e in shots), default=0) < 4:
        raise ValueError(
            f"drift: no shot of {count} frames at {fps:g} a second with {len(cuts)} cuts holds 3 windows of "
            f"{window_s:g} s, which a trend needs; choose a shorter drift.window_s or longer videos"
        )
    centres = np.concatenate([(e[1:] + e[:-1]) / 2 for e in shots])
    shot = np.repeat(np.arange(len(shots)), [len(e) - 1 for e in shots])
    first, second = np.nonzero(np.triu(shot[:, None] == shot, 1))
    apart, (slope, level, start_end, curve) = centres[second] - centres[first], ({}, {}, {}, {})
    for name, (times, values) in series.items():
        curve[name] = np.concatenate([_window_means(times, values, e) for e in shots])
        rises = (curve[name][second] - curve[name][first]) / apart
        slope[name], level[name] = float(np.median(rises)), float(values.mean())
        ends = [_start_end(times, values, e[0], e[-1]) for e in shots]
        start_end[name] = float(np.average(ends, weights=[len(e) - 1 for e in shots]))
    return Drift(slope, level, start_end, centres, curve, steps)


def _edges(start: float, end: float, window_s: float) -> Array | None:
    """Edges of the windows of a shot; centred, so that a reversed video has the same windows in reverse order."""
    count = int((end - start) / window_s + 1e-6)
    return (start + end - count * window_s) / 2 + window_s * np.arange(count + 1) if count else None


def _window_means(times: Array, values: Array, edges: Array) -> Array:
    place = np.searchsorted(edges, times).clip(1, len(edges) - 1)
    # On an edge: in neither window, or time has a side.
    inside = (times > edges[place - 1] + 1e-6) & (times < edges[place] - 1e-6)
    sums, counts = (np.bincount(place[inside] - 1, w, len(edges) - 1) for w in (values[inside], None))
    return sums / counts


def _start_end(times: Array, values: Array, start: float, end: float) -> float:
    reach = max(ENDS * (end - start), float(times[1] - times[0]))
    after, before = times - start, end - times
    ends = [values[(x > -1e-6) & (x < reach + 1e-6)].mean() for x in (before, after)]
    return float(ends[0] - ends[1])


def frame_statistics(
    frames_FHW3: Iterable[NDArray[np.uint8]], fps: float, cuts: Sequence[int] = ()
) -> tuple[Series, Array]:
    """Every statistic of UNITS, at frame centres or between two frames, and the steps of `Drift`.

    lightness, red_green, yellow_blue (mean L*, a*, b*), contrast (sd of L*), chroma (mean C*); clipped (below 2, above
    253); sharpness (ln of the variance of L*'s Laplacian), detail (L*'s variance beyond a quarter of a cycle a
    pixel), noise (Immerkaer's sd in grey levels); motion (median optical flow in image diagonals a second), steadiness
    (1 - mean absolute change / 255); structure (SSIM of grey pictures with the shot's first).
    """
    import cv2

    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    found = {name: (array("d"), array("d")) for name in UNITS}  # not lists: a rollout of ten minutes is 115,000 values
    steps, before = array("d"), None

    def add(name: str, time_s: float, value: float) -> None:
        for column, x in zip(found[name], (time_s, value)):
            column.append(x)

    for i, frame in enumerate(frames_FHW3):
        values, grey = _of_frame(frame)
        if first := before is None or i in cuts:
            anchor = grey
            steps.extend([] if before is None else [np.nan])
        else:
            steps.append(float(cv2.absdiff(frame, before[0]).mean(dtype=np.float64)))
            speed = np.median(np.linalg.norm(flow.calc(before[1], grey, None), axis=-1))
            add("motion", i / fps, float(speed) * fps / np.hypot(*grey.shape))
            add("steadiness", i / fps, 1 - steps[-1] / 255)
        values["structure"] = 1.0 if first else mean_ssim(grey, anchor)
        for name, value in values.items():
            add(name, (i + 0.5) / fps, float(value))
        before = frame, grey
    return {name: tuple(map(np.array, columns)) for name, columns in found.items()}, np.array(steps)


def _of_frame(frame: NDArray[np.uint8]) -> tuple[dict[str, float], NDArray[np.uint8]]:
    """Statistics of one frame alone, and its grey picture of at most SIDE."""
    import cv2

    shrink = SIDE / max(frame.shape[:2])
    size = tuple(max(1, round(shrink * s)) for s in frame.shape[1::-1])
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if shrink < 1 else frame
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    light = np.ascontiguousarray(lab[..., 0])
    power = np.abs(np.fft.rfft2(light - light.mean(dtype=np.float64))) ** 2
    power[:, 1 : (light.shape[1] + 1) // 2] *= 2  # columns that stand for their mirror images too
    fast = np.hypot(np.fft.fftfreq(light.shape[0])[:, None], np.fft.rfftfreq(light.shape[1])) > 0.25
    rough = cv2.filter2D(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32), cv2.CV_32F, _NOISE)[1:-1, 1:-1]
    means = lab.mean((0, 1), dtype=np.float64)
    return dict(zip(("lightness", "red_green", "yellow_blue"), means)) | {
        "chroma": np.hypot(lab[..., 1], lab[..., 2]).mean(dtype=np.float64),
        "contrast": light.std(dtype=np.float64),
        "clipped": ((frame < 2) | (frame > 253)).mean(),
        "sharpness": np.log(cv2.Laplacian(light, cv2.CV_32F, ksize=1).var(dtype=np.float64) + 1e-3),
        "detail": power[fast].sum() / max(power.sum(), 1e-9),
        "noise": np.sqrt(np.pi / 2) / 6 * np.abs(rough).mean(dtype=np.float64),
    }, cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)


def stagnation(motion_J: ArrayLike) -> float:
    """Share of windows with less than a tenth of the first one's motion: rollouts that freeze. 1 if it never moved."""
    motion = np.asarray(motion_J, dtype=np.float64)
    return float((motion[1:] < 0.1 * motion[0]).mean()) if motion[0] > 1e-6 else 1.0


def seam_ratio(steps: ArrayLike, starts: Sequence[int]) -> float:
    """Root mean square of the steps (F-1,) onto the first frames of chunks (`starts`) over that of the others; 1: no
    seam. steps: `Drift.steps`. NaN where either kind is missing or nothing changes."""
    change = np.asarray(steps, dtype=np.float64)
    seam = np.isin(np.arange(1, len(change) + 1), starts)
    on, off = (x[np.isfinite(x)] for x in (change[seam], change[~seam]))
    return float(np.sqrt((on**2).mean() / (off**2).mean())) if len(on) and off.any() else np.nan


def folded_floor(differences_V: ArrayLike) -> float:
    """The mean size of differences (V,) with this spread and no mean, the floor of |end - start|; NaN below two."""
    known = np.asarray(differences_V)[np.isfinite(differences_V)]
    return float(np.sqrt(2 / np.pi) * known.std(ddof=1)) if known.size > 1 else np.nan


def time_to_failure(drift: Drift, bands: dict[str, tuple[float, float]]) -> tuple[float, bool]:
    """Start of the first two windows in a row in which a statistic leaves its band, and whether that happened.

    bands: statistic -> lowest and highest of true videos. A video that never fails is told with its last window's
    centre, right-censored: over videos of one length the mean is Kaplan and Meier's restricted mean survival time.
    """
    first = len(drift.times_J)
    for name, (low, high) in bands.items():
        out = (drift.curve[name] < low) | (drift.curve[name] > high)
        first = min([first, *np.flatnonzero(out[1:] & out[:-1])])
    failed = first < len(drift.times_J)
    return float(drift.times_J[first if failed else -1]), failed


def composite(excess_VK: Array, real_sd_K: Array, draws: int = 2000) -> Interval:
    """Mean over statistics of |mean excess trend| in units of the true videos' between-video sd (spec 5.2, 7).

    excess_VK (V,K): trend of each video minus that of its true video; real_sd_K (K,). A percentile bootstrap over
    videos. A mean of sizes is never negative and biased upward by noise: for ranking, never alone.
    """
    sd = np.maximum(real_sd_K, 1e-9)
    picks = np.random.default_rng(0).integers(len(excess_VK), size=(draws, len(excess_VK)))
    low, high = np.percentile((np.abs(excess_VK[picks].mean(1)) / sd).mean(1), [2.5, 97.5])
    value = float((np.abs(excess_VK.mean(0)) / sd).mean())
    return Interval(value, float(low), float(high), len(excess_VK))
