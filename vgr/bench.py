"""vgr-bench: make a set of videos by a frozen protocol and measure it, or measure a set somebody else made.

    vgr-bench checkpoint=runs/world_model/tiny/seed1 protocol=smoke
    vgr-bench videos=folder                            # anyone's, without weights or data
    vgr-bench videos=folder shards=datasets/doom/val protocol=standard check=true
    vgr-bench checkpoint=weights/run protocol=sana_wm_simple requests=SANA-WM-Bench/benchmark_v2_smooth_60s

Making and measuring are apart, and both go on where they stopped: a video that stands and was made by the same weights,
settings and protocol is not made again, nor measured again by the same code. part=2/8 does an eighth of both; without
part= the same command then finds all of it and writes the results.
Finished results stand side by side by `vgr-compare runs=[...]`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgr import command
from vgr.command import progress
from vgr.training.code_state import environment

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vgr.report.requests import Request
    from vgr.report.sets import VideoSet

NEEDED = {"name", "clips", "reference", "frames", "seed", "sampling", "drift", "frechet", "frame_rate"}
OPTIONAL = {"about", "fvd", "pose", "published", "quality", "requests", "revisit", "shots"}


def main() -> None:
    """Entry point of `vgr-bench` and `python -m vgr.bench`."""
    command.run("bench", body)


def body(cfg: DictConfig) -> None:
    """The command: conf/bench.yaml -> a set, results.json, videos.jsonl and report.html."""
    from vgr.data.shards import Shards
    from vgr.report.sets import open_set
    from vgr.training import tracking

    if cfg.checkpoint is not None and cfg.videos is not None or not (cfg.checkpoint or cfg.videos or cfg.check):
        raise ValueError("give either checkpoint=<run folder> or videos=<folder of mp4>, and not both")
    protocol = load_protocol(cfg.protocol or ("general" if cfg.videos and not cfg.shards else "smoke"))
    requests, data = _asked(cfg, protocol)
    part = re.fullmatch(r"(\d+)/(\d+)", str(cfg.part or "0/1"))
    if not part or int(part[1]) >= int(part[2]):
        raise ValueError(f"part={cfg.part}: must be i/n with i from 0 to n - 1, or null")
    weights, statistics = Path(cfg.weights), Path(cfg.statistics) if cfg.statistics else None
    if statistics and not statistics.is_dir():
        raise ValueError(f"statistics={statistics} is no folder; give the statistics/ of another run's results")
    videos = open_set(cfg.videos) if cfg.videos else None
    if cfg.check:
        cameras = bool(data) or any(r.poses for r in requests or ())
        cameras = cameras or videos is not None and any(videos.folder.glob("*.cameras.npz"))
        features = videos is not None and any(videos.folder.glob("*.features.npz"))
        print("\n".join(check(protocol, weights, data, cameras, statistics, requests, features)))
        return
    generator, run_dir, device = None, None, "cpu" if cfg.device == "auto" else cfg.device
    if videos is None:
        from vgr.generator import Generator

        generator = Generator.load(cfg.checkpoint, device=cfg.device, **protocol["sampling"])
        run_dir, device = find_run(Path(cfg.checkpoint)), generator.device
        out = Path(cfg.out or (run_dir or Path(cfg.checkpoint)) / "bench" / protocol["name"])
    else:
        out = Path(cfg.out or Path("runs/bench") / videos.folder.resolve().name / protocol["name"])
    shards = Shards(data) if data else None
    told = {"protocol": protocol, "checkpoint": cfg.checkpoint, "videos": cfg.videos}
    asked = tracking.asked(cfg.logger) and cfg.part is None
    run = tracking.start_wandb(out, told, **cfg.wandb, job="evaluate", step="time_s") if asked else None
    if run is not None:
        print(tracking.where(run))
    page = bench(
        protocol, out, generator=generator, videos=videos, shards=shards, requests=requests, run_dir=run_dir,
        batch=cfg.batch_size, part=(int(part[1]), int(part[2])), weights=weights, statistics=statistics, device=device,
        wandb_run=run,
    )  # fmt: skip
    print(page or f"part {cfg.part} is done; the same command without part= writes the results once all are")


def _asked(cfg: DictConfig, protocol: dict[str, Any]) -> tuple[list[Request] | None, str | None]:
    """What a checkpoint is asked for: requests, or else the folder of shards that clips come from; nothing for videos
    that are measured by themselves. Raises ValueError where neither or both are given."""
    from vgr.report.requests import read_requests
    from vgr.training import checkpoints

    data, asked = cfg.shards, cfg.requests or (protocol.get("requests") and command.root() / protocol["requests"])
    if cfg.requests and (cfg.shards or cfg.videos):
        raise ValueError("requests= asks a checkpoint for videos without true ones; leave shards= and videos= out")
    if data and protocol["frames"] is None:
        raise ValueError(f"protocol={protocol['name']} measures videos by themselves; leave shards out or take another")
    if asked and not (cfg.videos or cfg.shards):
        return read_requests(Path(asked)), None
    if cfg.checkpoint and not data:
        if "requests" in protocol:
            raise ValueError(f"protocol={protocol['name']} needs requests=<folder>: {protocol['about']}")
        saved = checkpoints.read_state(checkpoints.resolve(Path(cfg.checkpoint)))
        if not (data := saved["config"]["data"].get("val")):
            raise ValueError("the checkpoint names no validation shards; give shards=<val shards folder> or requests=")
    return None, data


def load_protocol(name: str) -> dict[str, Any]:
    """A protocol's settings with its sha256. name: in benchmarks/protocols, or a path. Raises ValueError."""
    import yaml

    folder = command.root() / "benchmarks" / "protocols"
    ours = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix in (".yaml", ".json")}
    path = Path(name) if str(name).endswith((".yaml", ".yml", ".json")) else ours.get(str(name), folder / name)
    if not path.is_file():
        raise ValueError(f"protocol={name} does not exist; choose {', '.join(ours)}, or give a YAML or JSON file")
    text = path.read_bytes()
    protocol = yaml.safe_load(text)  # JSON is YAML
    given = set(protocol if isinstance(protocol, dict) else ())
    if wrong := (NEEDED - given) | (given - NEEDED - OPTIONAL):
        raise ValueError(f"protocol={name}: keys missing or unknown: {', '.join(sorted(map(str, wrong)))}")
    return {**protocol, "sha256": hashlib.sha256(text).hexdigest()}


def check(
    protocol: dict[str, Any], weights: Path, data: str | None, cameras: bool, statistics: Path | None,
    requests: list[Request] | None = None, features: bool = False,
) -> list[str]:  # fmt: skip
    """Lines saying which weights and data are there, which columns will stay empty, and what stands beside others'."""
    from vgr.data.shards import Shards
    from vgr.metrics import extractors
    from vgr.report import judges, results
    from vgr.report.table import METRICS, NEEDS

    lines = [f"protocol {protocol['name']}, sha256 {protocol['sha256']}", f"about: {protocol.get('about', '')}"]
    asked = extractors.WEIGHTS if "fvd" in protocol else {}
    for name, (file, how) in (asked | (judges.WEIGHTS if "quality" in protocol else {})).items():
        there = (weights / file).exists()
        lines.append(f"{name}: {weights / file} is there" if there else f"{name}: no {weights / file}; {how}")
    if "quality" in protocol:
        lines.append(f"other networks' features: {'there' if features else NEEDS['before']['features'][1]}")
    clips = len(Shards(data)) if data else 0
    further = min(clips - (protocol["clips"] or 0), protocol["reference"])
    if requests is None and "requests" not in protocol:
        lines.append(f"true videos: {f'{data}, {clips} clips' if data else 'none; give shards=<val shards>'}")
        lines.append(f"cameras: {'there' if cameras else 'none; add <key>.cameras.npz'}")
    elif requests is None:
        own = "captions of videos= come from their set.json, see vgr/report/sets.py"
        own = own if protocol["requests"] else "a checkpoint needs requests=<folder>, see vgr/report/requests.py"
        lines.append(f"asked for: nothing; {own}")
    else:
        told = ("first frames", "picture"), ("cameras", "poses")
        with_ = ", ".join(f"{sum(getattr(r, k) is not None for r in requests)} with {name}" for name, k in told)
        long = protocol["sampling"].get("seconds")
        with_ += f", {long:g} s each, by a checkpoint that streams" if long else ""
        lines.append(f"asked for: {min(protocol['clips'] or len(requests), len(requests))} videos, {with_}")
    reference = statistics is not None or clips > 0 and further >= max(2, protocol["clips"] // 2)
    empty = results.unavailable(None, protocol, data is not None, reference, cameras, weights, features)
    lines += [f"empty: {name}: {reason['why']}" for name, reason in empty.items()]
    table = published(protocol, {}) or {"columns": {}}
    for column in table["columns"].values():
        ours = f", beside our {METRICS[column['ours']].label}" if column["ours"] else ""
        lines.append(f"published: {column['label']}{ours}" + (f"; {column['unlike']}" if column["unlike"] else ""))
    return lines


def published(protocol: dict[str, Any], cells: dict[str, Any]) -> dict[str, Any] | None:
    """The published table a protocol names (benchmarks/references), `ours` beside it in its units, column by column."""
    if "published" not in protocol:
        return None
    name, table = protocol["published"]["name"], protocol["published"]["table"]
    told = json.loads((command.root() / "benchmarks" / "references" / f"{name}.json").read_text(encoding="utf-8"))
    rows = [row for row in told["rows"] if row["table"] == table]
    columns = {k: c for k, c in told["columns"].items() if any(k in row["values"] for row in rows)}
    ours = {k: c.get("scale", 1) * cells[c["ours"]]["value"] for k, c in columns.items()
            if cells.get(c["ours"], {}).get("value") is not None}  # fmt: skip
    return {**told, "table": table, "rows": rows, "columns": columns, "ours": ours}


def find_run(checkpoint: Path) -> Path | None:
    """The run folder (it has metrics.jsonl) a checkpoint path is or lies in."""
    return next((p for p in (checkpoint, *checkpoint.resolve().parents[:2]) if (p / "metrics.jsonl").is_file()), None)


def bench(
    protocol: dict[str, Any], out: Path, *, generator: Any = None, videos: VideoSet | None = None, shards: Any = None,
    requests: list[Request] | None = None, run_dir: Path | None = None, batch: int = 8, part: tuple[int, int] = (0, 1),
    weights: Path = Path("weights"), statistics: Path | None = None, device: str = "cpu", wandb_run: Any = None,
) -> Path | None:  # fmt: skip
    """Make what is missing, measure all rows, write results; returns the page's path, None of one part of many.

    generator: a callable as vgr.generator.Generator, with its attributes; or videos: a set. shards: the validation
    clips, matched by key; or requests: what a generator is asked for where there are none. part (i, n): this process's
    share. weights: folder of networks' files; statistics: of true features' moments. wandb_run: an open W&B run that is
    told the same and ended. Raises ValueError on input that does not fit together.
    """
    from vgr.metrics import extractors
    from vgr.report import judges, measure, page, results
    from vgr.report import requests as requests_
    from vgr.report import rows as rows_
    from vgr.report.mirror import mirror
    from vgr.report.table import LABELS

    networks = extractors.load(weights, protocol["fvd"]["frames"], device) if "fvd" in protocol else {}
    judging = judges.load(weights, device) if "quality" in protocol else {}
    sets: dict[str, VideoSet] = {} if videos is None else {"model": videos}
    reference = None
    if requests is not None:
        asked = requests[: protocol["clips"]]
        with progress(len(asked), "making videos") as done:
            sets["model"] = requests_.make_set(protocol, out, generator, asked, batch, done, part)
        keys, frames = list(sets["model"].keys), sets["model"].info["made_by"]["frames"]
    elif shards is None:
        keys, frames = list(videos.keys[: protocol["clips"]]), protocol["frames"]
        if frames is not None:
            frames = min(frames, *(len(videos.video(k)[0]) for k in keys))
    else:
        clips, frames = rows_.choose(protocol, shards, generator, videos)
        keys = [c.key for c in clips]
    if part[1] > len(keys):
        raise ValueError(f"part={part[0]}/{part[1]}: there are only {len(keys)} videos to share; take fewer parts")
    if shards is not None:
        with progress(len(shards.keys), "true videos") as done:
            sets["truth"], reference = rows_.true_sets(protocol, out, shards, clips, done, part)
        with progress((4 if generator else 1) * len(clips), "making videos") as done:
            if generator:
                sets |= rows_.make_rows(protocol, out, generator, sets["truth"], clips, frames, batch, done, part)
            sets["frozen"] = rows_.frozen_row(out, sets["truth"], clips, frames, batch, done, part)
    sets = {name: sets[name] for name in LABELS if name in sets}
    total = len(keys) * len(sets) + (len(reference.keys) if reference else 0)
    with progress(total, "measuring") as done:
        job = measure.Job(protocol, frames, networks, judging, out / "measured", part, done)
        found = results.measure(job, sets, keys, reference, out, weights, statistics)
    if found is None:
        return None
    places = {row: os.path.relpath(x.folder, out) for row, x in sets.items()}
    beside = published(protocol, found[0]["rows"]["model"]["metrics"])
    written = {"format": 1, **environment(), **found[0], "sets": places, "published": beside}
    results.write(out, written, found[1])
    path = page.write(out / "report.html", run_dir, written, sets)
    if wandb_run is not None:
        mirror(wandb_run, out, written, found[1], sets)
    return path


def bench_between(
    record: dict[str, Any], codec: Any, val: str, name: str
) -> Callable[[Any, Path, tuple[int, int]], dict[str, float]]:
    """A function (module, out, part) that measures a training module's averaged weights by a protocol, on validation
    shards, and gives bench/<metric> of what stands in the table; {} of one part of many. Raises ValueError."""
    from vgr.data.shards import Shards
    from vgr.generator import Generator
    from vgr.report.table import METRICS

    protocol, shards = load_protocol(name), Shards(val)
    own = {k: v for k, v in protocol["sampling"].items() if v is not None}

    def measure(module: Any, out: Path, part: tuple[int, int]) -> dict[str, float]:
        shares = min(part[1], protocol["clips"], len(shards.keys))
        if part[0] >= shares:
            return {}
        weights = f"averaged after {module.samples_seen} samples of seed {module.seed}"
        parts, sampling = {**module.ema, "codec": codec}, {**record["sampling"], **own}
        generator = Generator(parts, record, out.name, weights, {}, sampling, module.device.type)
        given = {"generator": generator, "shards": shards, "part": (part[0], shares), "device": module.device.type}
        if bench(protocol, out, **given) is None:
            return {}
        cells = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]["model"]["metrics"]
        return {f"bench/{k}": c["value"] for k, c in cells.items() if k in METRICS and METRICS[k].primary
                and c["value"] is not None}  # fmt: skip

    return measure


if __name__ == "__main__":
    main()
