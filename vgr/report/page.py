"""report.html: one static page, self-contained, that says what ran and what came out. No request leaves it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vgr.data.files import atomic
from vgr.report import media
from vgr.report.curves import path_from_above
from vgr.report.sets import VideoSet
from vgr.report.trends import GAIN, STYLES, over_time, read_history, training

_HERE = Path(__file__).parent


def write(path: Path, run_dir: Path | None, results: dict[str, Any], sets: dict[str, VideoSet]) -> Path:
    """Write the page from results.json's content and the sets behind it; contact_sheet.png beside it.

    run_dir: the run's folder, for its curves (metrics.jsonl) and settings (config.yaml), None for videos made
    elsewhere.
    """
    history = read_history(run_dir) if run_dir else []
    # Evenly over the clips sorted by the model's PSNR (or as they come), so that nobody picks the good ones.
    keys = sorted(results["clips"], key=lambda k: -results["psnr_by_clip"].get(k, 0.0))
    shown = [keys[i] for i in np.linspace(0, len(keys) - 1, min(6, len(keys))).round().astype(int)]
    title = _title(run_dir, results)
    body = [
        _head(title, results, history), _verdicts(results), _videos(results, sets, shown), _table(results),
        _pairs(results), _sheets(path, results, sets, shown[:3]), over_time(results), training(history),
        _unavailable(results), _settings(run_dir, results),
    ]  # fmt: skip
    with atomic(path) as file:
        file.write(_document(title, "\n".join(body)).encode())
    return path


def figure(cell: dict[str, Any] | None, name: str = "value") -> str:
    """A value to three digits, or to the digits its interval supports; a dash where there is none."""
    value = cell.get(name) if cell else None
    if value is None:
        return "–"
    if value == 0:
        return "0"
    low, high = cell.get("low"), cell.get("high")
    width = high - low if low is not None and high is not None else 0
    digits = 1 - math.floor(math.log10(width)) if width > 0 else 3 - math.floor(math.log10(abs(value) or 1)) - 1
    return f"{value:.{min(max(digits, 0), 5)}f}".replace("-", "−")


def interval(cell: dict[str, Any] | None) -> str:
    if not cell or cell.get("low") is None or cell["low"] == cell["high"]:
        return ""
    return f"{figure(cell, 'low')} … {figure(cell, 'high')}"


def _document(title: str, body: str) -> str:
    style, script = (_HERE / "style.css").read_text(), (_HERE / "player.js").read_text()
    # Nothing may be fetched, whatever stands in captions and names.
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>\n{body}\n</main>"
        f"<script>{script}</script></body></html>\n"
    )


def _title(run_dir: Path | None, results: dict[str, Any]) -> str:
    if run_dir is None:
        return str(results["made_by"].get("name") or "Videos")
    parts = run_dir.resolve().parts
    parts = parts[parts.index("runs") + 1 :] if "runs" in parts else parts[-2:]
    return "/".join(parts).replace("/seed", ", seed ")


def _head(title: str, results: dict[str, Any], history: list[dict[str, Any]]) -> str:
    trained = f"The model saw {history[-1]['samples_seen']:,} training clips. " if history else ""
    (height, width), frames = results["size_hw"], results["frames"]
    made = text = ""
    if "truth" in results["rows"]:
        made = ", each made from the first frame, caption and camera path of a clip held out from training"
        text = " The same measures are taken of the true videos and of controls that must do worse."
    return (
        f'<p class="kicker">vgr · {escape(results["protocol"]["name"])} protocol</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{trained}Here it is measured on {len(results["clips"])} clips of '
        f"{frames / results['fps']:.1f} seconds ({frames} frames, {width}×{height}){made}.{text}</p>"
        + _tiles(results, history)
    )


def _tiles(results: dict[str, Any], history: list[dict[str, Any]]) -> str:
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
    cells = (
        f'<div class="tile"><b>{figure(c)} <span class="small">{escape(unit)}</span></b>'
        f'<span class="name">{escape(label)}</span>{interval(c) and f"95 %: {interval(c)}<br>"}{escape(note)}</div>'
        for label, unit, c, note in tiles[:4]
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _verdicts(results: dict[str, Any]) -> str:
    lines = []
    for name, c in results["checks"].get("pose", {}).items():
        metric = results["metrics"][name]
        if c["difference"]["count"]:
            text = (
                f"Pose estimator, {metric['label'].lower()} in {metric['unit']}: on the true videos "
                f"{figure(c['own_camera'])} against their own camera and {figure(c['other_camera'])} against another "
                f"clip’s; difference {figure(c['difference'])} ({interval(c['difference'])})."
                + ("" if c["passed"] else " It cannot tell them apart, so the model has no such number.")
            )
            lines.append((c["passed"], text))
    if c := results["checks"].get("frame_order"):
        text = (
            f"Fréchet distance and time: true videos lie {c['ordered']:.2f} from the reference, the same with "
            f"shuffled frames {c['shuffled']:.2f}; chance alone gives {c['null_bias']:.2f}."
        )
        lines.append((c["passed"], text))
    items = (
        f'<div class="verdict"><span class="mark {mark}">{mark}</span><p>{escape(text)}</p></div>'
        for mark, text in (("passed" if ok else "failed", text) for ok, text in lines)
    )
    return f"<h2>Can the measures be trusted?</h2>{''.join(items)}" if lines else ""


def _videos(results: dict[str, Any], sets: dict[str, VideoSet], keys: list[str]) -> str:
    frames, fps, clips = results["frames"], results["fps"], []
    for key in keys:
        caption = ": ".join(x for x in (key, " / ".join(results["captions"][key])) if x)
        tracks = _tracks(results, sets, key)
        clips.append(
            f'<div class="clip"><p class="small">{escape(caption)}</p><div class="tracks">{tracks}</div></div>'
        )
    return (
        "<h2>Side by side</h2><p>Clips are chosen evenly along the model’s PSNR, the best first.</p>"
        f'<div class="controls" data-seconds="{frames / fps:.4f}" data-fps="{fps:.6g}"><button type="button">Play'
        '</button><input type="range" min="0" max="1" step="any" value="0" aria-label="time"><output></output></div>'
        f"{''.join(clips)}"
    )


def _tracks(results: dict[str, Any], sets: dict[str, VideoSet], key: str) -> str:
    """The videos of one clip, one a row of the results, and its camera path."""
    frames, fps = results["frames"], results["fps"]
    tracks = [
        f'<figure class="track"><video muted playsinline preload="auto" src="{uri}"></video>'
        f"<figcaption>{_name(results, row)}</figcaption></figure>"
        for row, uri in ((r, media.video_uri(s.video(key, frames)[0], fps)) for r, s in sets.items())
    ]
    own = (sets.get("truth") or sets["model"]).cameras(key, frames)
    if own is not None:
        swapped = sets["swapped"].cameras(key, frames) if "swapped" in sets else None
        drawing = path_from_above(own[0], swapped[0] if swapped else None)
        note = ", the other clip’s in orange" if swapped else ""
        tracks.append(f'<figure class="track">{drawing}<figcaption>Camera path from above{note}</figcaption></figure>')
    return "".join(tracks)


def _name(results: dict[str, Any], row: str) -> str:
    return f'<span class="dot {STYLES[row]}"></span>{escape(results["rows"][row]["label"])}'


def _html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{"".join(head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    style = {r: ' class="model"' if r == "model" else "" for r in rows}
    names = (f"<th{style[r]}>{_name(results, r)}<small>{escape(x['note'])}</small></th>" for r, x in rows.items())
    head = ["<th></th>", *names]
    lines: dict[bool, list[list[str]]] = {True: [], False: []}
    for name, metric in results["metrics"].items():
        cells = {r: row["metrics"].get(name) for r, row in rows.items()}
        if any(cells.values()):
            arrow = {"higher": " ↑", "lower": " ↓"}.get(metric["better"], "")
            unit = metric["unit"]
            if bias := (cells["model"] or {}).get("null_bias"):
                unit = f"chance alone {bias:.2f}"
            label = f"<td>{escape(metric['label'])}{arrow}<small>{escape(unit)}</small></td>"
            values = (f"<td{style[r]}>{figure(c)}<small>{interval(c)}</small></td>" for r, c in cells.items())
            lines[metric["primary"]].append([label, *values])
    codec = rows.get("codec", {"metrics": {}})["metrics"].get("psnr_db")
    ceiling = f" The codec’s round trip, {figure(codec)} dB, is the ceiling of PSNR." if codec else ""
    return (
        "<h2>Measures</h2><p>Mean over clips with its 95 % interval below. ↑ higher is better, ↓ lower."
        f"{ceiling} Motion should equal the true video’s.</p>{_html_table(head, lines[True])}"
        f"<details><summary>Speed and single trends</summary>{_html_table(head, lines[False])}</details>"
    )


def _pairs(results: dict[str, Any]) -> str:
    lines = []
    for c in results["comparisons"]:
        metric, label = results["metrics"][c["metric"]], escape(results["rows"][c["control"]]["label"])
        mark, word = ("passed", "better") if c["better"] else ("failed", "not better")
        lines.append([
            f"<td>{escape(metric['label'])}<small>{escape(metric['unit'])}</small></td><td>{label}</td>",
            f'<td>{figure(c)}<small>{interval(c)}</small></td><td>{c["count"]}</td><td class="mark {mark}">{word}</td>',
        ])  # fmt: skip
    if not lines:
        return ""
    head = (f"<th>{x}</th>" for x in ("Measure", "Control", "Difference", "Clips", ""))
    return (
        "<h3>Model minus control, clip by clip</h3><p>“Better” where the 95 % interval of the paired difference "
        f"leaves zero on the good side.</p>{_html_table(head, lines)}"
    )


def _sheets(path: Path, results: dict[str, Any], sets: dict[str, VideoSet], keys: list[str]) -> str:
    parts, images = [], []
    labels = "".join(f"<span>{escape(results['rows'][r]['label'])}</span>" for r in sets)
    for key in keys:
        image = media.sheet([s.video(key, results["frames"])[0] for s in sets.values()])
        images += [image, np.zeros((6, image.shape[1], 4), np.uint8)]
        parts.append(
            f'<h3 class="small">{escape(key)}</h3><div class="sheet"><div class="labels label">{labels}</div>'
            f'<img alt="frames of {escape(key)}" src="{media.data_uri("image/png", media.png(image))}"></div>'
        )
    (path.parent / "contact_sheet.png").write_bytes(media.png(np.concatenate(images[:-1])))
    seconds = results["frames"] / results["fps"]
    return f"<h2>Contact sheet</h2><p>From the given first frame to second {seconds:.1f}.</p>{''.join(parts)}"


def _unavailable(results: dict[str, Any]) -> str:
    reasons = {k: f"{u['why']}. To have it: {u['get']}." for k, u in results["unavailable"].items()}
    return f"<h2>Not measured here</h2>{_facts(reasons)}"


def _facts(facts: Mapping[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>' for k, v in facts.items())}</dl>"


def _settings(run_dir: Path | None, results: dict[str, Any]) -> str:
    made = results["made_by"]
    facts = {
        "Weights": made.get("weights", "not stated"),
        "Sampler": ", ".join(f"{k} {v}" for k, v in made.get("sampling", {}).items()) or "not stated",
        "Protocol": f"{results['protocol']['name']}, sha256 {results['protocol']['sha256']}",
        "Commit": results["commit"] or "not a checkout",
        "Device": results["device"],
        "Versions": ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
    }
    texts = {"Protocol": json.dumps(results["protocol"], indent=1)}
    if run_dir and (config := run_dir / "config.yaml").is_file():
        texts["Settings of the training run"] = config.read_text()
    folds = (f"<details><summary>{k}</summary><pre>{escape(x)}</pre></details>" for k, x in texts.items())
    return f"<h2>Settings</h2>{_facts(facts)}{''.join(folds)}"
