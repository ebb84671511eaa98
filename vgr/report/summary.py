"""From one table per video to values with intervals: means, drift, distances, checks, comparisons, curves."""

from __future__ import annotations

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
Rows = dict[str, list[Measured]]
Known = Mapping[str, list[Array] | fvd.Moments]  # distance -> features of true clips, or their moments alone
CURVES = ("lightness", "sharpness", "contrast", "motion")
COMPARED = ("psnr_db", "ssim", *POSE_ERRORS, "rot_imputed_deg", "trans_imputed")
BAND = (1, 99)  # percentiles of true windows beyond which a video has failed


def column(videos: list[Measured], metric: str) -> Array:
    return np.array([v.values.get(metric, np.nan) for v in videos], dtype=np.float64)


def cell(interval: Interval) -> dict[str, Any]:
    """An interval as results.json holds it: finite numbers or null; failed units and what they make only where any."""
    found = {k: number(x) for k, x in interval._asdict().items()} | {"count": interval.count, "failed": interval.failed}
    return found if interval.failed else {k: found[k] for k in ("value", "low", "high", "count")}


def mean_cell(values: ArrayLike, draws: int = 9999, units: Sequence[str] | None = None) -> dict[str, Any]:
    """The cell of `mean_interval`."""
    return cell(mean_interval(values, draws, units))


def number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


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


def check_frame_order(truth: list[Measured], known: Known) -> dict[str, dict[str, Any]]:
    """Is each distance sensitive to time? True videos with the frames of each window shuffled must lie
    farther from the reference than the same videos in order and than twice the null bias (spec 2.4).
    """
    checks = {}
    for name, reference in known.items():
        ours, mixed = (fvd.Moments.of(_stack(truth, f"{way}{name}")) for way in ("", "shuffled "))
        true = moments(reference)
        ordered, shuffled = (fvd.frechet_between(x, true) for x in (ours, mixed))
        bias = fvd.null_bias(true.covariance(), ours.count, true.count)
        passed = bool(shuffled > max(2 * bias, ordered))
        checks[name] = {"passed": passed, "shuffled": shuffled, "ordered": ordered, "null_bias": bias}
    return checks


def summarize(
    rows: Rows, settings: dict[str, Any], known: Known, skip: set[str], units: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """row -> metric -> cell: means over units, drift over the truth's, distances to the reference's features.

    skip: metrics whose check failed; they get no value. units: the prompt or scene of each video.
    """
    out: dict[str, dict[str, Any]] = {}
    bands = failure_bands(rows["truth"]) if "truth" in rows else {}
    for row, videos in rows.items():
        columns = {m: column(videos, m) for m in METRICS if m not in skip}
        out[row] = {m: mean_cell(x, units=units) for m, x in columns.items() if np.isfinite(x).any()}
        if "truth" in rows and all(v.drift for v in videos + rows["truth"]):
            out[row].update(_drift_over_truth(videos, rows["truth"]))
            times, failed = zip(*(drift_.time_to_failure(v.drift, bands) for v in videos))
            mean = mean_interval(times, units=units)  # all last equally long, so that this is Kaplan and Meier's
            out[row]["time_to_failure_s"] = cell(mean) | {"failures": int(sum(failed))}
        for name, reference in known.items():
            if (features := [x for v in videos if len(x := v.features[name])]) and sum(map(len, features)) > 1:
                out[row][name] = _distance(name, features, reference, settings["frechet"]["draws"], len(videos))
    return out


def failure_bands(truth: list[Measured]) -> dict[str, tuple[float, float]]:
    """Of each primary statistic, between which values the true videos' windows lie; {} where none has a drift."""
    drifts = [v.drift for v in truth if v.drift]
    return {
        name: tuple(np.nanpercentile(np.concatenate([d.curve[name] for d in drifts]), BAND))
        for name in (drift_.PRIMARY if drifts else ())
    }


def drift_table(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """row -> statistic -> trend, its excess over true videos and over the codec's, end minus start, the mean size of
    that and the size that true videos' spread alone would give it. Where videos are long enough.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for row, videos in rows.items():
        if not any(v.drift for v in videos):
            continue
        out[row] = {}
        for name in drift_.UNITS:
            trend, ends = column(videos, f"{name}_per_s"), column(videos, f"{name}_end_minus_start")
            found = {"per_s": mean_cell(trend), "end_minus_start": mean_cell(ends)}
            found["end_minus_start_size"] = mean_cell(np.abs(ends))
            for other in ("truth", "codec"):
                if other in rows and row != other:
                    found[f"over_{other}_per_s"] = mean_cell(trend - column(rows[other], f"{name}_per_s"))
            if "truth" in rows:
                found["size_floor"] = number(drift_.folded_floor(column(rows["truth"], f"{name}_end_minus_start")))
            out[row][name] = found
    return out


def survival(rows: Rows) -> dict[str, dict[str, Any]]:
    """row -> Kaplan-Meier's curve: seconds, share of videos not failed, and the last second seen."""
    if "truth" not in rows or not all(v.drift for videos in rows.values() for v in videos):
        return {}
    bands, out = failure_bands(rows["truth"]), {}
    for row, videos in rows.items():
        times, failed = zip(*(drift_.time_to_failure(v.drift, bands) for v in videos))
        when, alive, _ = drift_.survival(times, failed)
        out[row] = {"times_s": when.tolist(), "alive": alive.tolist(), "end_s": max(times)}
    return out


def compare(rows: Rows, skip: set[str], units: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Paired differences model - control for the metrics of true continuation and camera. `better`: the interval
    leaves zero on the good side; `stands`: so does the permutation test after Benjamini-Hochberg over the whole list.
    """
    out = []
    for control in ("swapped", "frozen"):
        for metric in COMPARED if control in rows and "model" in rows else ():
            found = paired(*(column(rows[row], metric) for row in ("model", control)), units)
            difference = found.difference
            if metric not in skip and difference.count:
                better = difference.low > 0 if METRICS[metric].better == "higher" else difference.high < 0
                out.append({"control": control, "metric": metric, "better": bool(better), **cell(difference),
                            "p": number(found.p), "rank_biserial": number(found.rank_biserial)})  # fmt: skip
    for entry, stands in zip(out, discoveries([np.nan if c["p"] is None else c["p"] for c in out])):
        entry["stands"] = bool(stands) and entry["better"]
    return out


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


def _drift_over_truth(videos: list[Measured], truth: list[Measured]) -> dict[str, Any]:
    ours, real = (np.array([list(v.drift.slope.values()) for v in row]) for row in (videos, truth))
    out = {f"{name}_excess_per_s": mean_cell(x) for name, x in zip(drift_.UNITS, (ours - real).T)}
    ours, real = (x[:, : len(drift_.PRIMARY)] for x in (ours, real))
    return out | {"drift": cell(drift_.composite(ours - real, real.std(0, ddof=1)))}


def _stack(videos: list[Measured], name: str) -> Array:
    return np.concatenate([x for v in videos if len(x := v.features[name])])


def moments(reference: list[Array] | fvd.Moments) -> fvd.Moments:
    return reference if isinstance(reference, fvd.Moments) else fvd.Moments.of(np.concatenate(reference))


def _distance(
    name: str, ours: list[Array], reference: list[Array] | fvd.Moments, draws: int, count: int
) -> dict[str, Any]:
    """The distance as its protocol has it, with its null bias; interval and MMD where there are true features."""
    rows, true = np.concatenate(ours), moments(reference)
    ddof = 1 if name == FD else 0
    value = fvd.frechet_between(fvd.Moments.of(rows), true, ddof)
    found = cell(Interval(value, np.nan, np.nan, len(ours), count - len(ours)))
    if not isinstance(reference, fvd.Moments):
        videos = [np.repeat(np.arange(len(t)), [len(x) for x in t]) for t in (ours, reference)]
        tables = rows, np.concatenate(reference), *videos
        spread = fvd.frechet_interval(*tables, draws)
        found |= {end: number(max(getattr(spread, end) - spread.value + value, 0.0)) for end in ("low", "high")}
        found["mmd"] = cell(fvd.frechet_interval(*tables, min(draws, 40), fvd.kernel_distance))
    bias = fvd.null_bias(true.covariance(), len(rows), true.count)
    return {**found, "null_bias": bias, "windows": len(rows), "reference_windows": true.count}
