"""report.html: one static page, self-contained, that says what ran and what came out. No request leaves it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vgr.data.files import atomic, read_lines, write_text
from vgr.metrics import frame_rate
from vgr.report import media
from vgr.report.curves import Line, chart, path_from_above, smooth, steps
from vgr.report.sets import VideoSet, timings

GAIN = "val/camera_gain"


def write(path: Path, run_dir: Path | None, results: dict[str, Any], sets: dict[str, VideoSet]) -> Path:
    """Write the page from results.json's content and the sets behind it; contact_sheet.png beside it.

    run_dir: the run's folder, for its curves (metrics.jsonl) and settings (config.yaml), None for videos made
    elsewhere.
    """
    history = read_lines(run_dir / "metrics.jsonl") if run_dir else []
    # Evenly over the clips sorted by the model's PSNR (or as they come), so that nobody picks the good ones.
    keys = sorted(results["clips"], key=lambda k: -results["psnr_by_clip"].get(k, 0.0))
    shown = [keys[i] for i in np.linspace(0, len(keys) - 1, min(6, len(keys))).round().astype(int)]
    frames = results["frames"]
    sheets = {k: media.sheet([s.video(k, frames, shorter=True)[0] for s in sets.values()]) for k in shown[:3]}
    width = max(x.shape[1] for x in sheets.values())
    padded = [np.pad(x, ((0, 6), (0, width - x.shape[1]), (0, 0))) for x in sheets.values()]
    with atomic(path.parent / "contact_sheet.png") as file:
        file.write(media.png(np.concatenate(padded)[:-6]))
    model, label = sets["model"], results["rows"]["model"]["label"]
    html = render(
        "page.html",
        r=results,
        title=_title(run_dir, results),
        seconds=results["frames"] / results["fps"],
        seen=history[-1]["samples_seen"] if history else None,
        tiles=_tiles(results, history),
        clips=[_clip(results, sets, k) for k in shown],
        sheets={k: media.data_uri("image/png", media.png(x)) for k, x in sheets.items()},
        sections=[
            over_time(results["curves"], {row: x["label"] for row, x in results["rows"].items()}, ("truth", "model")),
            speed({"model": frame_rate.chunk_latencies(timings(model.folder, model.info))}, {"model": label}),
            training(history),
        ],
        unavailable={k: f"{u['why']}. To have it: {u['get']}." for k, u in results["unavailable"].items()},
        settings={"Protocol": "{name}, sha256 {sha256}".format(**results["protocol"])} | settings(results),
        texts=_texts(run_dir, results),
    )
    write_text(path, html)
    return path


def render(template: str, **values: Any) -> str:
    """A template of this folder with these values, escaped."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "interval": interval}
    return environment.get_template(template).render(values)


def figure(cell: dict[str, Any] | None, name: str = "value") -> str:
    """A value to three digits, or to the digits its interval supports; a dash where there is none."""
    value = cell.get(name) if cell else None
    if value is None:
        return "–"
    if value == 0:
        return "0"
    low, high = cell.get("low"), cell.get("high")
    width = high - low if low is not None and high is not None else 0
    digits = 1 - math.floor(math.log10(width)) if width > 0 else 2 - math.floor(math.log10(abs(value)))
    text = f"{value:.{min(max(digits, 0), 5)}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def interval(cell: dict[str, Any] | None) -> str:
    """Both ends of a cell's interval; empty where it has none or no width."""
    if not cell or cell.get("low") is None or cell["low"] == cell["high"]:
        return ""
    return f"{figure(cell, 'low')} … {figure(cell, 'high')}"


def _title(run_dir: Path | None, results: dict[str, Any]) -> str:
    if run_dir is None:
        return str(results["made_by"].get("name") or "Videos")
    parts = run_dir.resolve().parts
    parts = parts[parts.index("runs") + 1 :] if "runs" in parts else parts[-2:]
    return "/".join(parts).replace("/seed", ", seed ")


def _tiles(results: dict[str, Any], history: list[dict[str, Any]]) -> list[tuple[str, str, dict[str, Any], str]]:
    """At most four: label, unit, cell and a note."""
    rows, tiles = results["rows"], []
    control = rows.get("swapped", rows.get("frozen"))
    for name, note in (
        ("rot_step_imputed_deg", ""), ("psnr_db", ""), ("frames_per_s", "end to end, batch 1"),
        ("drift", "mean excess trend over the true videos"),
    ):  # fmt: skip
        if cell := rows["model"]["metrics"].get(name):
            metric = results["metrics"][name]
            if not note and control and name in control["metrics"]:
                note = f"{control['label'].lower()}: {figure(control['metrics'][name])}"
            tiles.append((metric["label"], metric["unit"], cell, note))
    if last := next((h for h in reversed(history) if GAIN in h), None):
        gain = {"value": last[GAIN], "low": last[f"{GAIN}_low"], "high": last[f"{GAIN}_high"]}
        tiles.insert(2, ("Camera gain", "", gain, "loss with shuffled minus true camera; above zero means it listens"))
    return tiles[:4]


def _clip(results: dict[str, Any], sets: dict[str, VideoSet], key: str) -> dict[str, Any]:
    """One clip's videos, one a row of the results, and its camera path."""
    frames = results["frames"]
    videos = {row: media.video_uri(*s.video(key, frames, shorter=True)) for row, s in sets.items()}
    own = (sets.get("truth") or sets["model"]).cameras(key, None)
    swapped = sets["swapped"].cameras(key, None) if "swapped" in sets else None
    path = own and path_from_above(own[0][:frames], swapped and swapped[0][:frames])
    return {"caption": caption(results, key), "videos": videos, "path": path}


def caption(results: dict[str, Any], key: str) -> str:
    """A clip's name and what its shots show."""
    return ": ".join(filter(None, (key, " / ".join(results["captions"][key]))))


def over_time(curves: dict[str, Any], labels: dict[str, str], banded: Collection[str]) -> dict[str, Any]:
    """Section of statistics over the clips' time, `summary.curves` of each CSS class, with bands where told; its charts
    are empty where clips were too short."""
    titles = {
        "lightness": "Lightness, CIE L*", "sharpness": "Sharpness, ln variance of the Laplacian",
        "contrast": "Contrast, sd of L*", "motion": "Motion, image diagonals a second",
    }  # fmt: skip
    charts = []
    for name, title in titles.items():
        lines = []
        for style, c in curves.items():
            band = {end: c[name][end] for end in ("low", "high")} if style in banded else {}
            lines.append(Line(c["times_s"], c[name]["value"], style, **band))
        charts.append(chart(lines, "seconds", title))
    text = "Means over clips in windows, with 95 % bands. A model that drifts leaves the true video’s line."
    return {"title": "Over time", "text": text, "legend": {s: labels[s] for s in curves}, "charts": charts}


def speed(latencies: dict[str, NDArray[np.float64]], labels: dict[str, str]) -> dict[str, Any]:
    """Section of the seconds chunks take (N,), by CSS class; without a chart where they are too few."""
    enough = {style: x for style, x in latencies.items() if len(x) >= frame_rate.LEAST[90]}
    text = f"From a chunk’s arrival to the next’s: the share of {frame_rate.LEAST[90]} or more that take no longer."
    charts = [chart([steps(x, style) for style, x in enough.items()], "seconds a chunk takes", "Share of chunks")]
    return {"title": "Speed", "text": text, "legend": {s: labels[s] for s in enough}, "charts": charts}


def training(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Section of losses and camera gain over the clips seen; its charts are empty for an empty history."""

    def series(key: str) -> tuple[list[float], list[float]]:
        found = [(h["samples_seen"], h[key]) for h in history if h.get(key) is not None]
        return [x for x, _ in found], [y for _, y in found]

    x, y = series("train/loss")
    losses = [Line(x, y, "truth", thin=True), Line(x, smooth(y), "truth")]
    losses += [Line(*series(k), s) for k, s in (("val/loss", "model"), ("val/loss_shuffled_camera", "swapped"))]
    gain = Line(*series(GAIN), "model", low=series(f"{GAIN}_low")[1], high=series(f"{GAIN}_high")[1])
    return {
        "title": "Training",
        "text": "Camera gain: loss on held-out clips with cameras shuffled between them, minus that with their own.",
        "legend": {"truth": "training", "model": "held out, true camera", "swapped": "held out, shuffled cameras"},
        "charts": [chart(losses, "clips seen", "Loss"), chart([gain], "clips seen", "Camera gain", zero=True)],
    }


def settings(results: dict[str, Any]) -> dict[str, str]:
    """What made and measured the videos, beside the protocol."""
    made = results["made_by"]
    return {
        "Weights": made.get("weights", "not stated"),
        "Sampler": ", ".join(f"{k} {v}" for k, v in made.get("sampling", {}).items()) or "not stated",
        "Commit": results["commit"] or "not a checkout",
        "Measured on": results["device"],
        "Versions": ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
    }


def _texts(run_dir: Path | None, results: dict[str, Any]) -> dict[str, str]:
    texts = {"Protocol": json.dumps(results["protocol"], indent=1)}
    if run_dir and (config := run_dir / "config.yaml").is_file():
        texts["Settings of the training run"] = config.read_text()
    return texts
