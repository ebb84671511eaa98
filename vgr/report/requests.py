"""What a benchmark asks models for where there is no true video: first frames, cameras and captions (specs 10).

`read_requests` takes
  a split of SANA-WM-Bench  <bench>/benchmark_v2_*: sanawm_export_v2/<id>.npz and run_manifest.jsonl; images/<id>.png
  a folder of one's own     <key>.caption.txt, a line a shot; <key>.png or .jpg, for a model that takes a first frame;
                            <key>.npz or .txt, poses as any reader of ours takes them, for a model that takes cameras
  a JSON list of stories    {"prompts": [{"key", "shots": [captions], "returns": pairs of shots with one subject}]}, as
                            benchmarks/prompts/ has them; returns may lack; "cuts": false beside prompts: one shot each,
                            in which captions follow one another
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vgr.data.files import read_lines
from vgr.report.rows import asked_of, shots_of, time_requests
from vgr.report.sets import Clip, Frames, VideoSet, fill_set, fingerprint
from vgr.seeding import derive_seed

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Request(NamedTuple):
    """One video asked for: its name, a caption a shot, files of its first frame and of its camera path, if any, the
    pairs of its shots that show one subject, and whether there are cuts between captions."""

    key: str
    captions: tuple[str, ...]
    picture: Path | None
    poses: Path | None
    returns: tuple[tuple[int, int], ...] = ()
    cuts: bool = True


def read_requests(path: Path) -> list[Request]:
    """In the order of their names. FileNotFoundError or ValueError say what lies there instead."""
    if path.suffix == ".json":
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"requests={path} is no JSON: {error}") from error
        rows = told.get("prompts") if isinstance(told, dict) else None
        if not rows or not all(isinstance(r, dict) and r.get("key") and r.get("shots") for r in rows):
            raise ValueError(f'requests={path} must hold {{"prompts": [{{"key", "shots"}}, ...]}}')
        return [Request(str(r["key"]), tuple(map(str, r["shots"])), None, None, tuple(map(tuple, r.get("returns", ()))),
                        told.get("cuts", True)) for r in rows]  # fmt: skip
    if not path.is_dir():
        raise FileNotFoundError(f"requests={path} does not exist; give a folder or JSON, see vgr/report/requests.py")
    if (path / "sanawm_export_v2").is_dir():
        return _sana_wm_bench(path)
    found = []
    for caption in sorted(path.glob("*.caption.txt")):
        key = caption.name.removesuffix(".caption.txt")
        beside = [path / f"{key}{ending}" for ending in (*_PICTURES, ".npz", ".txt")]
        there = [p for p in beside if p.is_file()]
        picture, poses = (next((p for p in there if (p.suffix in _PICTURES) == kind), None) for kind in (True, False))
        found.append(Request(key, tuple(caption.read_text(encoding="utf-8").splitlines()), picture, poses))
    if not found:
        raise ValueError(f"requests={path} holds no <key>.caption.txt; see vgr/report/requests.py")
    return found


def _sana_wm_bench(path: Path) -> list[Request]:
    folder = path / "sanawm_export_v2"
    prompts = {}
    for row in read_lines(folder / "run_manifest.jsonl"):
        name = next((str(row[k]) for k in ("id", "scene_id", "name") if k in row), None)
        if name is None or "prompt" not in row:
            raise ValueError(f"{folder}/run_manifest.jsonl: rows have {', '.join(row)}; an id and a prompt are needed")
        prompts[name] = str(row["prompt"])
    found = []
    for poses in sorted(folder.glob("*.npz")):
        picture = path.parent / "images" / f"{poses.stem}.png"
        if poses.stem not in prompts or not picture.is_file():
            raise ValueError(f"{poses}: no prompt in run_manifest.jsonl, or no {picture}")
        found.append(Request(poses.stem, (prompts[poses.stem],), picture, poses))
    return found


def make_set(
    protocol: dict[str, Any], out: Path, generator: Any, requests: list[Request], batch: int,
    done: Callable[[int], None], part: tuple[int, int] = (0, 1),
) -> VideoSet:  # fmt: skip
    """The model's videos of the requests, made where missing, and their cameras.

    Video i draws its noise from (protocol seed, "bench", i). Paths longer than the protocol or the model are cut, and
    shots share the frames equally, each from a chunk's first frame. ValueError, before anything is made, for requests
    that the model cannot take, or seconds of sampling.seconds that it does not reach.
    """
    clips, pictures = zip(*(_clip(r, protocol, generator) for r in requests))
    frames = {len(c.c2w) for c in clips}
    if len(frames) > 1:
        raise ValueError(f"requests: paths have {sorted(frames)} frames at the model's rate; give all one length")
    bare = [c.key for c, picture in zip(clips, pictures) if picture is None]
    if 0 < len(bare) < len(clips):
        raise ValueError(f"requests: {', '.join(bare[:3])} have no first frame and others do; give all or none one")
    number = {c.key: i for i, c in enumerate(clips)}

    def generate(group: list[Clip], watch: Callable[[Frames], None] | None = None) -> tuple[Frames, dict[str, float]]:
        firsts = [pictures[number[c.key]] for c in group]
        first = None if firsts[0] is None else np.stack(firsts)
        seeds = [derive_seed(protocol["seed"], "bench", number[c.key]) for c in group]
        more = {} if group[0].cuts else {"cuts": False}
        return generator(first, *asked_of(group), seeds, watch=watch, shot=shots_of(group, generator), **more)

    asked = [[r.key, r.captions, *(p and hashlib.sha256(p.read_bytes()).hexdigest() for p in r[2:4]),
              *(() if r.cuts else ("no cuts",))] for r in requests]  # fmt: skip
    made_by = {"row": "model", "name": generator.name, "weights": generator.weights_hash,
               "sampling": generator.sampling, "protocol": protocol["sha256"], "requests": fingerprint({"of": asked}),
               "frames": frames.pop()}  # fmt: skip
    told = {"returns": {r.key: list(map(list, r.returns)) for r in requests}, "cameras": generator.takes_cameras}
    made = fill_set(out / "model", made_by, generator.fps, list(clips), lambda group: generate(group)[0], batch=batch,
                    part=part, told=told, done=done)  # fmt: skip
    if part[0] == 0:
        time_requests(protocol, made, [lambda watch, c=c: generate([c], watch) for c in clips])
    return made


def _clip(request: Request, protocol: dict[str, Any], generator: Any) -> tuple[Clip, Frames | None]:
    """What is asked for at the model's rate and size, and its first frame."""
    import torch

    from vgr.data.video import read_image
    from vgr.geometry.formats import follow, read_cameras

    own = torch.tensor(generator.intrinsics, dtype=torch.float64)
    seconds = protocol["sampling"].get("seconds")
    frames = protocol["frames"] if seconds is None else 1 + round(seconds * generator.fps)
    if seconds is not None and frames > generator.max_frames:
        raise ValueError(f"protocol={protocol['name']} asks for {seconds:g} s, {frames} frames, and {generator.name} "
                         f"makes up to {generator.max_frames}: give a checkpoint that streams (sampling.method=stream)")
    frames = min(frames, generator.max_frames)
    picture = None if request.picture is None else read_image(request.picture, generator.size_hw)
    if request.poses is not None and generator.takes_cameras:
        import cv2

        size = None if request.picture is None else cv2.imread(str(request.picture)).shape[:2]
        file = read_cameras(request.poses, size_hw=size)
        told = f"requests: {request.poses}"
        c2w, k = (x.numpy() for x in follow(file, generator.fps, generator.size_hw, 1 << 20, own, name=told))
        frames = min(frames, len(c2w))
    elif generator.takes_cameras:
        raise ValueError(f"requests: {request.key} has no poses, but {generator.name} takes cameras: add them")
    else:
        c2w, k = np.tile(np.eye(4), (frames, 1, 1)), np.tile(own.numpy(), (frames, 1))
    frames = 1 + (frames - 1) // generator.stride * generator.stride
    starts = _shot_starts(len(request.captions), frames, generator)
    return Clip(request.key, c2w[:frames], k[:frames], request.captions, starts, request.cuts), picture


def _shot_starts(shots: int, frames: int, generator: Any) -> tuple[int, ...]:
    """First frames of shots of equal length, each where a chunk begins. ValueError where there are fewer chunks."""
    chunk = generator.chunk or 1
    chunks = (frames - 1) // generator.stride // chunk
    if shots > max(chunks, 1):
        raise ValueError(f"{shots} shots in {frames} frames: {generator.name} has {chunks} chunks there; ask for more")
    return (0, *(1 + round(i * chunks / shots) * chunk * generator.stride for i in range(1, shots)))
