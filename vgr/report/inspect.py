"""inspect.html: one static, self-contained page that shows what stands in a folder of shards, and what was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray

from vgr.data.files import write_text
from vgr.data.shards import DamagedSample, Sample, Shards
from vgr.data.video import read_video
from vgr.geometry.cameras import fov_deg
from vgr.report import media, page
from vgr.report.curves import Line, chart, path_from_above

_READ, _SHOWN, _WIDTH = 512, 12, 112  # clips whose figures are read; of which shown; a picture's width in pixels


def write(folder: str | Path) -> Path:
    """Write inspect.html into a folder of shards, or of splits that are. Raises ValueError where there are none."""
    folder = Path(folder)
    splits = [p for p in (folder, *sorted(folder.glob("*"))) if (p / "manifest.json").is_file()]
    if not splits:
        raise ValueError(f"inspect={folder}: holds no finished shards (manifest.json), nor do its folders")
    html = page.render("inspect.html", title=folder.resolve().name, splits=[_split(p) for p in splits])
    write_text(folder / "inspect.html", html)
    return folder / "inspect.html"


def _split(folder: Path) -> dict[str, Any]:
    shards = Shards(folder)
    head, samples, damaged = shards.manifest, [], []
    picks = np.unique(np.linspace(0, len(shards) - 1, min(_READ, len(shards))).round().astype(int)).tolist()
    for i in picks:
        try:
            samples.append((i, shards.read(i)))
        except DamagedSample as error:
            damaged.append(str(error))
    hours = float(np.mean([len(s.c2w) / s.fps for _, s in samples] or [0.0])) * len(shards) / 3600
    extra, trip = head["extra"], head.get("round_trip") or {}
    by = sorted({x["captioned_by"] for _, s in samples for x in s.meta["shots"] if "captioned_by" in x})
    facts = {
        "Clips": f"{len(shards):,}; shards: {len(shards.counts)}",
        "Together": f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes",
        "Frames a second": f"{head['fps']:.4g}",
        "Pictures": f"{head['size_hw'][1]}×{head['size_hw'][0]}",
        "Codec": f"{head['codec']['name']}, stride {head['codec']['stride']}, {head['codec']['channels']} channels, "
                 f"fingerprint {head['codec']['fingerprint']}",
        "Codec’s round trip": f"{trip['psnr_db']:.1f} dB, at least {trip['least_db']:.1f}, on {trip['clips']} clips"
                              if trip else "not measured",
        "Licence": head["licence"],
        "Source": ", ".join([extra.get("source", "not stated"), *map(str, extra.get("places", ())[:8])]),
        "Cameras": _cameras_fact([s for _, s in samples]),
        "Captions": f"in {sum(any(x['caption'] for x in s.meta['shots']) for _, s in samples)} of {len(samples)} clips"
                    + "".join(f"; by {name} where no file has one" for name in by),
    }  # fmt: skip
    figures = _figures([s for _, s in samples])
    charts = {title: histogram(values, unit, title) for title, (unit, values) in figures.items()}
    facts |= {t: f"{np.mean(values):.4g} {unit}, all alike" for t, (unit, values) in figures.items() if not charts[t]}
    if damaged:
        facts["Damaged"] = f"{len(damaged)} of {len(picks)}; the first: {damaged[0]}"
    shown = np.unique(np.linspace(0, len(samples) - 1, _SHOWN).round().astype(int)) if samples else ()
    own = [samples[i] for i in shown]
    return {"name": folder.name, "facts": facts, "read": len(samples), "all": len(shards), "dropped": _dropped(folder),
            "charts": list(charts.values()), "clips": [_clip(shards, i, s) for i, s in own]}


def _cameras_fact(samples: list[Sample]) -> str:
    told = {"files": "of pose files", "estimate": "estimated", None: "none (identity), for models that take no camera"}
    kinds = {told.get(s.meta["source"].get("cameras", ""), "exact") for s in samples}
    metric = sum(bool(s.meta.get("metric_scale")) for s in samples)
    return f"{', '.join(sorted(map(str, kinds)))}; in metres in {metric} of {len(samples)} clips"


def _figures(samples: list[Sample]) -> dict[str, tuple[str, list[float]]]:
    """Unit and values, one a clip, by title."""
    speeds = [_speed(s) for s in samples]
    found = {
        "Length of a clip": ("seconds", [len(s.c2w) / s.fps for s in samples]),
        "Shots in a clip": ("shots", [float(len(s.meta["shots"])) for s in samples]),
        "Field of view": ("degrees across", [float(fov_deg(torch.from_numpy(s.intrinsics[0]))[0]) for s in samples]),
        "Mean speed of the camera": ("metres, or the poses’ units, a second", [x for x, _ in speeds]),
        "Mean turning of the camera": ("degrees a second", [x for _, x in speeds]),
    }
    for name, title in (("motion", "Motion"), ("sharpness", "Sharpness"), ("saturation", "Saturation")):
        values = [s.meta["source"].get("figures", {}).get(name) for s in samples]
        found[title] = ("as its rule measures it", [v for v in values if v is not None])
    return {title: (unit, values) for title, (unit, values) in found.items() if values}


def histogram(values: list[float], unit: str, title: str) -> Markup | str:
    """How many clips have which value; nothing where all have nearly the same."""
    low, high = min(values), max(values)
    if high - low <= 1e-3 * abs(high):
        return ""
    counts, edges = np.histogram(values, min(24, max(5, int(np.sqrt(len(values))))))
    x = np.repeat(edges, 2).tolist()
    y = [0.0, *np.repeat(counts, 2).astype(float).tolist(), 0.0]
    return chart([Line(x, y, "model", low=[0.0] * len(x), high=y)], unit, f"{title}, by clips", zero=True)


def _speed(sample: Sample) -> tuple[float, float]:
    """Mean over a clip of units and degrees a second, cuts left out."""
    within = np.isin(np.arange(1, len(sample.c2w)), [x["start"] for x in sample.meta["shots"]], invert=True)
    if not within.any():
        return 0.0, 0.0
    steps = np.linalg.norm(np.diff(sample.c2w[:, :3, 3], axis=0), axis=1)[within]
    trace = np.einsum("fij,fij->f", sample.c2w[:-1, :3, :3], sample.c2w[1:, :3, :3])[within]
    turns = np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1)))
    return float(steps.mean() * sample.fps), float(turns.mean() * sample.fps)


def _clip(shards: Shards, index: int, sample: Sample) -> dict[str, Any]:
    """Its caption, its path from above and, where its video was kept, a row of its pictures."""
    data = shards.read_video_bytes(index)
    source, told = sample.meta["source"], ("file", "key", "start_s", "map", "scene", "mood")
    told = ", ".join(f"at {source[k]:.1f} s" if k == "start_s" else str(source[k]) for k in told if k in source)
    caption = " / ".join(x["caption"] or "no caption" for x in sample.meta["shots"])
    return {"key": sample.key, "caption": caption, "source": told, "path": path_from_above(sample.c2w),
            "sheet": None if data is None else media.data_uri("image/png", media.png(_sheet(read_video(data)[0])))}


def _sheet(frames_FHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    frames = frames_FHW3[np.linspace(0, len(frames_FHW3) - 1, 6).round().astype(int)]
    height, width = frames.shape[1:3]
    size = (_WIDTH, max(1, round(_WIDTH * height / width)))
    return media.sheet([np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames])], 6)


def _dropped(folder: Path) -> list[dict[str, Any]]:
    """By rule: how many stretches or clips, seconds of them, the limit, and the first few."""
    path = folder / "dropped.json"
    rules: dict[str, dict[str, Any]] = {}
    for x in json.loads(path.read_text()) if path.is_file() else []:
        row = rules.setdefault(x["rule"], {"rule": x["rule"], "count": 0, "seconds": 0.0, "limit": _limit(x["limit"]),
                                           "first": []})
        row["count"], row["seconds"] = row["count"] + 1, row["seconds"] + x.get("end_s", 0) - x.get("start_s", 0)
        if len(row["first"]) < 3:
            at = f"at {x['start_s']:.1f} s" if "start_s" in x else x["key"]  # a whole clip of a zip
            row["first"].append(f"{x['file']} {at}: {x['value']}")
    return sorted(rules.values(), key=lambda row: (-row["seconds"], -row["count"]))


def _limit(limit: list[float | None] | None) -> str:
    low, high = limit or (None, None)
    return " and ".join(f"{word} {x:g}" for word, x in (("at least", low), ("at most", high)) if x is not None)
