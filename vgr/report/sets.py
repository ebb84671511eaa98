"""A *set*: a folder of videos, optional cameras, and a set.json saying who made it and how.

    <key>.mp4  <key>.cameras.npz (c2w (F,4,4), intrinsics (F,4))  set.json

set.json: {"format": 1, "made_by": {...}, "fingerprint": sha256 of made_by, "clips": [keys], "fps": ..., and optionally
"cuts": {key: [first frames of shots]}, "changes": {key: [first frames of captions], where not all are cuts},
"chunk_starts": [frames], "units": {key: prompt or scene}, "returns": {key: pairs of shots that show one subject},
"cameras": false where none were asked for, and "timings" (what `vgr.metrics.frame_rate` measures; ours lie in
timings.json)}.
Only the videos are required of a set that somebody else made. <key>.features.npz: see `vgr.metrics.vbench`;
<key>.poses.npz: c2w (F,4,4), cameras that another estimator found in the video, NaN where it found none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.data.files import atomic, write_json
from vgr.geometry.camera_file import arrays

Frames = NDArray[np.uint8]
CRF = 14  # of the videos we write; stated in set.json


class Clip(NamedTuple):
    """What is asked for: name, commanded cameras c2w (F,4,4), intrinsics (F,4), text and first frame of each shot; not
    cuts: all of it is one shot, in which captions change."""

    key: str
    c2w: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    captions: tuple[str, ...]
    starts: tuple[int, ...] = (0,)
    cuts: bool = True


@dataclass(frozen=True)
class VideoSet:
    """Videos by key, read when asked for. `info` is set.json, {} where there is none."""

    folder: Path
    keys: tuple[str, ...]
    info: dict[str, Any]

    def video(self, key: str, frames: int | None = None, shorter: bool = False) -> tuple[Frames, float]:
        """(frames (F,H,W,3), frames a second); cut to `frames`. ValueError when there are fewer, unless `shorter`."""
        from vgr.data.video import iter_video

        shown = list(islice(iter_video(self.folder / f"{key}.mp4"), frames))
        if len(shown) < 2 or frames is not None and len(shown) < frames and not shorter:
            needed = f"{frames or 2} are measured; make it longer"
            raise ValueError(f"{self.folder / key}.mp4 has {len(shown)} frames, {needed}")
        fps = self.info.get("fps") or (len(shown) - 1) / float(shown[-1][1] - shown[0][1])
        return np.stack([frame for frame, _ in shown]), float(fps)

    def cameras(self, key: str, frames: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """c2w (frames,4,4) and intrinsics (frames,4), or all there are; None if the set has none for this video."""
        path = self.folder / f"{key}.cameras.npz"
        if not path.is_file() or not self.info.get("cameras", True):
            return None
        found = arrays(path, {"c2w", "intrinsics"}, np.float64)
        shapes = {name: x.shape for name, x in found.items()}
        length = len(found.get("c2w", ()))
        if shapes != {"c2w": (length, 4, 4), "intrinsics": (length, 4)} or length < (frames or 1):
            raise ValueError(
                f"{path} holds {shapes}; {frames or ''} frames are measured and need c2w (F,4,4) and intrinsics (F,4)"
            )
        return found["c2w"][:frames], found["intrinsics"][:frames]


def open_set(folder: Path | str) -> VideoSet:
    """Read a set. Raises ValueError when the folder has no mp4."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"videos={folder} is not a folder; give a folder of <key>.mp4 files")
    keys = tuple(sorted(p.stem for p in folder.glob("*.mp4") if p.is_file()))
    if not keys:
        raise ValueError(f"videos={folder} holds no .mp4 file; a set is a folder of <key>.mp4, see vgr/report/sets.py")
    return VideoSet(folder, keys, read_info(folder))


def read_info(folder: Path) -> dict[str, Any]:
    path = folder / "set.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it or repair it") from None


def fingerprint(made_by: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def fill_set(
    folder: Path, made_by: dict[str, Any], fps: float, clips: Sequence[Clip],
    make: Callable[[list[Clip]], Sequence[Frames | bytes]], *, batch: int = 8, part: tuple[int, int] = (0, 1),
    told: dict[str, Any] | None = None, done: Callable[[int], None],
) -> VideoSet:  # fmt: skip
    """Make the videos of this part of a set that are not there yet and return the whole set.

    make: clips -> frames (F,H,W,3), or the bytes of an mp4, each. Videos made by something else than `made_by` are made
    again; a folder with videos and no set.json is refused. part (i, n): every n-th clip from the i-th; others may work
    in the folder at the same time. told: more for set.json. done(n) is called as videos stand, made or found.
    """
    from vgr.data.video import encode_video

    for clip in clips:
        if Path(clip.key).name != clip.key:
            raise ValueError(f"clip key {clip.key!r} cannot name a file; keys are plain names")
    found, mark = read_info(folder), fingerprint(made_by)
    if not found and any(folder.glob("*.mp4")):
        raise ValueError(f"{folder} holds videos without a set.json; choose another out= or move them")
    info = {"format": 1, "made_by": made_by, "fingerprint": mark, "fps": fps, "crf": CRF, **(told or {})}
    info |= {"clips": [c.key for c in clips], "captions": {c.key: list(c.captions) for c in clips}}
    info["cuts"] = {c.key: list(c.starts[1:]) if c.cuts else [] for c in clips}
    info |= {} if clips[0].cuts else {"changes": {c.key: list(c.starts[1:]) for c in clips}}
    for key in () if found.get("fingerprint") == mark else set(found.get("clips", ())) - set(info["clips"]):
        (folder / f"{key}.mp4").unlink(missing_ok=True)
    if found != info:  # under a name of its own first: other parts may be at it
        part_file = folder / f".set.{os.getpid()}.json"
        write_json(part_file, info)
        part_file.replace(folder / "set.json")
    mine = clips[part[0] :: part[1]]
    missing = [c for c in mine if _maker(folder, c.key) != mark]
    done(len(mine) - len(missing))
    for i in range(0, len(missing), batch):
        group = missing[i : i + batch]
        for clip, video in zip(group, make(group), strict=True):
            (folder / f"{clip.key}.mp4").unlink(missing_ok=True)  # made by something else: its cameras.npz says what
            with atomic(folder / f"{clip.key}.cameras.npz") as file:
                np.savez(file, c2w=clip.c2w, intrinsics=clip.intrinsics, made_by=np.frombuffer(mark.encode(), np.uint8))
            with atomic(folder / f"{clip.key}.mp4") as file:  # last: a video that is there is whole
                file.write(video if isinstance(video, bytes) else encode_video(video, fps, crf=CRF))
            done(1)
    return VideoSet(folder, tuple(c.key for c in clips), info)


def _maker(folder: Path, key: str) -> str | None:
    """Fingerprint of what made a video of ours; None where there is none."""
    cameras = folder / f"{key}.cameras.npz"
    if not (folder / f"{key}.mp4").is_file() or not cameras.is_file():
        return None
    with np.load(cameras, allow_pickle=False) as file:
        return file["made_by"].tobytes().decode() if "made_by" in file else None


def timings(folder: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of timings.json, if they are of the videos that stand there, or of a set.json made elsewhere."""
    path = folder / "timings.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found["timings"] if found.get("fingerprint", "") == info.get("fingerprint") else info.get("timings", [])
