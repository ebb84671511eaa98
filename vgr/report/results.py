"""Rows of videos to results.json (values, checks, provenance) and videos.jsonl (one line per row and video)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vgr.data.files import atomic, write_json, write_text
from vgr.metrics import extractors, features, frame_rate
from vgr.metrics.fvd import Moments
from vgr.report import measure as m
from vgr.report import summary
from vgr.report.rows import LABELS
from vgr.report.sets import VideoSet, timings
from vgr.report.table import FD, METRICS, POSE_ERRORS

SHOWN_S = 12.0  # of videos measured whole, what a page shows


def measure(
    job: m.Job, sets: dict[str, VideoSet], keys: list[str], reference: VideoSet | None, out: Path,
    statistics: Path | None = None, lacking: dict[str, dict[str, str]] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:  # fmt: skip
    """Measure all rows. Returns (the content of results.json, the lines of videos.jsonl); None of one part of many.

    The pose estimator is checked on the true videos first: a metric by which it cannot tell the video's own
    camera from another clip's is reported as unavailable, not as a number. statistics: a folder of moments of true
    features, in place of a reference; lacking: metrics whose weights are not there, and why.
    """
    protocol, truth = job.protocol, sets.get("truth")
    source = truth or sets["model"]
    paths = {k: [c for c in (source.cameras(k, job.frames),) if c] for k in keys}
    turned = keys[len(keys) // 2 :] + keys[: len(keys) // 2]  # as rows.make_rows turns them
    rows: summary.Rows = {}
    for row, videos in sets.items():
        both = {k: paths[k] + (paths[o] if row == "truth" else []) for k, o in zip(keys, turned)}
        rows[row] = m.measure_set(job, row, videos, keys, None if row == "truth" else truth, both)
    known: dict[str, Any] = {}
    if reference is not None and job.frames > protocol["frechet"]["window_frames"]:
        found = m.measure_set(job, "reference", reference, reference.keys)
        names = found[0].features if found else ()
        known = {name: [x for v in found if len(x := v.features[name])] for name in names}
        known = {name: tables for name, tables in known.items() if sum(map(len, tables)) > 1}
    if job.part[1] > 1:
        return None
    for name, told in about(job).items() if job.frames is not None else ():
        if statistics is not None and (path := statistics / f"{name}.npz").is_file():
            known[name] = Moments.load(path, told)
        elif name in known:
            with atomic(out / "statistics" / f"{name}.npz") as file:
                summary.moments(known[name]).save(file, told)
    return _results(job, sets, rows, keys, known, paths, lacking or {})


def about(job: m.Job) -> dict[str, dict[str, Any]]:
    """Distance -> what its features are; statistics files of anything else are refused."""
    found = {FD: {"extractor": features.NAME, "frames": job.protocol["frechet"]["window_frames"]}}
    return found | {name: x.about | {"stride": job.protocol["fvd"]["stride"]} for name, x in job.extractors.items()}


def _results(
    job: m.Job, sets: dict[str, VideoSet], rows: summary.Rows, keys: list[str], known: dict[str, Any],
    paths: dict[str, list[m.Path]], lacking: dict[str, dict[str, str]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    protocol, truth, info = job.protocol, sets.get("truth"), sets["model"].info
    source, checks = truth or sets["model"], {}
    if truth is not None:
        checks["pose"] = summary.check_pose_estimator(rows["truth"])
    failed = {metric for metric, check in checks.get("pose", {}).items() if not check["passed"]}
    if truth is not None and (orders := summary.check_frame_order(rows["truth"], known)):
        checks |= {"frame_order": orders.get(FD), "frame_orders": orders}
    units = [str(info.get("units", {}).get(k, k)) for k in keys]
    cells = summary.summarize(rows, protocol, known, failed, units)
    spent = timings(sets["model"].folder, info)
    fps = source.video(keys[0], 9, shorter=True)[1]
    frames = job.frames or round(SHOWN_S * fps)
    video = source.video(keys[0], frames, shorter=True)[0]
    cells["model"] |= {name: summary.mean_cell(values) for name, values in frame_rate.summarize(spent, fps).items()}
    chunks = frame_rate.percentile_intervals(frame_rate.chunk_latencies(spent))
    cells["model"] |= {name: summary.cell(x) for name, x in chunks.items()}
    defined = {name: {"weights": x} for name, x in about(job).items()}
    found = {
        "protocol": protocol,
        "fps": fps,
        "size_hw": list(video.shape[1:3]),
        "frames": len(video),
        "clips": keys,
        "captions": {k: source.info.get("captions", {}).get(k, []) for k in keys},
        "psnr_by_clip": {v.key: v.values["psnr_db"] for v in rows["model"] if "psnr_db" in v.values},
        "made_by": info.get("made_by", {}),
        "metrics": {
            k: {**x._asdict(), "settings": {"frames": job.frames, "clips": len(keys), **protocol.get(x.section, {}),
                                            **(defined.get(k, {}) if k != FD else {})}}
            for k, x in METRICS.items()
        },
        "rows": {r: {"label": LABELS[r][0], "note": LABELS[r][1], "metrics": cells[r]} for r in rows},
        "comparisons": summary.compare(rows, failed, units),
        "checks": {name: check for name, check in checks.items() if check is not None},
        "curves": summary.curves(rows),
        "drift": summary.drift_table(rows),
        "unavailable": unavailable(cells["model"], protocol, truth is None, not known, any(paths.values()), lacking),
    }  # fmt: skip
    return found, [
        {"row": row, "key": v.key, **{k: summary.number(x) for k, x in v.values.items()}}
        for row, videos in rows.items()
        for v in videos
    ]


def write(out: Path, found: dict[str, Any], per_video: list[dict[str, Any]]) -> None:
    """results.json and videos.jsonl in `out`, each replaced whole."""
    write_text(out / "videos.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in per_video))
    write_json(out / "results.json", found)


def unavailable(
    cells: dict[str, Any] | None, protocol: dict[str, Any], no_truth: bool, no_reference: bool, cameras: bool,
    lacking: dict[str, dict[str, str]],
) -> dict[str, dict[str, str]]:  # fmt: skip
    """Why a metric has no value and what would give it one: the first reason that applies; cells None: as far as that
    is known before measuring."""
    pose, sfm, networks = (*POSE_ERRORS, "pose_coverage"), ("rot_imputed_deg", "trans_imputed"), "fvd" not in protocol
    after = cells is not None
    reasons = (
        (networks, ("fvd",), "only I3D features make an FVD, and this protocol has none",
         f"choose protocol=standard and {extractors.WEIGHTS['fvd'][1]}"),
        (networks, ("fd_videomae",), "this protocol has no networks", "choose protocol=standard"),
        *((True, (name,), reason["why"], reason["get"]) for name, reason in lacking.items()),
        (True, ("lpips",), "its AlexNet weights are no part of this protocol",
         "get alexnet-owt-7be5be79.pth (233 MB) from download.pytorch.org/models; the full suite uses it"),
        (no_truth, ("psnr_db", "ssim", "drift", "time_to_failure_s"), "no true videos to compare with",
         "give shards=<val shards>"),
        (no_reference, (FD, "fvd", "fd_videomae"), "too few true clips beside those measured, or too short ones",
         "give shards= with half as many further clips, longer than frechet.window_frames, or statistics="),
        ("pose" not in protocol, sfm, "this protocol has no structure from motion",
         "choose protocol=standard or general"),
        ("revisit" not in protocol, ("memory_db",), "this protocol has no returns", "choose protocol=standard"),
        (not cameras, (*pose, *sfm, "memory_db"), "no cameras", "add <key>.cameras.npz"),
        (after, sfm, "pictures are too small for structure from motion", "videos of pose.least_height pixels or more"),
        (after, pose, "on these true videos the estimator does not tell a clip's own camera from another's",
         "larger or sharper videos, more motion, or more clips"),
        (after, ("memory_db",), "no path comes back to a view it left", "clips whose cameras return"),
        (after, ("frames_per_s", "first_frame_s"), "set.json has no timings", "add timings, see vgr/report/sets.py"),
        (after, ("drift",), "videos hold fewer than three windows", "longer videos, or a smaller drift.window_s"),
    )  # fmt: skip
    found: dict[str, dict[str, str]] = {}
    for applies, names, why, get in reasons:
        for name in names if applies else ():
            found.setdefault(name, {"why": why, "get": get})
    return {name: reason for name, reason in found.items() if name not in (cells or {})}
