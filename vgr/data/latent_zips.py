"""Published latents of the world model's example set as shards (specs/world-model 8): no video is read or encoded.

raw/x.zip holds <key>.json (prompt, height, width), with x_camera.npz and x_metric_scale_stats.json beside it;
latents/x.zip holds <key>.npz, whose z (C,T,H,W) a model trains on as it is. Captions and figures to choose clips by
may stand beside the raw zips too, x<suffix>.json (by key, or a list of objects with key) or x<suffix>.jsonl.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vgr.data.files import Journal, atomic, write_json
from vgr.data.filters import Limit
from vgr.data.prepare import TextArrays
from vgr.data.shards import Shards, ShardWriter
from vgr.geometry.camera_file import UNREADABLE, CameraFile, read_npy, text, unpacked
from vgr.geometry.checks import check_cameras
from vgr.geometry.published import PublishedZip
from vgr.seeding import held_out
from vgr.types import Codec

MAX_LATENT_BYTES = 1 << 30  # of one clip: a minute of 720p has 55 MB in fp32
# Where a figure is an object, its number stands under one of these.
_SCORES = ("score", "vmafmotion_score", "dover_score", "quality_pass", "entity_count", "unimatch_flow_score", "median")


class LatentZips:
    """Clips of the first `frames` frames whose raw zip and latents zip have one name, in latents of `codec`.

    raw, latents: the two folders. size_hw, fps: of the encoded videos. captions: the suffix of captions' files; None:
    the prompt of <key>.json. limits: suffix -> [low, high] of the figure there, either None; a clip without is left
    out. val_share: of the clips, chosen by key, held out. Raises ValueError for folders without a pair of zips; what is
    wrong with one clip leaves that clip out.
    """

    def __init__(self, raw: str, latents: str, codec: Codec, frames: int, size_hw: tuple[int, int], fps: float = 16.0,
                 licence: str = "not stated", captions: str | None = None,
                 limits: Mapping[str, Limit] | None = None, val_share: float = 0.05) -> None:
        self.raw, self.latents, self.codec = Path(raw), Path(latents), codec
        self.frames, self.size_hw, self.fps, self.licence = frames, (int(size_hw[0]), int(size_hw[1])), fps, licence
        self.captions, self.val_share = captions, val_share
        self.limits = {suffix: list(limit) for suffix, limit in (limits or {}).items()}
        t, h, w = codec.stride
        if frames < 1 or (frames - 1) % t or self.size_hw[0] % h or self.size_hw[1] % w or not 0 < val_share < 1:
            raise ValueError(f"source.frames={frames}, source.size_hw={list(size_hw)}, source.val_share={val_share}: "
                             f"frames must be 1 + n x {t}, height a multiple of {h}, width of {w}, the share between 0 "
                             "and 1")
        self._dropped: list[dict[str, Any]] = []
        pairs = sorted(p.name for p in self.raw.glob("*.zip") if (self.latents / p.name).is_file())
        if not pairs:
            raise ValueError(f"source.raw={raw} and source.latents={latents} have no zip of one name; give the folders "
                             "of raw zips and of latents zips")
        good = [clip for name in pairs for clip in self._scan(name)]
        if len(good) < 2:
            told = [f"{x['file']} {x['key']}: {x['rule']} {x['value']}" for x in self._dropped[0:3]]
            raise ValueError(f"source.raw={raw}: {len(good)} clips, of which one at least is held out; left out: "
                             f"{len(self._dropped)}, {'; '.join(told)}")
        held = held_out(map(" ".join, good), val_share)
        self._plan = {"train": [c for c in good if " ".join(c) not in held],
                      "val": [c for c in good if " ".join(c) in held]}  # fmt: skip

    def count(self, split: str) -> int:
        """Clips of a split."""
        return len(self._plan[split])

    def _scan(self, name: str) -> list[tuple[str, str]]:
        """The clips of a pair of zips, by what stands beside them: name of the zip and key."""
        with _opened(self.raw / name) as raw, _opened(self.latents / name) as packed:
            keys = [n.removesuffix(".json") for n in raw.namelist() if n.endswith(".json")]
            there = set(packed.namelist())
        if not any(f"{key}.npz" in there for key in keys):  # cut short, a zip of zips still opens: as one of those
            raise ValueError(f"{self.latents / name} has latents of no clip of {self.raw / name}; is it whole?")
        figures = {suffix: _sidecar(self.raw / name, suffix) for suffix in self.limits}
        good = []
        for key in keys:
            if f"{key}.npz" not in there:
                self._dropped.append(_lost(name, key, "no latents"))
                continue
            for suffix, (low, high) in self.limits.items():
                value = _score(figures[suffix].get(key))
                if value is None or low is not None and value < low or high is not None and value > high:
                    self._dropped.append(_lost(name, key, suffix, value, [low, high]))
                    break
            else:
                good.append((name, key))
        return good

    def write(self, folder: Path, count: int, seed: int, progress: Callable[[int], None], device: str,
              text: TextArrays | None = None, text_made_by: dict[str, Any] | None = None,
              samples_per_shard: int = 8) -> int:
        """Write the first `count` clips of the split that `folder` is named after, continuing; returns how many were
        new. What cannot be read is left out and stands in dropped.json with what the scan dropped (under train).
        seed and device are not used: nothing is drawn or computed."""
        plan = self._plan[folder.name][:count]
        extra: dict[str, Any] = {
            "source": type(self).__name__, "split": folder.name, "frames": self.frames, "video": False, "clips": count,
            "places": sorted({name for name, _ in plan}), "captions": self.captions, "limits": self.limits,
        }  # fmt: skip
        if text is not None:
            extra["text"] = {**(text_made_by or {}), "null": "null.text.npy"}
        if (folder / "manifest.json").is_file() and Shards(folder).manifest["extra"] == extra:
            progress(len(plan))
            return 0
        codec, new = self.codec, 0
        unreadable = Journal(folder / "unreadable", "journal.jsonl")
        with ShardWriter(folder, type(codec).__name__, codec.fingerprint, tuple(codec.stride), codec.channels,
                         self.size_hw, self.fps, self.licence, samples_per_shard, extra) as writer:
            last = max((int(s["samples"][-1]["key"][-6:]) for s in writer.shards.values()), default=-1)
            progress(last + 1)
            if text is not None:
                with atomic(folder / extra["text"]["null"]) as file:
                    np.save(file, text(("",))[0][0], allow_pickle=False)
            for number, clip in self._clips(plan, last + 1):
                if isinstance(clip, ValueError):
                    unreadable.add({"id": " ".join(plan[number]), "why": str(clip)})
                else:
                    caption = clip[3]["shots"][0]["caption"]
                    writer.add(f"{folder.name}-{number:06d}", *clip, text=None if text is None else text((caption,)))
                    new += 1
                progress(1)
            if not (writer.shards or new):
                told = next(iter(unreadable.known.values()))["why"]
                raise ValueError(f"{folder}: no clip of {len(plan)} can be read; the first: {told}")
            lost, told = self._dropped if folder.name == "train" else [], unreadable.known
            lost = lost + [_lost(*c, "unreadable", told[" ".join(c)]["why"]) for c in plan if " ".join(c) in told]
            write_json(folder / "dropped.json", lost)  # before the manifest, which ends the work
        return new

    def _clips(self, plan: Sequence[tuple[str, str]], start: int) -> Iterator[tuple[int, Any]]:
        """Number, and latents, c2w, intrinsics and meta; or a ValueError that says what is wrong."""
        opened, zips, captions = "", None, {}
        for number, (name, key) in enumerate(plan[start:], start):
            try:
                if opened != name:
                    opened, zips = name, PublishedZip(self.raw / name)
                    captions = _sidecar(self.raw / name, self.captions) if self.captions else {}
                yield number, self._clip(zips, key, captions)
            except (ValueError, OSError) as error:
                yield number, ValueError(str(error))

    def _clip(self, zips: PublishedZip | None, key: str, captions: Mapping[str, Any]) -> tuple[Any, ...]:
        if zips is None:
            raise ValueError("its zip cannot be read")
        t, h, w = self.codec.stride
        z = _latents(self.latents / zips.path.name, key)
        want = (self.codec.channels, 1 + (self.frames - 1) // t, self.size_hw[0] // h, self.size_hw[1] // w)
        if z.ndim != 4 or z.shape[1] < want[1] or (z.shape[0], *z.shape[2:]) != (want[0], *want[2:]):
            raise ValueError(f"{key}: z has the shape {z.shape}; {want} or longer is needed for source.frames, size_hw "
                             "and codec")
        if not np.isfinite(z := z[:, : want[1]]).all():
            raise ValueError(f"{key}: z holds numbers that are not finite")
        cameras: CameraFile = zips.cameras(key)
        if cameras.c2w.shape[1] < self.frames:
            raise ValueError(f"{key}: {cameras.c2w.shape[1]} poses of {self.frames}")
        cameras = cameras.frames(0, self.frames)
        check_cameras(cameras, self.fps, self.size_hw)
        caption = captions.get(key) if self.captions else zips.info(key).get("prompt")
        if isinstance(caption, Mapping):
            caption = caption.get("prompt", next((x for x in caption.values() if isinstance(x, str)), None))
        meta = {"shots": [{"start": 0, "end": self.frames, "caption": str(caption or "")}], "metric_scale": True,
                "source": {"name": "latent_zips", "file": zips.path.name, "key": key}}  # fmt: skip
        return z, cameras.c2w[0].numpy(), cameras.intrinsics[0].numpy(), meta


def _latents(path: Path, key: str) -> NDArray[Any]:
    """z of <key>.npz in a zip; sizes are checked before anything is allocated."""
    try:
        with zipfile.ZipFile(path) as outer:
            if outer.getinfo(f"{key}.npz").file_size > MAX_LATENT_BYTES:
                raise ValueError(f"more than {MAX_LATENT_BYTES >> 20} MiB")
            with outer.open(f"{key}.npz") as member, zipfile.ZipFile(member) as inner:
                if inner.getinfo("z.npy").file_size > MAX_LATENT_BYTES:
                    raise ValueError(f"z of more than {MAX_LATENT_BYTES >> 20} MiB")
                return read_npy(unpacked(inner, "z.npy"))
    except UNREADABLE as error:
        raise ValueError(f"{path}: {key}: {error!r}") from error


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except UNREADABLE as error:
        raise ValueError(f"{path}: no zip that can be read ({error})") from error


def _sidecar(path: Path, suffix: str) -> dict[str, Any]:
    """By key, what x<suffix>.json or .jsonl beside x.zip says. ValueError where there is neither, or no such thing."""
    beside = [path.with_name(f"{path.stem}{suffix}{end}") for end in (".json", ".jsonl")]
    file = next((p for p in beside if p.is_file()), None)
    if file is None:
        raise ValueError(f"{path}: neither {beside[0].name} nor {beside[1].name} stands beside it")
    try:
        told = text(file)
        found = json.loads(told) if file == beside[0] else [json.loads(line) for line in told.splitlines() if line]
        return found if isinstance(found, dict) else {str(x["key"]): x for x in found}
    except (*UNREADABLE, RecursionError) as error:
        raise ValueError(f"{file}: must be an object by key, or objects with `key` ({error!r})") from error


def _lost(name: str, key: str, rule: str, value: Any = None, limit: Any = None) -> dict[str, Any]:
    return {"file": name, "key": key, "rule": rule, "value": value, "limit": limit}


def _score(value: Any) -> float | None:
    """The number that the published loader finds in a figure: of a list the mean, of an object that of a known name."""
    if isinstance(value, list):
        numbers = [x for x in map(_score, value) if x is not None]
        return sum(numbers) / len(numbers) if numbers else None
    if isinstance(value, dict):
        named = [value[name] for name in _SCORES if name in value]
        return next((x for x in map(_score, [*named, *value.values()]) if x is not None), None)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
