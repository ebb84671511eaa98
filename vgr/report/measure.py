"""Measure rows of videos against the truth: one number per video and metric, then values with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.metrics import drift as drift_
from vgr.metrics import features, fvd, image
from vgr.metrics.statistics import Interval, mean_interval
from vgr.report.sets import VideoSet

Array = NDArray[np.float64]
Path = tuple[Array, Array]  # c2w (F,4,4) and intrinsics (F,4)
FD = f"fd_{features.NAME}"


class Metric(NamedTuple):
    """label and unit for people; better: "higher", "lower" or "" (neither); `how` and the protocol's `section`
    define the number; primary ones stand in the table.
    """

    label: str
    unit: str
    better: str
    how: str
    section: str = ""
    primary: bool = True


_SCORED = "mean over frames; the given first frame is left out; range 255"
_FLOW = "frame-to-frame optical flow, small rotations, no alignment; unreadable steps count as no motion"
_TREND = "Theil-Sen slope over windows minus the true video's; the given first frame is left out"
_CALLS = "batch 1, one request after another, text encoding and decoding included"
METRICS = {
    "psnr_db": Metric("PSNR", "dB", "higher", _SCORED),
    "ssim": Metric("SSIM", "", "higher", _SCORED),
    "rot_step_imputed_deg": Metric("Rotation error", "°/frame", "lower", _FLOW),
    "heading_imputed_deg": Metric("Heading error", "°", "lower", _FLOW),
    "pose_coverage": Metric("Pose coverage", "", "higher", "share of steps the flow can read"),
    FD: Metric(
        "Fréchet distance, clipstats48", "", "lower",
        "features clipstats48 (no weights) of windows at 64x48, ddof 1; interval from half-samples", "frechet",
    ),
    "drift": Metric("Drift", "sd", "lower", f"mean size of five trends in sd of the true videos'. {_TREND}", "drift"),
    "motion_level": Metric("Motion", "diag/s", "", "median optical flow in image diagonals a second", "drift"),
    **{
        f"{name}_excess_per_s": Metric(f"{name.capitalize()} trend over truth", f"{unit}/s", "", _TREND, "drift", False)
        for name, unit in drift_.UNITS.items()
    },
    "first_frame_s": Metric("First frame", "s", "lower", _CALLS, "frame_rate", False),
    "frames_per_s": Metric("Speed, end to end", "frames/s", "higher", _CALLS, "frame_rate", False),
    "denoise_frames_per_s": Metric(
        "Speed, denoising only", "frames/s", "higher", "batch 1; denoising alone", "frame_rate", False
    ),
}  # fmt: skip
POSE_ERRORS = ("rot_step_imputed_deg", "heading_imputed_deg")
CURVES = ("lightness", "sharpness", "contrast", "motion")


class Measured(NamedTuple):
    """Of one video: metric -> value, its drift (None if too short), features (windows, D) and the key."""

    key: str
    values: dict[str, float]
    drift: drift_.Drift | None
    features: Array


def measure_set(
    videos: VideoSet,
    keys: Sequence[str],
    frames: int,
    settings: dict[str, Any],
    truth: VideoSet | None,
    paths: Mapping[str, Sequence[Path]],
    done: Callable[[int], None],
) -> list[Measured]:
    """Measure every video of a set, in the order of keys; settings is the protocol.

    truth None leaves PSNR and SSIM out. paths gives a key's commanded (c2w, intrinsics), nothing leaves the pose
    out; errors against a second path are called other_<metric>. The first frame, given to the model, counts for
    the pose alone. Raises ValueError when sizes differ from the truth's.
    """

    def one(key: str) -> Measured:
        video, fps = videos.video(key, frames)
        values: dict[str, float] = {}
        if truth is not None:
            true = truth.video(key, frames)[0]
            if video.shape != true.shape:
                raise ValueError(
                    f"{videos.folder / key}.mp4 is {video.shape[2]}x{video.shape[1]}, the true video "
                    f"{true.shape[2]}x{true.shape[1]}; scale the videos to the data's size first"
                )
            values["psnr_db"] = float(image.psnr(video[1:], true[1:]).mean())
            values["ssim"] = float(image.ssim(video[1:], true[1:]).mean())
        for prefix, scores in zip(("", "other_"), pose_values(video, paths[key]) if paths[key] else ()):
            values.update({prefix + k: v for k, v in scores.items()})
        trend = None
        if (len(video) - 1) / fps >= 3 * settings["drift"]["window_s"]:
            trend = drift_.measure_drift(video[1:], fps, settings["drift"]["window_s"])
            values["motion_level"] = trend.level["motion"]
        done(1)
        return Measured(key, values, trend, window_features(video, settings))

    with ThreadPoolExecutor(2) as pool:  # OpenCV and PyAV release the interpreter lock
        return list(pool.map(one, keys))


def window_features(
    video: NDArray[np.uint8], settings: dict[str, Any], shuffle: np.random.Generator | None = None
) -> Array:
    """Features (windows, D) of a video without its first frame; shuffle: with the frames of each window shuffled."""
    windows = features.windows(video[1:], settings["frechet"]["window_frames"])
    return np.array([features.clip_features(shuffle.permutation(w) if shuffle else w) for w in windows])


def reference_features(
    videos: VideoSet, frames: int, settings: dict[str, Any], done: Callable[[int], None]
) -> list[Array]:
    """`window_features` of every true video that Frechet distances compare with."""

    def one(key: str) -> Array:
        table = window_features(videos.video(key, frames)[0], settings)
        done(1)
        return table

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, videos.keys))


def pose_values(video: NDArray[np.uint8], paths: Sequence[Path]) -> list[dict[str, float]]:
    """The camera errors of one video against each (c2w, intrinsics); the flow is read once, with the first's."""
    from vgr.metrics.egomotion import flow_rotation, score_motion

    found = flow_rotation(video, paths[0][1])
    scores = [score_motion(found, c2w) for c2w, _ in paths]
    return [{**{k: float(s[k]) for k in POSE_ERRORS}, "pose_coverage": float(s["coverage"])} for s in scores]


def check_pose_estimator(truth: list[Measured]) -> dict[str, dict[str, Any]]:
    """Does the estimator tell the true video's own camera from another clip's? By metric, before a model is judged.

    Passed if the 95 % interval of the paired difference of errors (another's minus own) lies above zero.
    """
    checks = {}
    for metric in POSE_ERRORS:
        own, other = column(truth, metric), column(truth, f"other_{metric}")
        found = {"own_camera": own, "other_camera": other, "difference": other - own}
        cells = {name: mean_cell(x) for name, x in found.items()}
        checks[metric] = {"passed": (cells["difference"]["low"] or 0) > 0, **cells}
    return checks


def check_frame_order(
    truth: VideoSet, measured: list[Measured], frames: int, reference: list[Array], settings: dict[str, Any]
) -> dict[str, Any]:
    """Is the Frechet distance sensitive to time? True videos with the frames of each window shuffled must lie
    farther from the reference (features of one video each) than the same videos in order and than twice the null
    bias (spec 2.4).
    """
    known, rng = np.concatenate(reference), np.random.default_rng(0)
    tables = ([v.features for v in measured],
              [window_features(truth.video(v.key, frames)[0], settings, shuffle=rng) for v in measured])  # fmt: skip
    ordered, shuffled = (fvd.frechet_distance(np.concatenate(t), known) for t in tables)
    bias = fvd.null_bias(fvd.moments(known)[1], sum(map(len, tables[0])), len(known))
    passed = bool(shuffled > max(2 * bias, ordered))
    return {"passed": passed, "shuffled": shuffled, "ordered": ordered, "null_bias": bias}


def summarize(
    rows: dict[str, list[Measured]], settings: dict[str, Any], reference: list[Array] | None, skip: set[str]
) -> dict[str, dict[str, Any]]:
    """row -> metric -> cell: means over videos, drift over the truth's, distances to the reference's features.

    skip: metrics whose check failed; they get no value.
    """
    out: dict[str, dict[str, Any]] = {}
    for row, videos in rows.items():
        columns = {m: column(videos, m) for m in METRICS if m not in skip}
        out[row] = {m: mean_cell(x) for m, x in columns.items() if np.isfinite(x).any()}
        if "truth" in rows and all(v.drift for v in videos + rows["truth"]):
            out[row].update(_drift_over_truth(videos, rows["truth"]))
        if reference:
            out[row][FD] = _distance([v.features for v in videos], reference, settings["frechet"]["draws"])
    return out


def compare(rows: dict[str, list[Measured]], skip: set[str]) -> list[dict[str, Any]]:
    """Paired differences model - control for the metrics of true continuation and camera. `better`: the interval
    leaves zero on the good side.
    """
    out = []
    metrics = [m for m in ("psnr_db", "ssim", *POSE_ERRORS) if m not in skip]
    for control in (c for c in ("swapped", "frozen") if c in rows):
        for metric in metrics:
            difference = mean_interval(column(rows["model"], metric) - column(rows[control], metric))
            if difference.count:
                better = difference.low > 0 if METRICS[metric].better == "higher" else difference.high < 0
                out.append({"control": control, "metric": metric, "better": bool(better), **cell(difference)})
    return out


def curves(rows: dict[str, list[Measured]]) -> dict[str, Any]:
    """For the page: by row and statistic the mean over videos in each window with its interval."""
    out: dict[str, Any] = {}
    for row, videos in rows.items():
        if all(v.drift for v in videos):
            out[row] = {"times_s": videos[0].drift.times_J.tolist()}
            for name in CURVES:
                points = [mean_cell(x, draws=999) for x in zip(*(v.drift.curve[name] for v in videos))]
                out[row][name] = {k: [p[k] for p in points] for k in ("value", "low", "high")}
    return out


def column(videos: list[Measured], metric: str) -> Array:
    return np.array([v.values.get(metric, np.nan) for v in videos], dtype=np.float64)


def cell(interval: Interval) -> dict[str, Any]:
    """An interval as results.json holds it: finite numbers or null."""
    return {k: number(x) for k, x in interval._asdict().items()} | {"count": interval.count}


def mean_cell(values: ArrayLike, draws: int = 9999) -> dict[str, Any]:
    """The cell of `mean_interval`."""
    return cell(mean_interval(values, draws))


def number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _drift_over_truth(videos: list[Measured], truth: list[Measured]) -> dict[str, Any]:
    ours, real = (np.array([list(v.drift.slope.values()) for v in row]) for row in (videos, truth))
    out = {f"{name}_excess_per_s": mean_cell(x) for name, x in zip(drift_.UNITS, (ours - real).T)}
    return out | {"drift": cell(drift_.composite(ours - real, real.std(0, ddof=1)))}


def _distance(ours: list[Array], reference: list[Array], draws: int) -> dict[str, Any]:
    a, b = np.concatenate(ours), np.concatenate(reference)
    a_video, b_video = (np.repeat(np.arange(len(t)), [len(x) for x in t]) for t in (ours, reference))
    distance = fvd.frechet_interval(a, b, a_video, b_video, draws)
    bias = fvd.null_bias(fvd.moments(b)[1], len(a), len(b))
    return {**cell(distance), "null_bias": bias, "windows": len(a), "reference_windows": len(b)}
