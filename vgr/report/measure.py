"""Measure rows of videos against the truth: one number per video and metric, then values with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.metrics import drift as drift_
from vgr.metrics import features, fvd, image
from vgr.metrics.statistics import Interval, mean_interval, paired_difference
from vgr.report.sets import VideoSet

Array = NDArray[np.float64]
Path = tuple[Array, Array]  # c2w (F,4,4) and intrinsics (F,4)
FD, MMD = f"fd_{features.NAME}", f"mmd_{features.NAME}"


class Metric(NamedTuple):
    """label and unit for people; better: "higher", "lower" or "" (neither); primary ones stand in the
    table.
    """

    label: str
    unit: str
    better: str
    primary: bool = True


METRICS = {
    "psnr_db": Metric("PSNR", "dB", "higher"),
    "ssim": Metric("SSIM", "", "higher"),
    "rot_step_imputed_deg": Metric("Rotation error", "°/frame", "lower"),
    "heading_imputed_deg": Metric("Heading error", "°", "lower"),
    "yaw_correlation": Metric("Yaw correlation", "", "higher"),
    "pose_coverage": Metric("Pose coverage", "", "higher"),
    "rot_step_mean_deg": Metric("Rotation error, reliable steps", "°/frame", "lower", False),
    "heading_mean_deg": Metric("Heading error, reliable steps", "°", "lower", False),
    "rot_gain": Metric("Rotation gain", "", "", False),
    FD: Metric("Fréchet distance, clipstats48", "", "lower"),
    MMD: Metric("MMD², clipstats48", "", "lower", False),
    "drift": Metric("Drift", "sd", "lower"),
    "motion_level": Metric("Motion", "diag/s", ""),
    **{
        f"{name}_{kind}": Metric(f"{name.capitalize()} {text}", f"{unit}{per}", "", False)
        for name, unit in drift_.UNITS.items()
        for kind, text, per in (("excess_per_s", "trend over truth", "/s"), ("start_end", "end − start", ""))
    },
    "first_frame_s": Metric("First frame", "s", "lower", False),
    "frames_per_s": Metric("Speed, end to end", "frames/s", "higher", False),
    "denoise_frames_per_s": Metric("Speed, denoising only", "frames/s", "higher", False),
    "realtime_factor": Metric("Video seconds a second", "", "higher", False),
    "other_share": Metric("Time in neither stage", "", "", False),
}
# Steps the estimator cannot read count as no motion in the main numbers: a model that breaks it gains nothing.
# Each main error with what stands and falls with it.
POSE_ERRORS = {
    "rot_step_imputed_deg": {"rot_step_imputed_deg", "rot_step_mean_deg", "yaw_correlation", "rot_gain"},
    "heading_imputed_deg": {"heading_imputed_deg", "heading_mean_deg"},
}
POSE = {name: name for names in POSE_ERRORS.values() for name in names} | {"coverage": "pose_coverage"}
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
    *,
    truth: VideoSet | None = None,
    cameras: Mapping[str, Path | None] = MappingProxyType({}),
    other_cameras: Mapping[str, Path | None] = MappingProxyType({}),
    done: Callable[[int], None] = lambda n: None,
    threads: int = 2,
) -> list[Measured]:
    """Measure every video of a set, in the order of keys. truth None leaves PSNR and SSIM out; cameras gives
    the commanded (c2w, intrinsics) of a key, None leaves the pose out. The first frame, given to the model,
    counts
    for the pose alone."""

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
        paths = [p for p in (cameras.get(key), other_cameras.get(key)) if p is not None]
        for prefix, scores in zip(("", "other_"), pose_values(video, paths) if paths else ()):
            values.update({prefix + k: v for k, v in scores.items()})
        trend = None
        if (len(video) - 1) / fps >= 3 * settings["drift"]["window_s"]:
            trend = drift_.measure_drift(video[1:], fps, settings["drift"]["window_s"])
            values["motion_level"] = trend.level["motion"]
            values.update({f"{k}_start_end": v for k, v in trend.start_end.items()})
        done(1)
        return Measured(key, values, trend, window_features(video, settings))

    with ThreadPoolExecutor(threads) as pool:  # OpenCV and PyAV release the interpreter lock
        return list(pool.map(one, keys))


def window_features(video: NDArray[np.uint8], settings: dict[str, Any]) -> Array:
    """Features (windows, D) of a video without its first frame."""
    windows = features.windows(video[1:], settings["frechet"]["window_frames"])
    return np.array([features.clip_features(w) for w in windows]).reshape(-1, features.SIZE)


def measure_reference(
    videos: VideoSet, frames: int, settings: dict[str, Any], done: Callable[[int], None]
) -> list[Measured]:
    """Features alone, of the true videos Frechet distances compare with."""

    def one(key: str) -> Measured:
        table = window_features(videos.video(key, frames)[0], settings)
        done(1)
        return Measured(key, {}, None, table)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, videos.keys))


def pose_values(video: NDArray[np.uint8], paths: Sequence[Path]) -> list[dict[str, float]]:
    """The camera errors of one video against each (c2w, intrinsics); the flow is read once, with the first's."""
    from vgr.metrics.egomotion import flow_rotation, score_motion

    found = flow_rotation(video, paths[0][1])
    scores = [score_motion(found, c2w) for c2w, _ in paths]
    return [{ours: float(score[theirs]) for theirs, ours in POSE.items()} for score in scores]


def check_pose_estimator(truth: list[Measured]) -> dict[str, dict[str, Any]]:
    """Does the estimator tell the true video's own camera from another clip's? By metric, before a model is judged.

    Passed if the 95 % interval of the paired difference of errors (another's minus own) lies above zero.
    """
    checks = {}
    for metric in POSE_ERRORS:
        right, wrong = column(truth, metric), column(truth, f"other_{metric}")
        difference = paired_difference(wrong, right)
        checks[metric] = {
            "passed": bool(difference.low > 0),
            "own_camera": cell(mean_interval(right)),
            "other_camera": cell(mean_interval(wrong)),
            "difference": cell(difference),
        }
    return checks


def summarize(
    rows: dict[str, list[Measured]],
    settings: dict[str, Any],
    reference: list[Measured] | None,
    skip: set[str],
) -> dict[str, dict[str, Any]]:
    """row -> metric -> cell: means over videos, drift over the truth's, distances to the reference videos.

    skip: metrics whose check failed; they get no value.
    """
    out: dict[str, dict[str, Any]] = {}
    for row, videos in rows.items():
        columns = {m: column(videos, m) for m in METRICS if m not in skip}
        out[row] = {m: cell(mean_interval(x)) for m, x in columns.items() if np.isfinite(x).any()}
        if "truth" in rows and all(v.drift for v in videos):
            out[row].update(_drift_over_truth(videos, rows["truth"]))
        if reference:
            out[row].update(_distances(videos, reference, settings["frechet"]))
    return out


def check_frame_order(
    truth: VideoSet, keys: Sequence[str], frames: int, reference: list[Measured], settings: dict[str, Any]
) -> dict[str, Any]:
    """Is the Frechet distance sensitive to time? True videos with the frames of each window shuffled must lie
    farther from the reference than the same videos in order and than twice the null bias (spec 2.4)."""
    rng, length = np.random.default_rng(0), settings["frechet"]["window_frames"]
    known = _stack(reference)[0]
    tables: list[list[Array]] = [[], []]
    for key in keys:
        for window in features.windows(truth.video(key, frames)[0][1:], length):
            tables[0].append(features.clip_features(window))
            tables[1].append(features.clip_features(window[rng.permutation(length)]))
    ordered, shuffled = (fvd.frechet_distance(np.stack(t), known) for t in tables)
    bias = _null_bias(known, len(tables[0]))
    return {
        "passed": bool(shuffled > 2 * bias and shuffled > ordered),
        "shuffled": shuffled,
        "ordered": ordered,
        "null_bias": bias,
    }


def compare(rows: dict[str, list[Measured]], row: str, controls: Sequence[str], skip: set[str]) -> list[dict[str, Any]]:
    """Paired differences row - control for the metrics of true continuation and camera, with `wins` said
    plainly.
    """
    out = []
    for control in controls:
        for metric in ("psnr_db", "ssim", *POSE_ERRORS):
            a, b = column(rows[row], metric), column(rows[control], metric)
            if metric in skip or not np.isfinite(a - b).any():
                continue
            difference = paired_difference(a, b)
            gain = difference.low > 0 if METRICS[metric].better == "higher" else difference.high < 0
            out.append({"row": row, "control": control, "metric": metric, "better": bool(gain), **cell(difference)})
    return out


def follows_given(swapped: list[Measured], skip: set[str]) -> dict[str, Any]:
    """Of the swapped row: camera errors against the path it was given, and how much larger they are (paired)
    against the clip's own. Above zero where the model listens."""
    out = {}
    for metric in set(POSE_ERRORS) - skip:
        given, own = column(swapped, f"other_{metric}"), column(swapped, metric)
        if np.isfinite(own - given).any():
            out[metric] = {**cell(mean_interval(given)), "own_minus_given": cell(paired_difference(own, given))}
    return out


def curves(rows: dict[str, list[Measured]]) -> dict[str, Any]:
    """For the page: by row and statistic the mean over videos in each window with its interval."""
    out: dict[str, Any] = {}
    for row, videos in rows.items():
        if not videos or not all(v.drift for v in videos):
            continue
        length = min(len(v.drift.times_J) for v in videos)
        out[row] = {"times_s": [number(t) for t in videos[0].drift.times_J[:length]]}
        for name in CURVES:
            table = np.array([v.drift.curve[name][:length] for v in videos])
            points = [mean_interval(x, method="percentile", draws=999) for x in table.T]
            out[row][name] = {k: [number(getattr(p, k)) for p in points] for k in ("value", "low", "high")}
    return out


def column(videos: list[Measured], metric: str) -> Array:
    return np.array([v.values.get(metric, np.nan) for v in videos], dtype=np.float64)


def cell(interval: Interval) -> dict[str, Any]:
    """An interval as results.json holds it: finite numbers or null."""
    return {"value": number(interval.value), "low": number(interval.low), "high": number(interval.high)} | {
        "count": interval.count
    }


def number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _drift_over_truth(videos: list[Measured], truth: list[Measured]) -> dict[str, Any]:
    real = {t.key: t.drift for t in truth if t.drift}
    pairs = [(v.drift.slope, real[v.key].slope) for v in videos if v.key in real]
    if not pairs:
        return {}
    excess = {name: np.array([a[name] - b[name] for a, b in pairs]) for name in drift_.UNITS}
    out = {f"{name}_excess_per_s": cell(mean_interval(x)) for name, x in excess.items()}
    spread = np.array([np.nanstd([t.slope[name] for t in real.values()], ddof=1) for name in drift_.COMPOSITE])
    out["drift"] = cell(drift_.composite(np.stack([excess[n] for n in drift_.COMPOSITE], axis=1), spread))
    return out


def _stack(videos: list[Measured]) -> tuple[Array, NDArray[np.str_]]:
    rows = np.concatenate([v.features for v in videos])
    return rows, np.repeat([v.key for v in videos], [len(v.features) for v in videos])


def _null_bias(reference: Array, rows: int) -> float:
    """The closed form for sets of unequal size: its terms go with 1/N + 1/M."""
    return fvd.null_bias(fvd.moments(reference).covariance, 1) * (1 / rows + 1 / len(reference)) / 2


def _distances(videos: list[Measured], reference: list[Measured], settings: dict[str, Any]) -> dict[str, Any]:
    (a, a_video), (b, b_video) = _stack(videos), _stack(reference)
    if min(len(a), len(b)) < 2:
        return {}
    distance = fvd.frechet_interval(a, b, a_video, b_video, draws=settings["draws"])
    mean, sd = fvd.polynomial_mmd(a, b, size=max(2, min(len(a), len(b)) // 2))
    detail = {"windows": len(a), "reference_windows": len(b), "reference_videos": len(reference)}
    return {
        FD: {**cell(distance), "null_bias": _null_bias(b, len(a)), **detail},
        MMD: {**cell(Interval(mean, mean - 1.96 * sd, mean + 1.96 * sd, distance.count)), **detail},
    }
