"""Rows of videos to results.json (values, checks, provenance) and videos.jsonl (one line per row and video)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgr.data.files import write_json, write_text
from vgr.metrics import frame_rate
from vgr.report import measure as m
from vgr.report.rows import LABELS
from vgr.report.sets import VideoSet


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
    paths = {k: [c for c in (source.cameras(k, frames),) if c] for k in keys}
    measured, checks = {}, {}
    if truth is not None:
        turned = keys[len(keys) // 2 :] + keys[: len(keys) // 2]  # as rows.make_rows turns them
        both = {k: paths[k] + paths[other] for k, other in zip(keys, turned)}
        measured["truth"] = m.measure_set(truth, keys, frames, protocol, None, both, done)
        checks["pose"] = m.check_pose_estimator(measured["truth"])
    failed = {metric for metric, check in checks.get("pose", {}).items() if not check["passed"]}
    for row, videos in sets.items():
        if row != "truth":
            measured[row] = m.measure_set(videos, keys, frames, protocol, truth, paths, done)
    known = None
    if reference is not None and frames > protocol["frechet"]["window_frames"]:
        known = m.reference_features(reference, frames, protocol, done)
        checks["frame_order"] = m.check_frame_order(truth, measured["truth"], frames, known, protocol)
    rows = m.summarize(measured, protocol, known, failed)
    info = sets["model"].info
    speed = frame_rate.summarize(info.get("timings", []))
    rows["model"] |= {name: m.mean_cell(values) for name, values in speed.items()}
    video, fps = source.video(keys[0], frames)
    found = {
        "protocol": protocol,
        "fps": fps,
        "size_hw": list(video.shape[1:3]),
        "frames": frames,
        "clips": keys,
        "captions": {k: source.info.get("captions", {}).get(k, []) for k in keys},
        "psnr_by_clip": {v.key: v.values["psnr_db"] for v in measured["model"] if "psnr_db" in v.values},
        "made_by": info.get("made_by", {}),
        "metrics": {
            k: {**x._asdict(), "settings": {"frames": frames, "clips": len(keys), **protocol.get(x.section, {})}}
            for k, x in m.METRICS.items()
        },
        "rows": {r: {"label": LABELS[r][0], "note": LABELS[r][1], "metrics": rows[r]} for r in measured},
        "comparisons": m.compare(measured, failed),
        "checks": checks,
        "curves": m.curves(measured),
        "unavailable": _unavailable(rows["model"], truth is None, known is None, any(paths.values())),
    }
    return found, [
        {"row": row, "key": v.key, **{k: m.number(x) for k, x in v.values.items()}}
        for row, videos in measured.items()
        for v in videos
    ]


def write(out: Path, found: dict[str, Any], per_video: list[dict[str, Any]]) -> None:
    """results.json and videos.jsonl in `out`, each replaced whole."""
    write_text(out / "videos.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in per_video))
    write_json(out / "results.json", found)


def _unavailable(cells: dict[str, Any], no_truth: bool, no_reference: bool, cameras: bool) -> dict[str, dict[str, str]]:
    """Why a metric has no value here, and what would give it one: the first reason that applies."""
    pose = (*m.POSE_ERRORS, "pose_coverage")
    reasons = (
        (True, ("fvd",), "only I3D features make an FVD, and this protocol has none",
         "get i3d_torchscript.pt (git blob SHA-1 93daef59c7ae0e9e8f76225521407e60cbafa6aa) from "
         "huggingface.co/flateon/FVD-I3D-torchscript; the full suite uses it"),
        (True, ("lpips",), "its AlexNet weights are no part of this protocol",
         "get alexnet-owt-7be5be79.pth (233 MB) from download.pytorch.org/models; the full suite uses it"),
        (no_truth, ("psnr_db", "ssim", "drift"), "no true videos to compare with", "give data=<val shards>"),
        (no_reference, (m.FD,), "too few true clips beside those measured, or too short ones",
         "give data= with half as many further clips, longer than frechet.window_frames"),
        (not cameras, pose, "no cameras", "add <key>.cameras.npz"),
        (True, pose, "on these true videos the estimator does not tell a clip's own camera from another's",
         "larger or sharper videos, more motion, or more clips"),
        (True, ("frames_per_s", "first_frame_s"), "set.json has no timings", "add timings, see vgr/report/sets.py"),
        (True, ("drift",), "videos hold fewer than three windows", "longer videos, or a smaller drift.window_s"),
    )  # fmt: skip
    out: dict[str, dict[str, str]] = {}
    for applies, metrics, why, get in reasons:
        for name in metrics if applies else ():
            out.setdefault(name, {"why": why, "get": get})
    return {name: reason for name, reason in out.items() if name not in cells}
