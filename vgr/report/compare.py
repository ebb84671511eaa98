"""compare.html: finished results of one protocol side by side, and compare.json with the same numbers.

Differences are to the first run over the clips that all have, by `vgr.metrics.statistics` (benchmarks spec, section 8).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.data.files import read_lines, write_json, write_text
from vgr.metrics.frame_rate import chunk_latencies
from vgr.metrics.statistics import discoveries, paired
from vgr.report import media, page
from vgr.report.curves import Line, chart, path_from_above
from vgr.report.sets import VideoSet, read_info, timings
from vgr.report.summary import Cell, cell, number
from vgr.report.table import FD

MOST = 8  # runs that colours keep apart, as many as style.css has
NEEDED = {"protocol", "clips", "rows", "metrics", "made_by", "frames", "fps", "size_hw", "captions", "curves"}
NEEDED |= {"commit", "device", "versions"}
QUALITY = ("psnr_db", "fvd", "fd_videomae", FD)  # what speed is set against: the first that runs with a speed have
QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95}


class Run(NamedTuple):
    """A finished result: results.json, its model's lines of videos.jsonl by clip, its sets by row, its timings."""

    folder: Path
    results: dict[str, Any]
    values: dict[str, dict[str, Any]]
    sets: dict[str, VideoSet]
    spent: list[dict[str, Any]]

    def cells(self) -> dict[str, Cell]:
        """The model's cells by metric, those with a value."""
        return {k: c for k, c in self.results["rows"]["model"]["metrics"].items() if c["value"] is not None}

    def column(self, metric: str, keys: Sequence[str]) -> NDArray[np.float64]:
        """One value a clip, NaN where it has none."""
        return np.array([self.values[k].get(metric) for k in keys], dtype=np.float64)


def write(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write compare.json and compare.html of results in these folders; returns the page's path.

    out: a folder, None for runs/bench/compare/<protocol>. ValueError, before anything is written, for fewer than two
    folders or too many, for what is not there, damaged or of another format, and for results that do not go together:
    of different protocols, without a clip in common, of different data.
    """
    if not 2 <= len(folders) <= MOST:
        raise ValueError(f"runs={[*map(str, folders)]}: give 2 to {MOST} folders of finished results")
    runs = [_read(Path(folder)) for folder in folders]
    keys = _shared(runs)
    found = compare(runs, keys)
    styles = {f"run{i}": run for i, run in enumerate(found["runs"])}
    labels = {"truth": "True video"} | {style: run["label"] for style, run in styles.items()}
    curves = {style: run["curves"] for style, run in styles.items() if run["curves"]}
    truths = [("truth", r.results["curves"]["truth"]) for r in runs if "truth" in r.results["curves"]]
    curves = dict(truths[:1]) | curves
    speed = page.speed({s: np.array(run["chunk_latencies_s"]) for s, run in styles.items()}, labels)
    speed["charts"].append(_scatter(found, styles))
    seconds = min(r.results["frames"] / r.results["fps"] for r in runs)
    html = page.render(
        "compare.html", r=found, labels=labels, seconds=seconds, fps=runs[0].results["fps"],
        over_time=page.over_time(curves, labels, curves), speed=speed,
        clips=[x | _clip(runs, labels, x["key"], seconds) for x in found["shown"]["clips"]],
        protocol=json.dumps(runs[0].results["protocol"], indent=1),
    )  # fmt: skip
    out = Path(out or Path("runs/bench/compare") / Path(found["protocol"]["name"]).name)
    write_json(out / "compare.json", found)
    write_text(out / "compare.html", html)
    return out / "compare.html"


def compare(runs: Sequence[Run], keys: Sequence[str]) -> dict[str, Any]:
    """The content of compare.json. keys: the clips that all runs have."""
    first = runs[0].results
    metrics = {k: m for run in runs for k, m in run.results["metrics"].items()}
    primary = [k for k, m in metrics.items() if m["primary"] and any(k in run.cells() for run in runs)]
    told = differences(runs, keys, primary)
    both = [k for k in primary if k in runs[0].cells() and any(k in run.cells() for run in runs[1:])]
    labels = _labels(runs)
    return {
        "format": 1,
        "protocol": {k: first["protocol"][k] for k in ("name", "sha256")},
        "clips": list(keys),
        "metrics": {k: {x: metrics[k][x] for x in ("label", "unit", "better", "how")} for k in primary},
        "runs": [
            {"label": label, "folder": str(run.folder), "clips": len(run.results["clips"]),
             "metrics": {k: run.cells()[k] for k in (*primary, "frames_per_s") if k in run.cells()},
             "conditions": _conditions(run), "settings": page.settings(run.results),
             "curves": run.results["curves"].get("model"), "chunk_latencies_s": chunk_latencies(run.spent).tolist()}
            for run, label in zip(runs, labels)
        ],
        "differences": told,
        "untested": [k for k in both if k not in {c["metric"] for c in told}],
        "shown": _shown(runs, keys, labels, metrics, [c["metric"] for c in told if c["run"] == 1]),
        "notes": _notes(runs),
    }  # fmt: skip


def differences(runs: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> list[Cell]:
    """Paired differences run - first of every metric that both have video by video, over units; one family of tests.

    `stands` after Benjamini-Hochberg; `verdict` is then what that is by the metric's direction, else empty.
    """
    named = {k: u for run in runs[::-1] for k, u in run.sets["model"].info.get("units", {}).items()}
    units, out = [str(named.get(k, k)) for k in keys], []
    for metric in (k for k in metrics if k in runs[0].cells()):
        for i, run in ((i, run) for i, run in enumerate(runs) if i and metric in run.cells()):
            found, p, effect = paired(run.column(metric, keys), runs[0].column(metric, keys), units)
            if found.count:
                out.append({"run": i, "metric": metric, **cell(found), "p": number(p), "rank_biserial": number(effect)})
    stands = discoveries([np.nan if c["p"] is None else c["p"] for c in out])
    for c, x in zip(out, stands):
        better = runs[c["run"]].results["metrics"][c["metric"]]["better"]
        good = {"higher": c["value"] > 0, "lower": c["value"] < 0}.get(better)
        c |= {"stands": bool(x), "verdict": {None: "differs", True: "better", False: "worse"}[good] if x else ""}
    return out


def _read(folder: Path) -> Run:
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no results.json; run `vgr-bench checkpoint=<run>` or `vgr-bench videos=<folder>` "
            "first and give the folder of the report.html it names"
        )
    found = _whole(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(found, dict) or found.get("format") != 1 or NEEDED - found.keys():
        told = f"format {found.get('format')}" if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} ({told}) is no whole result of format 1; measure again by this version")
    lines = [x for x in read_lines(folder / "videos.jsonl") if isinstance(x, dict) and x.get("row") == "model"]
    values = {x["key"]: x for x in lines}
    places = {row: folder / place for row, place in found.get("sets", {row: row for row in found["rows"]}).items()}
    sets = {row: VideoSet(places[row], tuple(found["clips"]), read_info(places[row])) for row in ("truth", "model")
            if row in places}  # fmt: skip
    for key in found["clips"]:
        if key not in values:
            raise ValueError(f"{folder}/videos.jsonl has no whole line of {key}; measure again")
        for row in sets.values():
            if not (row.folder / f"{key}.mp4").is_file():
                raise ValueError(f"{folder} is of {row.folder / key}.mp4, which is gone; measure again")
    place, info = sets["model"].folder, sets["model"].info
    return Run(folder, found, values, sets, _whole(place / "timings.json", lambda: timings(place, info)))


def _whole(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, no JSON ({error}); measure again") from None


def _shared(runs: Sequence[Run]) -> list[str]:
    """The clips that all runs have, in the first's order; ValueError where results do not go together."""
    first, sources = runs[0], {}
    for run in runs:
        by = {x.folder: x.results["protocol"] for x in (first, run)}
        if len({p["sha256"] for p in by.values()}) > 1:
            told = ", ".join(f"{folder} is by {p['name']} (sha256 {p['sha256']})" for folder, p in by.items())
            raise ValueError(f"{told}; measure both by one protocol")
        truth = run.sets["truth"].info.get("fingerprint") if "truth" in run.sets else None
        if source := truth or run.results["made_by"].get("requests"):
            sources[source] = run.folder
    keys = [k for k in first.results["clips"] if all(k in run.results["clips"] for run in runs)]
    if not keys:
        told = "; ".join(f"{run.folder} has {', '.join(run.results['clips'][:2]) or 'none'}" for run in runs)
        raise ValueError(f"no clip is in all of them: {told}; measure videos of the same clips")
    if len(sources) > 1:
        raise ValueError(f"{' and '.join(map(str, sources.values()))} are of other data under the same names; "
                         "measure both with the same shards or requests")  # fmt: skip
    return keys


def _labels(runs: Sequence[Run]) -> list[str]:
    """Who made each run's videos, else its folder's name, numbered where that is not one run's alone."""
    names = []
    for run in runs:
        own = run.folder.resolve()
        own = own.parent if own.name == run.results["protocol"]["name"] else own
        names.append(str(run.results["made_by"].get("name") or own.name))
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _conditions(run: Run) -> dict[str, str]:
    """What a speed depends on. Timings made elsewhere have the device that their set names."""
    made, own = run.results["made_by"], (run.sets["model"].folder / "timings.json").is_file()
    return {
        "Device": str(made.get("device") or (run.results["device"] if own else "not stated")),
        "Size": "×".join(map(str, run.results["size_hw"][::-1])),
        "Frames": str(run.results["frames"]),
        "Sampling steps": str(made.get("sampling", {}).get("steps") or "not stated"),
    }


def _notes(runs: Sequence[Run]) -> dict[str, str]:
    """Plain sentences about what keeps numbers of these runs apart: of `measures` and of `speed`."""
    told = {k: dict.fromkeys(_conditions(run)[k] for run in runs) for k in ("Device", "Size", "Frames")}
    apart = {k: f"{k.lower()} {' / '.join(x)}" for k, x in told.items() if len(x) > 1 or "not stated" in x}
    measured, timed = ("; ".join(apart[k] for k in ks if k in apart) for ks in (("Size", "Frames"), ("Device", "Size")))
    return {
        "measures": f"Not measured alike, and differences are of that too: {measured}." if measured else "",
        "speed": f"Speeds are not comparable, since these differ or are not known: {timed}." if timed else "",
    }


def _scatter(found: dict[str, Any], styles: dict[str, dict[str, Any]]) -> Any:
    """Quality over speed, a circle a run; empty where no run has both."""
    fast = {style: run for style, run in styles.items() if "frames_per_s" in run["metrics"]}
    quality = next((k for k in QUALITY if fast and all(k in run["metrics"] for run in fast.values())), None)
    if quality is None:
        return ""
    ends = {s: [[run["metrics"][quality][k]] for k in ("value", "low", "high")] for s, run in fast.items()}
    points = [Line([run["metrics"]["frames_per_s"]["value"]], y, style, low, high, label=run["label"])
              for (style, run), (y, low, high) in zip(fast.items(), ends.values())]  # fmt: skip
    title = ", ".join(filter(None, (found["metrics"][quality][k] for k in ("label", "unit", "better"))))
    return chart(points, "frames a second, higher is better", f"{title} is better")


def _shown(
    runs: Sequence[Run], keys: Sequence[str], labels: Sequence[str], metrics: dict[str, Any], tested: Sequence[str]
) -> dict[str, Any]:
    """Clips at the quantiles of the second run's difference to the first by the first metric that differs, those with a
    direction before others; else of the first run's own values, else of their order. Nobody picks by hand."""
    names = sorted(tested, key=lambda k: not metrics[k]["better"])
    apart = [(f"{metrics[k]['label']}, {labels[1]} minus {labels[0]}",
              runs[1].column(k, keys) - runs[0].column(k, keys)) for k in names]  # fmt: skip
    own = [(f"{metrics[k]['label']} of {labels[0]}", runs[0].column(k, keys)) for k in names]
    order = ("their order, since no value tells them apart", np.arange(len(keys), dtype=np.float64))
    by, values = next((x for x in apart + own if np.nanmax(x[1]) > np.nanmin(x[1])), order)
    ranked = [i for i in np.argsort(values, kind="stable") if np.isfinite(values[i])]
    at = {name: ranked[round(q * (len(ranked) - 1))] for name, q in QUANTILES.items()}
    clips = [{"at": ", ".join(name for name, j in at.items() if j == i), "key": keys[i], "value": float(values[i])}
             for i in dict.fromkeys(at.values())]  # fmt: skip
    return {"by": by, "clips": clips}


def _clip(runs: Sequence[Run], labels: dict[str, str], key: str, seconds: float) -> dict[str, Any]:
    """One clip's true video once, every run's video, and each camera path that is not another run's too."""
    fps, videos, paths = runs[0].results["fps"], {}, []
    rows = [("truth", run, run.sets["truth"]) for run in runs if "truth" in run.sets][:1]
    for style, run, made in rows + [(f"run{i}", run, run.sets["model"]) for i, run in enumerate(runs)]:
        rate = run.results["fps"]
        videos[style] = media.video_uri(*made.video(key, max(2, round(seconds * rate)), shorter=True))
        own = made.cameras(key, None) or (run.sets["truth"].cameras(key, None) if "truth" in run.sets else None)
        if own and style != "truth":
            at = (np.arange(round(seconds * fps)) * rate / fps).astype(int)  # the player's dot goes by the first's rate
            c2w = own[0][at[at < len(own[0])]]
            same = next((who for x, who in paths if x.shape == c2w.shape and np.allclose(x, c2w, atol=1e-5)), None)
            paths.append((c2w, [labels[style]])) if same is None else same.append(labels[style])
    told = {", ".join(who) if len(paths) > 1 else "": path_from_above(c2w) for c2w, who in paths}
    return {"caption": page.caption(runs[0].results, key), "videos": videos, "paths": told}
