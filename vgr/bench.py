"""vgr-bench: make a set of videos by a frozen protocol and measure it, or measure a set somebody else made.

    vgr-bench checkpoint=runs/world_model/tiny/seed1 protocol=smoke
    vgr-bench videos=folder data=data/doom/val

Making and measuring are apart: a video that stands and was made by the same weights, settings and protocol is
not made again, so a killed run continues.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgr import command
from vgr.command import progress

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vgr.report.sets import VideoSet


def main() -> None:
    """Entry point of `vgr-bench` and `python -m vgr.bench`."""
    command.run("bench", body)


def body(cfg: DictConfig) -> None:
    """The command: conf/bench.yaml -> a set, results.json, videos.jsonl and report.html."""
    from vgr.data.shards import Shards

    protocol = load_protocol(cfg.protocol)
    if (cfg.checkpoint is None) == (cfg.videos is None):
        raise ValueError("give either checkpoint=<run folder> or videos=<folder of mp4>, and not both")
    generator, run_dir, videos = None, None, None
    if cfg.checkpoint is not None:
        from vgr.generator import Generator

        given = {k: v for k, v in protocol["sampling"].items() if v is not None}
        generator = Generator.load(cfg.checkpoint, device=cfg.device, **given)
        run_dir = find_run(Path(cfg.checkpoint))
        out = Path(cfg.out or (run_dir or Path(cfg.checkpoint)) / "bench" / protocol["name"])
    else:
        from vgr.report.sets import open_set

        videos = open_set(cfg.videos)
        out = Path(cfg.out or Path("runs/bench") / videos.folder.resolve().name / protocol["name"])
    data = cfg.data or (generator.data_info.get("val") if generator else None)
    if generator and not data:
        raise ValueError("data=null and the checkpoint names no validation shards; give data=<val shards folder>")
    page = bench(
        protocol, out, generator=generator, videos=videos, shards=Shards(data) if data else None,
        run_dir=run_dir, batch=cfg.batch_size,
    )  # fmt: skip
    print(page)


def load_protocol(name: str) -> dict[str, Any]:
    """A protocol's settings with its sha256. name: in benchmarks/protocols, or a path. Raises ValueError."""
    import yaml

    folder = command.root() / "benchmarks" / "protocols"
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"protocol={name} does not exist; choose {known}, or give a YAML file")
    text = path.read_bytes()
    protocol = yaml.safe_load(text)
    needed = {"name", "clips", "reference", "frames", "seed", "sampling", "drift", "frechet", "frame_rate"}
    if not isinstance(protocol, dict) or set(protocol) != needed:
        wrong = needed ^ set(protocol if isinstance(protocol, dict) else ())
        raise ValueError(f"protocol={name}: keys missing or unknown: {', '.join(sorted(map(str, wrong)))}")
    return {**protocol, "sha256": hashlib.sha256(text).hexdigest()}


def find_run(checkpoint: Path) -> Path | None:
    """The run folder (it has metrics.jsonl) a checkpoint path is or lies in."""
    return next((p for p in (checkpoint, *checkpoint.resolve().parents[:2]) if (p / "metrics.jsonl").is_file()), None)


def bench(
    protocol: dict[str, Any],
    out: Path,
    *,
    generator: Any = None,
    videos: VideoSet | None = None,
    shards: Any = None,
    run_dir: Path | None = None,
    batch: int = 8,
) -> Path:
    """Make what is missing, measure all rows, write results; returns the page's path.

    generator: a callable as vgr.generator.Generator, with its attributes; or videos: a set. shards: the
    validation clips, matched by key (needed with a generator). Raises ValueError on input that does not fit
    together.
    """
    from vgr.report import page, results
    from vgr.report import rows as rows_

    sets: dict[str, VideoSet] = {} if videos is None else {"model": videos}
    reference = None
    if shards is None:
        keys = list(videos.keys[: protocol["clips"]])
        frames = min(protocol["frames"], *(len(videos.video(k)[0]) for k in keys))
    else:
        clips, frames = rows_.choose(protocol, shards, generator, videos)
        keys = [c.key for c in clips]
        with progress(len(shards.keys), "true videos") as done:
            sets["truth"], reference = rows_.true_sets(protocol, out, shards, clips, done)
        with progress((4 if generator else 1) * len(clips), "making videos") as done:
            if generator:
                sets |= rows_.make_rows(protocol, out, generator, sets["truth"], clips, frames, batch, done)
            sets["frozen"] = rows_.frozen_row(out, sets["truth"], clips, frames, batch, done)
    sets = {name: sets[name] for name in rows_.LABELS if name in sets}
    total = len(keys) * len(sets) + (len(reference.keys) if reference else 0)
    with progress(total, "measuring") as done:
        found, per_video = results.measure(protocol, sets, keys, frames, reference, done)
    found = {"format": 1, **environment(), **found}
    results.write(out, found, per_video)
    return page.write(out / "report.html", run_dir, found, sets)


def environment() -> dict[str, Any]:
    """Commit (None outside a checkout), device and versions: what a number was measured with."""
    import torch

    root, commit = command.root(), None
    if (root / ".git").exists():
        call = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
        commit = call.stdout.strip() or None
    packages = ("vgr", "torch", "numpy", "scipy", "opencv-python-headless", "av", "torchmetrics")
    cuda = torch.cuda.is_available()
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in packages},
    }


if __name__ == "__main__":
    main()
