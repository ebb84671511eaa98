"""Rows of videos to results.json (values, checks, provenance) and videos.jsonl (one line per row and video)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path as File
from typing import Any

from vgr.data.files import atomic, write_json, write_text
from vgr.metrics import extractors, features, frame_rate
from vgr.metrics.fvd import Moments
from vgr.report import judges, summary
from vgr.report import measure as m
from vgr.report.sets import VideoSet, timings
from vgr.report.table import FD, LABELS, METRICS, NEEDS

SHOWN_S = 12.0  # of videos measured whole, what a page shows


def measure(
    job: m.Job, sets: dict[str, VideoSet], keys: list[str], reference: VideoSet | None, out: File,
    weights: File, statistics: File | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:  # fmt: skip
    """Measure all rows. Returns (the content of results.json, the lines of videos.jsonl); None of one part of many.

    A metric by which the pose estimator cannot tell the true videos' own camera from another clip's is unavailable.
    statistics: a folder of moments of true features, in place of a reference; weights: the networks' folder.
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
    return _results(job, sets, rows, keys, known, paths, weights)


def about(job: m.Job) -> dict[str, dict[str, Any]]:
    """Distance -> what its features are; statistics files of anything else are refused."""
    found = {FD: {"extractor": features.NAME, "frames": job.protocol["frechet"]["window_frames"]}}
    return found | {name: x.about | {"stride": job.protocol["fvd"]["stride"]} for name, x in job.extractors.items()}


def _results(
    job: m.Job, sets: dict[str, VideoSet], rows: summary.Rows, keys: list[str], known: dict[str, Any],
    paths: dict[str, list[m.Path]], weights: File,
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
        "unavailable": unavailable(cells["model"], protocol, bool(truth), bool(known), any(paths.values()), weights),
    }  # fmt: skip
    return found, [{"row": row, "key": v.key, **{k: summary.number(x) for k, x in v.values.items()}}
                   for row, videos in rows.items() for v in videos]  # fmt: skip


def write(out: File, found: dict[str, Any], per_video: list[dict[str, Any]]) -> None:
    """results.json and videos.jsonl in `out`, each replaced whole."""
    write_text(out / "videos.jsonl", "".join(json.dumps(line, allow_nan=False) + "\n" for line in per_video))
    write_json(out / "results.json", found)


def unavailable(
    cells: dict[str, Any] | None, protocol: dict[str, Any], truth: bool, reference: bool, cameras: bool, weights: File,
    features: bool = False,
) -> dict[str, dict[str, str]]:  # fmt: skip
    """Why a metric has no value and what would give it one: its first need that is not met. cells None: before
    measuring, as far as that is known then; features: some lie beside the videos."""
    met = {"truth": truth, "reference": reference, "cameras": cameras, "networks": "fvd" in protocol,
           "quality": "quality" in protocol, "mapping": "pose" in protocol, "returns": "revisit" in protocol,
           "features": features, "pycolmap": importlib.util.find_spec("pycolmap") is not None}  # fmt: skip
    missing = extractors.missing(weights) | judges.missing(weights)
    told = NEEDS["before"] | ({} if cells is None else NEEDS["after"])
    found = {}
    for name in (name for name in METRICS if name not in (cells or {})):
        for need in METRICS[name].needs:
            if need == "weights" and name in missing:
                found.setdefault(name, missing[name])
            elif need in told and not met.get(need):
                why, get = told[need]
                found.setdefault(name, {"why": why, "get": get})
    return found
