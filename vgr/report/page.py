"""report.html: one static page, self-contained, that says what ran and what came out. No request leaves
it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vgr.data.files import atomic
from vgr.report import media
from vgr.report.curves import path_from_above
from vgr.report.rows import LABELS
from vgr.report.sets import VideoSet
from vgr.report.trends import GAIN, STYLES, over_time, read_history, training

_HERE = Path(__file__).parent
_VIDEO_BYTES = 10_000_000  # of embedded videos, so that the page stays below 15 MB


def write(
    path: Path,
    *,
    run_dir: Path | None = None,
    results: dict[str, Any] | None = None,
    sets: dict[str, VideoSet] | None = None,
    clips: int = 6,
) -> Path:
    """Write the page from results.json's content and the sets behind it, or from a training run alone.

    run_dir: a run's folder, for its curves (metrics.jsonl) and settings (config.yaml). Raises ValueError when
    there is neither. Also writes contact_sheet.png beside a page with videos.
    """
    if run_dir is None and results is None:
        raise ValueError("a page needs results or a run folder")
    history = read_history(run_dir) if run_dir else []
    shown = _choose_clips(results, sets, clips) if results and sets else []
    body = [_head(run_dir, results, history)]
    if results:
        body += [_verdicts(results, history), _videos(results, sets or {}, shown), _table(results), _pairs(results)]
        body += [_sheets(path, results, sets or {}, shown[:3]), over_time(results)]
    body += [training(history)]
    if results:
        body += [_unavailable(results)]
    body += [_settings(run_dir, results)]
    with atomic(path) as file:
        file.write(_document(_title(run_dir, results), "\n".join(p for p in body if p)).encode())
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
    # Only this very script may run, and nothing may be fetched, whatever stands in captions and names.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>\n{body}\n</main>"
        f"<script>{script}</script></body></html>\n"
    )


def _title(run_dir: Path | None, results: dict[str, Any] | None) -> str:
    if results and results.get("title"):
        return str(results["title"])
    if run_dir:
        parts = run_dir.resolve().parts
        parts = parts[parts.index("runs") + 1 :] if "runs" in parts else parts[-2:]
        return "/".join(parts).replace("/seed", ", seed ")
    return str(results["made_by"].get("name") or "Videos")


def _head(run_dir: Path | None, results: dict[str, Any] | None, history: list[dict[str, Any]]) -> str:
    kicker = f"vgr · {results['protocol']['name']} protocol" if results else "vgr · training run"
    parts = [f'<p class="kicker">{escape(kicker)}</p><h1>{escape(_title(run_dir, results))}</h1>']
    if history:
        seen = history[-1]["samples_seen"]
        trained = f"The model saw {seen:,} training clips. "
    else:
        trained = ""
    if results:
        size, seconds = results["size_hw"], results["frames"] / results["fps"]
        given = "first frame, caption and camera path" if "truth" in results["rows"] else "commands"
        parts.append(
            f'<p class="lead">{trained}Here it is measured on {len(results["clips"])} clips of {seconds:.1f} seconds '
            f"({results['frames']} frames, {size[1]}×{size[0]}), each made from the {given} of a clip held out from "
            "training. The same measures are taken of the true videos, of what the codec alone loses, and of "
            "controls that must do worse.</p>"
        )
        parts.append(_tiles(results, history))
    else:
        parts.append(f'<p class="lead">{trained}It has not been measured yet; run vgr-bench on it.</p>')
    return "\n".join(parts)


def _tiles(results: dict[str, Any], history: list[dict[str, Any]]) -> str:
    rows, tiles = results["rows"], []
    model = rows["model"]["metrics"]
    for name in ("rot_step_imputed_deg", "psnr_db"):
        if name in model:
            other = rows.get("swapped", rows.get("frozen", {"metrics": {}}))
            versus = figure(other["metrics"].get(name))
            note = f"{other['label'].lower()}: {versus}" if versus != "–" else ""
            tiles.append((results["metrics"][name], model[name], note))
    if gain := _gain(history):
        text = {"label": "Camera gain", "unit": ""}
        tiles.append((text, gain, "loss with shuffled minus true camera; above zero means it listens"))
    for name in ("frames_per_s", "drift"):
        if name in model:
            note = "end to end, batch 1" if name == "frames_per_s" else "mean excess trend over the true videos"
            tiles.append((results["metrics"][name], model[name], note))
    cells = (
        f'<div class="tile"><b>{figure(c)} <span class="small">{escape(m["unit"])}</span></b>'
        f'<span class="name">{escape(m["label"])}</span>{interval(c) and f"95 %: {interval(c)}<br>"}{escape(n)}</div>'
        for m, c, n in tiles[:4]
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _gain(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    last = next((h for h in reversed(history) if GAIN in h), None)
    return last and {"value": last[GAIN], "low": last.get(f"{GAIN}_low"), "high": last.get(f"{GAIN}_high")}


def _verdicts(results: dict[str, Any], history: list[dict[str, Any]]) -> str:
    checks, lines = results["checks"], []
    for metric, c in checks.get("pose", {}).items():
        if c["difference"]["count"] == 0:
            continue
        label, unit = results["metrics"][metric]["label"].lower(), results["metrics"][metric]["unit"]
        text = (
            f"Pose estimator, {label} in {unit}: on the true videos {figure(c['own_camera'])} against their own "
            f"camera and {figure(c['other_camera'])} against another clip’s; difference {figure(c['difference'])} "
            f"({interval(c['difference'])})."
            + ("" if c["passed"] else " It cannot tell them apart, so the model has no such number.")
        )
        lines.append((c["passed"], text))
    if c := checks.get("frame_order"):
        text = (
            f"Fréchet distance and time: true videos lie {c['ordered']:.2f} from the reference, the same with "
            f"shuffled frames {c['shuffled']:.2f}; chance alone gives {c['null_bias']:.2f}."
        )
        lines.append((c["passed"], text))
    return _list("Can the measures be trusted?", lines) + _list("Does the model listen?", _listens(results, history))


def _listens(results: dict[str, Any], history: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    lines = []
    if gain := _gain(history):
        text = (
            f"Paired camera test: on held-out clips the loss rises by {figure(gain)} ({interval(gain)}) when cameras "
            "are shuffled between clips."
        )
        lines.append((gain["low"] is not None and gain["low"] > 0, text))
    if c := results["swapped_follows"].get("rot_step_imputed_deg"):
        more = c["own_minus_given"]
        text = (
            f"Sent along another clip’s path, the model’s video turns {figure(c)} °/frame off that path; off the "
            f"clip’s own path it is {figure(more)} ({interval(more)}) more."
        )
        lines.append((more["low"] is not None and more["low"] > 0, text))
    return lines


def _list(title: str, lines: list[tuple[bool, str]]) -> str:
    items = "".join(
        f'<div class="verdict"><span class="mark {"passed" if ok else "failed"}">'
        f"{'passed' if ok else 'failed'}</span><p>{escape(text)}</p></div>"
        for ok, text in lines
    )
    return f"<h2>{title}</h2>{items}" if lines else ""


def _choose_clips(results: dict[str, Any], sets: dict[str, VideoSet], count: int) -> list[str]:
    """Evenly over the clips sorted by the model's PSNR (or as they come), so that nobody picks the good
    ones.
    """
    keys = list(results["clips"])
    scores = results.get("psnr_by_clip") or {}
    keys.sort(key=lambda k: -scores.get(k, 0.0))
    picks = np.linspace(0, len(keys) - 1, min(count, len(keys))).round().astype(int)
    return [keys[i] for i in picks]


def _videos(results: dict[str, Any], sets: dict[str, VideoSet], keys: list[str]) -> str:
    frames, fps, spent, clips = results["frames"], results["fps"], 0, []
    for key in keys:
        html = f'<div class="clip"><p class="small">{escape(_caption(results, key))}</p>'
        html += f'<div class="tracks">{_tracks(sets, key, frames, fps)}</div></div>'
        if clips and spent + len(html) > _VIDEO_BYTES:
            break
        clips.append(html)
        spent += len(html)
    if not clips:
        return ""
    return (
        "<h2>Side by side</h2><p>Clips are chosen evenly along the model’s PSNR, the best first.</p>"
        f'<div class="controls" data-seconds="{frames / fps:.4f}" data-fps="{fps:.6g}"><button type="button">Play'
        '</button><input type="range" min="0" max="1" step="any" value="0" aria-label="time"><output></output></div>'
        f"{''.join(clips)}"
    )


def _tracks(sets: dict[str, VideoSet], key: str, frames: int, fps: float) -> str:
    """The videos of one clip, one a row of the results, and its camera path."""
    with ThreadPoolExecutor(2) as pool:
        uris = list(pool.map(lambda s: media.video_uri(s.video(key, frames)[0], fps), sets.values()))
    tracks = [
        f'<figure class="track"><video muted playsinline preload="auto" src="{uri}"></video>'
        f'<figcaption><span class="dot {STYLES[row]}"></span>{escape(LABELS[row][0])}</figcaption></figure>'
        for row, uri in zip(sets, uris)
    ]
    own = (sets.get("truth") or sets["model"]).cameras(key, frames)
    if own is not None:
        swapped = sets["swapped"].cameras(key, frames) if "swapped" in sets else None
        drawing = path_from_above(own[0], swapped[0] if swapped else None)
        note = ", the other clip’s in orange" if swapped else ""
        tracks.append(f'<figure class="track">{drawing}<figcaption>Camera path from above{note}</figcaption></figure>')
    return "".join(tracks)


def _caption(results: dict[str, Any], key: str) -> str:
    text = " / ".join(results.get("captions", {}).get(key, []))
    return f"{key}: {text}" if text else key


def _table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    head = "".join(
        f'<th class="{"model" if r == "model" else ""}"><span class="dot {STYLES[r]}"></span>{escape(row["label"])}'
        f"<small>{escape(row['note'])}</small></th>"
        for r, row in rows.items()
    )

    def body(primary: bool) -> str:
        out = []
        for name, metric in results["metrics"].items():
            cells = {r: row["metrics"].get(name) for r, row in rows.items()}
            if metric["primary"] is not primary or not any(cells.values()):
                continue
            arrow = {"higher": " ↑", "lower": " ↓"}.get(metric["better"], "")
            bias = next((c["null_bias"] for c in cells.values() if c and "null_bias" in c), None)
            note = f"chance alone {bias:.2f}" if bias is not None else ""
            unit = ", ".join(x for x in (metric["unit"], note) if x)
            tds = "".join(
                f'<td class="{"model" if r == "model" else ""}">{figure(c)}<small>{interval(c)}</small></td>'
                for r, c in cells.items()
            )
            out.append(f"<tr><td>{escape(metric['label'])}{arrow}<small>{escape(unit)}</small></td>{tds}</tr>")
        return "".join(out)

    def table(content: str) -> str:
        return (
            f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{content}</tbody></table></div>'
        )

    codec = rows.get("codec", {"metrics": {}})["metrics"].get("psnr_db")
    ceiling = f" The codec’s round trip, {figure(codec)} dB, is the ceiling of PSNR." if codec else ""
    memory = ", ".join(f"{k.replace('_', ' ').replace(' gib', '')} {v:.2f} GiB" for k, v in results["memory"].items())
    return (
        "<h2>Measures</h2><p>Mean over clips with its 95 % interval below. ↑ higher is better, ↓ lower."
        f"{ceiling} Motion should equal the true video’s.</p>{table(body(True))}"
        f"<details><summary>Speed and single trends</summary>{table(body(False))}"
        f'<p class="small">{escape("Memory: " + memory) if memory else ""}</p></details>'
    )


def _pairs(results: dict[str, Any]) -> str:
    lines = []
    for c in results["comparisons"]:
        metric, mark = results["metrics"][c["metric"]], "passed" if c["better"] else "failed"
        lines.append(
            f"<tr><td>{escape(metric['label'])}<small>{escape(metric['unit'])}</small></td>"
            f"<td>{escape(results['rows'][c['control']]['label'])}</td><td>{figure(c)}<small>{interval(c)}</small></td>"
            f'<td>{c["count"]}</td><td class="mark {mark}">{"better" if c["better"] else "not better"}</td></tr>'
        )
    if not lines:
        return ""
    return (
        "<h3>Model minus control, clip by clip</h3><p>“Better” where the 95 % interval of the paired difference "
        'leaves zero on the good side.</p><div class="scroll"><table><thead><tr><th>Measure</th><th>Control</th>'
        f"<th>Difference</th><th>Clips</th><th></th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _sheets(path: Path, results: dict[str, Any], sets: dict[str, VideoSet], keys: list[str]) -> str:
    parts, images = [], []
    for key in keys:
        image = media.sheet([s.video(key, results["frames"])[0] for s in sets.values()])
        images += [image, np.zeros((6, image.shape[1], 4), np.uint8)]
        labels = "".join(f"<span>{escape(LABELS[r][0])}</span>" for r in sets)
        parts.append(
            f'<h3 class="small">{escape(key)}</h3><div class="sheet"><div class="labels label">{labels}</div>'
            f'<img alt="frames of {escape(key)}" src="{media.png_uri(media.png(image))}"></div>'
        )
    if not parts:
        return ""
    (path.parent / "contact_sheet.png").write_bytes(media.png(np.concatenate(images[:-1])))
    seconds = results["frames"] / results["fps"]
    return f"<h2>Contact sheet</h2><p>From the given first frame to second {seconds:.1f}.</p>{''.join(parts)}"


def _unavailable(results: dict[str, Any]) -> str:
    items = "".join(
        f"<dt><code>{escape(name)}</code></dt><dd>{escape(u['why'])}. To have it: {escape(u['get'])}.</dd>"
        for name, u in results["unavailable"].items()
    )
    return f"<h2>Not measured here</h2><dl>{items}</dl>" if items else ""


def _settings(run_dir: Path | None, results: dict[str, Any] | None) -> str:
    def fold(title: str, text: str) -> str:
        return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"

    parts = []
    if results:
        made, facts = results["made_by"], {}
        facts["Weights"] = made.get("weights", "not stated")
        facts["Sampler"] = ", ".join(f"{k} {v}" for k, v in made.get("sampling", {}).items()) or "not stated"
        facts["Protocol"] = f"{results['protocol']['name']}, sha256 {results['protocol']['sha256']}"
        facts["Commit"] = results["commit"] or "not a checkout"
        facts["Device"] = results["device"]
        facts["Versions"] = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
        parts.append("<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items()) + "</dl>")
        parts.append(fold("Protocol", json.dumps(results["protocol"], indent=1)))
    if run_dir and (config := run_dir / "config.yaml").is_file():
        parts.append(fold("Settings of the training run", config.read_text()))
    return f"<h2>Settings</h2>{''.join(parts)}" if parts else ""
