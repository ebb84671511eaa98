"""A *set*: a folder of videos, optional cameras, and a set.json saying who made it and how.

    <key>.mp4  <key>.cameras.npz (c2w (F,4,4), intrinsics (F,4))  set.json

set.json: {"format": 1, "made_by": {...}, "fingerprint": sha256 of made_by, "clips": [keys], "fps": ..., and
optionally "timings": [{"wall_s", "frames", "first_frame_s", "denoise_s"}]}. Only the videos are required of a set
that somebody else made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.data.files import atomic, write_json
from vgr.geometry.camera_file import arrays

Frames = NDArray[np.uint8]
CRF = 14  # of the videos we write; stated in set.json


class Clip(NamedTuple):
    """What is asked for: name, commanded cameras c2w (F,4,4), intrinsics (F,4), text and first frame of each shot."""

    key: str
    c2w: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    captions: tuple[str, ...]
    starts: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class VideoSet:
    """Videos by key, read when asked for. `info` is set.json, {} where there is none."""

    folder: Path
    keys: tuple[str, ...]
    info: dict[str, Any]

    def video(self, key: str, frames: int | None = None) -> tuple[Frames, float]:
        """(frames (F,H,W,3), frames a second); cut to `frames`. Raises ValueError when the video is shorter."""
        from vgr.data.video import read_video

        video, times = read_video(self.folder / f"{key}.mp4")
        if frames is not None and len(video) < frames:
            raise ValueError(f"{self.folder / key}.mp4 has {len(video)} frames, {frames} are measured; make it longer")
        fps = self.info.get("fps") or (len(times) - 1) / float(times[-1] - times[0])
        return video[:frames], float(fps)

    def cameras(self, key: str, frames: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """c2w (frames,4,4) and intrinsics (frames,4), or None if the set has none for this video."""
        path = self.folder / f"{key}.cameras.npz"
        if not path.is_file():
            return None
        found = arrays(path, {"c2w", "intrinsics"}, np.float64)
        shapes = {name: x.shape for name, x in found.items()}
        length = len(found.get("c2w", ()))
        if shapes != {"c2w": (length, 4, 4), "intrinsics": (length, 4)} or length < frames:
            raise ValueError(
                f"{path} holds {shapes}; {frames} frames are measured and need c2w (F,4,4) and intrinsics (F,4)"
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
    folder: Path,
    made_by: dict[str, Any],
    fps: float,
    clips: Sequence[Clip],
    make: Callable[[list[Clip]], Sequence[Frames | bytes]],
    *,
    batch: int = 8,
    done: Callable[[int], None],
) -> VideoSet:
    """Make the videos of a set that are not there yet and return it.

    make: clips -> frames (F,H,W,3), or the bytes of an mp4, each. Videos made by something else than
    `made_by` are made again; a folder with videos that no set.json of ours lists is refused. done(n) is
    called as videos stand, made or found.
    """
    from vgr.data.video import encode_video

    for clip in clips:
        if Path(clip.key).name != clip.key:
            raise ValueError(f"clip key {clip.key!r} cannot name a file; keys are plain names")
    info, mark = read_info(folder), fingerprint(made_by)
    if not info and any(folder.glob("*.mp4")):
        raise ValueError(f"{folder} holds videos without a set.json; choose another out= or move them")
    if info.get("fingerprint") != mark:
        for key in info.get("clips", []):
            (folder / f"{key}.mp4").unlink(missing_ok=True)
        info = {"format": 1, "made_by": made_by, "fingerprint": mark, "fps": fps, "crf": CRF}
    info |= {"clips": [c.key for c in clips], "captions": {c.key: c.captions for c in clips}}
    write_json(folder / "set.json", info)
    missing = [c for c in clips if not (folder / f"{c.key}.mp4").is_file()]
    done(len(clips) - len(missing))
    for i in range(0, len(missing), batch):
        group = missing[i : i + batch]
        for clip, video in zip(group, make(group), strict=True):
            with atomic(folder / f"{clip.key}.cameras.npz") as file:
                np.savez(file, c2w=clip.c2w, intrinsics=clip.intrinsics)
            with atomic(folder / f"{clip.key}.mp4") as file:  # last: a video that is there is whole
                file.write(video if isinstance(video, bytes) else encode_video(video, fps, crf=CRF))
            done(1)
    return VideoSet(folder, tuple(c.key for c in clips), info)
