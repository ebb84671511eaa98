"""The page's two sections of curves: statistics over the time of a video, and a run's history."""

from __future__ import annotations

import json
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
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "samples_seen" in line:
            lines.append(line)
    return lines


def over_time(results: dict[str, Any]) -> str:
    """Statistics over the clips' time, row by row; HTML, empty where clips were too short."""
    titles = {
        "lightness": "Lightness, CIE L*", "sharpness": "Sharpness, ln variance of the Laplacian",
        "contrast": "Contrast, sd of L*", "motion": "Motion, image diagonals a second",
    }  # fmt: skip
    charts = []
    for name, title in titles.items():
        lines = [
            Line(c["times_s"], c[name]["value"], STYLES[row], low=c[name]["low"], high=c[name]["high"])
            if row in ("truth", "model")
            else Line(c["times_s"], c[name]["value"], STYLES[row])
            for row, c in results["curves"].items()
        ]
        charts.append(chart(lines, "seconds", title))
    if not any(charts):
        return ""
    return (
        "<h2>Over time</h2><p>Means over clips in windows, with 95 % bands. A model that drifts leaves the true "
        f'video’s line.</p>{_legend(results["curves"])}<div class="charts">{"".join(charts)}</div>'
    )


def _legend(rows: Any) -> str:
    items = (f'<span><span class="dot {STYLES[r]}"></span>{escape(LABELS[r][0])}</span>' for r in rows)
    return f'<div class="legend">{"".join(items)}</div>'


def training(history: list[dict[str, Any]]) -> str:
    """Losses and camera gain over the clips seen; HTML, empty for an empty history."""

    def series(key: str) -> tuple[list[float], list[float]]:
        found = [(h["samples_seen"], h[key]) for h in history if isinstance(h.get(key), int | float)]
        return [x for x, _ in found], [y for _, y in found]

    x, y = series("train/loss")
    losses = [Line(x, y, "truth", thin=True), Line(x, smooth(y), "truth")] if y else []
    losses += [Line(*series(k), s) for k, s in (("val/loss", "modelc"), ("val/loss_shuffled_camera", "swapped"))]
    gx, gy = series(GAIN)
    low, high = (dict(zip(*series(f"{GAIN}_{end}"))) for end in ("low", "high"))
    gain = Line(gx, gy, "modelc", low=[low.get(v) for v in gx], high=[high.get(v) for v in gx])
    charts = [chart(losses, "clips seen", "Loss"), chart([gain], "clips seen", "Camera gain", zero=True)]
    if not any(charts):
        return ""
    names = (("truth", "training"), ("modelc", "held out, true camera"), ("swapped", "held out, shuffled cameras"))
    legend = "".join(f'<span><span class="dot {s}"></span>{n}</span>' for s, n in names)
    return (
        f'<h2>Training</h2><div class="legend">{legend}</div><div class="charts">{"".join(charts)}</div>'
        "<p>Camera gain: the loss on held-out clips with cameras shuffled between them, minus that with their own.</p>"
    )
