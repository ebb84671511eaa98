"""Rows of videos to results.json (values, checks, provenance) and videos.jsonl (one line per row and
video).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgr.data.files import atomic
from vgr.metrics import frame_rate, fvd
from vgr.metrics.statistics import mean_interval
from vgr.report import measure as m
from vgr.report.rows import LABELS
from vgr.report.sets import VideoSet, write_json

_GET = {
    "fvd": (
        "the smoke protocol has no I3D features, and only those make a FVD",
        f"get {fvd.I3D['file']} (git blob SHA-1 {fvd.I3D['git_blob_sha1']}) from {fvd.I3D['source']}, put it into "
        "weights/, and use a protocol that asks for it",
    ),
}


def measure(
    protocol: dict[str, Any],
    sets: dict[str, VideoSet],
    keys: list[str],
    frames: int,
    reference: VideoSet | None,
    done: Callable[[int], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure all rows. Returns (the content of results.json, the lines of videos.jsonl).

    The pose estimator is checked on the true videos first: a metric by which it cannot tell the video's own
    camera from another clip's is reported as unavailable, not as a number.
    """
    truth = sets.get("truth")
    source = truth or sets["model"]
    paths = {k: source.cameras(k, frames) for k in keys}
    unavailable = {k: {"why": why, "get": get} for k, (why, get) in _GET.items()}
    half = len(keys) // 2
    other = dict(zip(keys, [paths[k] for k in keys[half:] + keys[:half]]))  # as rows.make_rows turns them
    measured, checks = {}, {}
    if truth is not None:
        measured["truth"] = m.measure_set(truth, keys, frames, protocol, cameras=paths, other_cameras=other, done=done)
        checks["pose"] = m.check_pose_estimator(measured["truth"])
    failed = set()
    for metric, check in checks.get("pose", {}).items():
        if not check["passed"]:
            failed |= m.POSE_ERRORS[metric]
            nothing = check["difference"]["count"] == 0
            unavailable[metric] = {
                "why": "nothing in these clips shows it"
                if nothing
                else "on these true videos the estimator does not tell a clip's own camera from another's",
                "get": "larger or sharper videos, more motion, or more clips",
            }
    for row, videos in sets.items():
        if row != "truth":
            given = other if row == "swapped" else {}
            measured[row] = m.measure_set(
                videos, keys, frames, protocol, truth=truth, cameras=paths, other_cameras=given, done=done
            )
    known = None
    if reference is not None:
        known = m.measure_reference(reference, frames, protocol, done)
        checks["frame_order"] = m.check_frame_order(truth, keys, frames, known, protocol)
    rows = m.summarize(measured, protocol, known, failed)
    info = sets["model"].info
    video, fps = source.video(keys[0], frames)
    speed = frame_rate.summarize(info.get("timings", []), fps)
    rows["model"] |= {name: m.cell(mean_interval(values)) for name, values in speed.items()}
    unavailable |= _missing(rows["model"], truth, reference, paths, info)
    controls = [r for r in ("swapped", "frozen") if r in measured]
    found = {
        "protocol": protocol,
        "fps": fps,
        "size_hw": list(video.shape[1:3]),
        "captions": {k: source.info.get("captions", {}).get(k, []) for k in keys},
        "psnr_by_clip": {v.key: v.values["psnr_db"] for v in measured["model"] if "psnr_db" in v.values},
        "frames": frames,
        "clips": keys,
        "made_by": info.get("made_by", {}),
        "memory": info.get("memory", {}),
        "metrics": {k: {**x._asdict(), "settings": _settings(k, protocol, frames)} for k, x in m.METRICS.items()},
        "rows": {r: {"label": LABELS[r][0], "note": LABELS[r][1], "metrics": rows[r]} for r in measured},
        "swapped_follows": m.follows_given(measured.get("swapped", []), failed),
        "comparisons": m.compare(measured, "model", controls, failed),
        "checks": checks,
        "curves": m.curves(measured),
        "unavailable": {k: v for k, v in unavailable.items() if k not in rows["model"]},
    }
    per_video = [
        {"row": row, "key": v.key, **{k: m.number(x) for k, x in v.values.items()}}
        for row, videos in measured.items()
        for v in videos
    ]
    return found, per_video


def write(out: Path, found: dict[str, Any], per_video: list[dict[str, Any]]) -> None:
    """results.json and videos.jsonl in `out`, each replaced whole."""
    with atomic(out / "videos.jsonl") as file:
        file.writelines(json.dumps(line, allow_nan=False).encode() + b"\n" for line in per_video)
    write_json(out / "results.json", found)


def _missing(
    cells: dict[str, Any], truth: Any, reference: Any, paths: dict[str, Any], info: dict[str, Any]
) -> dict[str, dict[str, str]]:
    """Why a metric has no value here, and what would give it one."""
    out = {}

    def say(metrics: tuple[str, ...], why: str, get: str) -> None:
        out.update({k: {"why": why, "get": get} for k in metrics if k not in cells})

    if truth is None:
        say(("psnr_db", "ssim", "drift"), "no true videos to compare with", "give data=<val shards>")
    if reference is None:
        say((m.FD, m.MMD), "too few true clips beside those measured", "give data= with half as many further clips")
    if not any(paths.values()):
        say((*m.POSE_ERRORS, "pose_coverage"), "no cameras", "add <key>.cameras.npz")
    if "timings" not in info:
        say(("frames_per_s", "first_frame_s"), "set.json has no timings", "add timings, see vgr/report/sets.py")
    if "drift" not in cells:
        say(("drift",), "videos hold fewer than three windows", "longer videos, or a smaller drift.window_s")
    return out


def _settings(metric: str, protocol: dict[str, Any], frames: int) -> dict[str, Any]:
    """What defines a number besides its name."""
    base = {"frames": frames, "clips": protocol["clips"]}
    if metric in (m.FD, m.MMD):
        fd = {"ddof": 1, "interval": "delete-half subsampling"} if metric == m.FD else {"kernel": "(x.y/D + 1)^3"}
        return base | fd | {"features": m.features.NAME, "weights": None, "resize": "64x48, area"} | protocol["frechet"]
    if metric in ("psnr_db", "ssim"):
        return base | {"frames_scored": "1.. (the given first frame is left out)", "range": 255}
    if metric in m.POSE.values():
        return base | {"estimator": "frame-to-frame optical flow, small rotations", "alignment": "per step, none"}
    if metric.endswith("_s") and metric in ("first_frame_s", "frames_per_s", "denoise_frames_per_s"):
        return {"batch": 1} | protocol["frame_rate"]
    return base | protocol["drift"] | {"slope": "Theil-Sen over windows, first frame left out"}
