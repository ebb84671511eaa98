"""The page's two sections of curves: statistics over the time of a video, and a run's history."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vgr.report.curves import Line, chart, smooth
from vgr.report.rows import LABELS

STYLES = {"truth": "truth", "codec": "codec", "model": "modelc", "swapped": "swapped", "frozen": "frozen"}
GAIN = "val/camera_gain"


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path, lines = run_dir / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def over_time(results: dict[str, Any]) -> str:
    """Statistics over the clips' time, row by row; HTML, empty where clips were too short."""
    titles = {
        "lightness": "Lightness, CIE L*", "sharpness": "Sharpness, ln variance of the Laplacian",
        "contrast": "Contrast, sd of L*", "motion": "Motion, image diagonals a second",
    }  # fmt: skip
    charts = []
    for name, title in titles.items():
        lines = []
        for row, c in results["curves"].items():
            band = {end: c[name][end] for end in ("low", "high")} if row in ("truth", "model") else {}
            lines.append(Line(c["times_s"], c[name]["value"], STYLES[row], **band))
        charts.append(chart(lines, "seconds", title))
    text = "Means over clips in windows, with 95 % bands. A model that drifts leaves the true video’s line."
    return _section("Over time", text, {STYLES[r]: LABELS[r][0] for r in results["curves"]}, charts)


def training(history: list[dict[str, Any]]) -> str:
    """Losses and camera gain over the clips seen; HTML, empty for an empty history."""

    def series(key: str) -> tuple[list[float], list[float]]:
        found = [(h["samples_seen"], h[key]) for h in history if h.get(key) is not None]
        return [x for x, _ in found], [y for _, y in found]

    x, y = series("train/loss")
    losses = [Line(x, y, "truth", thin=True), Line(x, smooth(y), "truth")]
    losses += [Line(*series(k), s) for k, s in (("val/loss", "modelc"), ("val/loss_shuffled_camera", "swapped"))]
    gain = Line(*series(GAIN), "modelc", low=series(f"{GAIN}_low")[1], high=series(f"{GAIN}_high")[1])
    charts = [chart(losses, "clips seen", "Loss"), chart([gain], "clips seen", "Camera gain", zero=True)]
    text = "Camera gain: the loss on held-out clips with cameras shuffled between them, minus that with their own."
    names = {"truth": "training", "modelc": "held out, true camera", "swapped": "held out, shuffled cameras"}
    return _section("Training", text, names, charts)


def _section(title: str, text: str, legend: Mapping[str, str], charts: Sequence[str]) -> str:
    items = "".join(f'<span><span class="dot {s}"></span>{escape(name)}</span>' for s, name in legend.items())
    if not any(charts):
        return ""
    return f'<h2>{title}</h2><p>{text}</p><div class="legend">{items}</div><div class="charts">{"".join(charts)}</div>'
