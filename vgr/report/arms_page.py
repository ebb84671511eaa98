"""arms.html of compare.json's content: one static page in the look of the benchmark's. No request leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgr.data.files import write_json, write_text
from vgr.report import arms_tables, media, page
from vgr.report.compare import MOST
from vgr.report.curves import Line, chart
from vgr.report.sets import VideoSet


def write(out: Path, found: Mapping[str, Any], kicker: str) -> Path:
    """Write compare.json, compare.html, table.md and table.tex; returns the page's path."""
    styles = {a["arm"]: f"run{i % MOST}" for i, a in enumerate(found["arms"])}
    html = page.render(
        "arms.html", r=found, kicker=kicker, styles=styles, cost=arms_tables.costs(found),
        ranked=_ranked(found), seeds=arms_tables.seeds, clips=_clips(found),
        apart={(c["arm"], c["metric"]): c for c in found["differences"]},
        sections=[_section(found, styles, axis, x) for axis, x in (("samples", "clips seen"), ("hours", "hours"))],
    )  # fmt: skip
    write_json(out / "compare.json", found)
    write_text(out / "table.md", arms_tables.markdown(found))
    write_text(out / "table.tex", arms_tables.latex(found))
    write_text(out / "compare.html", html)
    return out / "compare.html"


def _ranked(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Arms by the first metric with a direction, the best first, those without a value last."""
    key, better = next(((k, m["better"]) for k, m in found["metrics"].items() if m["better"]), (None, ""))
    sign = -1.0 if better == "higher" else 1.0

    def place(arm: Mapping[str, Any]) -> float:
        value = arm["metrics"].get(key, {}).get("value")
        return float("inf") if value is None else sign * value

    return sorted(found["arms"], key=place) if key else list(found["arms"])


def _section(found: Mapping[str, Any], styles: Mapping[str, str], axis: str, x: str) -> dict[str, Any]:
    """Every curve over one axis, its band from the least to the largest seed."""
    charts = []
    for key, told in found["curves"].items():
        own = [(styles[a["arm"]], a["curves"][key]) for a in found["arms"] if key in a["curves"]]
        lines = [Line(c[axis], c["value"], style, c.get("low", ()), c.get("high", ()))
                 for style, c in own if len(c[axis]) > 1]  # fmt: skip
        charts.append(chart(lines, x, ", ".join(filter(None, (told["label"], told["unit"])))))
    return {
        "title": f"Over {axis}",
        "text": "Means over seeds; bands reach from the least seed to the largest"
        + (", at the seeds’ mean hours." if axis == "hours" else "."),
        "legend": {styles[a["arm"]]: a["label"] for a in found["arms"]},
        "charts": charts,
    }


def _clips(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last sample that each arm's first seed made while it trained, where it is a file here."""
    shown, rate, seconds = {}, 0.0, 0.0
    for a in found["arms"]:
        for path in (Path(p) for p in a["runs"][0]["media"] if Path(p).is_file()):
            frames, fps = VideoSet(path.parent, (path.stem,), {}).video(path.stem)
            shown[a["arm"]] = media.video_uri(frames, fps)
            rate, seconds = fps, max(seconds, len(frames) / fps)
    return {"videos": shown, "fps": rate, "seconds": seconds} if shown else None
