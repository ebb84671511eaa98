"""From one table per video to values with intervals: means, drift, distances, checks, comparisons, curves."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.metrics import drift as drift_
from vgr.metrics import fvd
from vgr.metrics.statistics import Interval, discoveries, mean_interval, paired
from vgr.report.measure import Measured
from vgr.report.table import FD, METRICS, POSE_ERRORS

Array = NDArray[np.float64]
Cell = dict[str, Any]
Rows = dict[str, list[Measured]]
Known = Mapping[str, list[Array] | fvd.Moments]  # distance -> features of true clips, or their moments alone
CURVES = ("lightness", "sharpness", "contrast", "motion")
COMPARED = ("psnr_db", "ssim", *POSE_ERRORS, "rot_imputed_deg", "trans_imputed")
BAND = (1, 99)  # percentiles of true windows beyond which a video has failed


def column(videos: list[Measured], metric: str) -> Array:
    return np.array([v.values.get(metric, np.nan) for v in videos], dtype=np.float64)


def cell(interval: Interval) -> Cell:
    """An interval as results.json holds it: finite numbers or null; failed units and what they make only where any."""
    found = {k: number(x) for k, x in interval._asdict().items()} | {"count": interval.count, "failed": interval.failed}
    return found if interval.failed else {k: found[k] for k in ("value", "low", "high", "count")}


def mean_cell(values: ArrayLike, draws: int = 9999, units: Sequence[str] | None = None) -> Cell:
    """The cell of `mean_interval`."""
    return cell(mean_interval(values, draws, units))


def number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def check_pose_estimator(truth: list[Measured]) -> dict[str, Cell]:
    """Does the estimator tell the true video's own camera from another clip's? By metric, before a model is judged:
    passed if the 95 % interval of the paired difference of errors (another's minus own) lies above zero."""
    checks = {}
    for metric in POSE_ERRORS:
        own, other = column(truth, metric), column(truth, f"other_{metric}")
        found = {"own_camera": own, "other_camera": other, "difference": other - own}
        cells = {name: mean_cell(x) for name, x in found.items()}
        checks[metric] = {"passed": (cells["difference"]["low"] or 0) > 0, **cells}
    return checks


def check_frame_order(truth: list[Measured], known: Known) -> dict[str, Cell]:
    """Is each distance sensitive to time? True videos with the frames of each window shuffled must lie farther from the
    reference than in order and than twice the null bias (spec 2.4)."""
    checks = {}
    for name, reference in known.items():
        true = moments(reference)
        if sum(len(v.features[name]) for v in truth) < 2:
            continue  # clips too short for this network
        ours, mixed = (moments([v.features[f"{way}{name}"] for v in truth]) for way in ("", "shuffled "))
        ordered, shuffled = (fvd.frechet_between(x, true) for x in (ours, mixed))
        bias = fvd.null_bias(true.covariance(), ours.count, true.count)
        passed = bool(shuffled > max(2 * bias, ordered))
        checks[name] = {"passed": passed, "shuffled": shuffled, "ordered": ordered, "null_bias": bias}
    return checks


def summarize(
    rows: Rows, settings: dict[str, Any], known: Known, skip: set[str], units: Sequence[str]
) -> dict[str, dict[str, Cell]]:
    """row -> metric -> cell: means over units, drift over the truth's, distances to the reference's features. skip:
    metrics whose check failed; they get no value. units: the prompt or scene of each video."""
    out: dict[str, dict[str, Cell]] = {}
    drifts = [v.drift for v in rows.get("truth", ()) if v.drift]
    windows = {n: np.concatenate([d.curve[n] for d in drifts]) for n in (drift_.PRIMARY if drifts else ())}
    bands = {name: tuple(np.nanpercentile(x, BAND)) for name, x in windows.items()}
    for row, videos in rows.items():
        columns = {m: column(videos, m) for m in METRICS if m not in skip}
        out[row] = {m: mean_cell(x, units=units) for m, x in columns.items() if np.isfinite(x).any()}
        if "truth" in rows and all(v.drift for v in videos + rows["truth"]):
            out[row].update(_drift_over_truth(videos, rows["truth"]))
            times, failed = zip(*(drift_.time_to_failure(v.drift, bands) for v in videos))
            out[row]["time_to_failure_s"] = mean_cell(times, units=units) | {"failures": int(sum(failed))}
        for name, reference in known.items():
            if len(features := [x for v in videos if len(x := v.features[name])]) > 1:
                out[row][name] = _distance(name, features, reference, settings["frechet"]["draws"], len(videos))
    return out


def drift_table(rows: Rows) -> dict[str, dict[str, Cell]]:
    """row -> statistic -> trend, its excess over true videos and over the codec's, end minus start, the mean size of
    that, and the size that true videos' spread alone would give it."""
    out: dict[str, dict[str, Cell]] = {}
    for row, videos in rows.items():
        for name in drift_.UNITS if any(v.drift for v in videos) else ():
            trend, ends = column(videos, f"{name}_per_s"), column(videos, f"{name}_end_minus_start")
            told = {"per_s": trend, "end_minus_start": ends, "end_minus_start_size": np.abs(ends)}
            others = [other for other in ("truth", "codec") if other in rows and row != other]
            told |= {f"over_{other}_per_s": trend - column(rows[other], f"{name}_per_s") for other in others}
            found: Cell = {kind: mean_cell(x, 1999) for kind, x in told.items()}
            if "truth" in rows:
                found["size_floor"] = number(drift_.folded_floor(column(rows["truth"], f"{name}_end_minus_start")))
            out.setdefault(row, {})[name] = found
    return out


def compare(rows: Rows, skip: set[str], units: Sequence[str]) -> list[Cell]:
    """Paired differences model - control of what is true continuation and camera. `better`: the interval leaves zero
    on the good side; `stands`: and the permutation test stands after Benjamini-Hochberg over the whole list."""
    out = []
    for control in ("swapped", "frozen"):
        for metric in COMPARED if control in rows else ():
            found, p, effect = paired(*(column(rows[row], metric) for row in ("model", control)), units)
            if metric not in skip and found.count:
                low, high = found[1:3]
                better = low > 0 if METRICS[metric].better == "higher" else high < 0
                out.append({"control": control, "metric": metric, "better": bool(better), **cell(found),
                            "p": number(p), "rank_biserial": number(effect)})  # fmt: skip
    stands = discoveries([np.nan if c["p"] is None else c["p"] for c in out])
    return [{**c, "stands": bool(x) and c["better"]} for c, x in zip(out, stands)]


def curves(rows: Rows) -> dict[str, Any]:
    """For the page: by row and statistic the mean over videos in each window with its interval."""
    out: dict[str, Any] = {}
    for row, videos in rows.items():
        if all(v.drift for v in videos) and len({len(v.drift.times_J) for v in videos}) == 1:
            out[row] = {"times_s": videos[0].drift.times_J.tolist()}
            for name in CURVES:
                points = [mean_cell(x, draws=999) for x in zip(*(v.drift.curve[name] for v in videos))]
                out[row][name] = {k: [p[k] for p in points] for k in ("value", "low", "high")}
    return out


def moments(features: list[Array] | fvd.Moments) -> fvd.Moments:
    """Of all rows; moments as they are."""
    if isinstance(features, fvd.Moments):
        return features
    return functools.reduce(fvd.Moments.merged, [fvd.Moments.of(x) for x in features if len(x)])


def _drift_over_truth(videos: list[Measured], truth: list[Measured]) -> dict[str, Cell]:
    ours, real = (np.array([[v.drift.slope[n] for n in drift_.PRIMARY] for v in row]) for row in (videos, truth))
    out = {f"{name}_excess_per_s": mean_cell(x) for name, x in zip(drift_.PRIMARY, (ours - real).T)}
    return out | {"drift": cell(drift_.composite(ours - real, real.std(0, ddof=1)))}


def _distance(name: str, ours: list[Array], reference: list[Array] | fvd.Moments, draws: int, count: int) -> Cell:
    """The distance as its protocol has it, with its null bias; interval and MMD where there are true features."""
    mine, true = moments(ours), moments(reference)
    value = fvd.frechet_between(mine, true, ddof=1 if name == FD else 0)
    found = cell(Interval(value, np.nan, np.nan, len(ours), count - len(ours)))
    if not isinstance(reference, fvd.Moments):
        videos = [np.repeat(np.arange(len(t)), [len(x) for x in t]) for t in (ours, reference)]
        tables = np.concatenate(ours), np.concatenate(reference), *videos
        spread = fvd.frechet_interval(*tables, draws)
        found |= {end: number(max(getattr(spread, end) - spread.value + value, 0.0)) for end in ("low", "high")}
        found["mmd"] = cell(fvd.frechet_interval(*tables, min(draws, 40), fvd.kernel_distance))
    bias = fvd.null_bias(true.covariance(), mine.count, true.count)
    return {**found, "null_bias": bias, "windows": mine.count, "reference_windows": true.count}
