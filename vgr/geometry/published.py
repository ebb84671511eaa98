"""Cameras of the world model's published zips (specs/world-model 8): sidecars that hold many clips."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vgr.geometry import camera_file as files
from vgr.geometry.camera_file import MAX_BYTES, UNREADABLE, CameraFile, arrays, camera_file, normalised, text


class PublishedZip:
    """A raw zip's clips by key, `keys`: cameras in metres, intrinsics divided by the size that <key>.json tells.

    Beside x.zip stand x_camera.npz with ids (N,), ranges (N,2) of first row and count, pose (M,4,4) camera-to-world and
    intrinsics (M,4) in pixels, and x_metric_scale_stats.json, metres of a unit by key (a number, or an object with
    median). A key whose scale or size is missing is refused: the published loader takes 1 and a guess.
    ValueError names the file and the key; OSError where there is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        sidecar, scales = (self.path.with_name(self.path.stem + end) for end in
                           ("_camera.npz", "_metric_scale_stats.json"))  # fmt: skip
        found = arrays(sidecar, {"ids", "ranges", "pose", "intrinsics"})
        shapes = {name: array.shape for name, array in found.items()}
        clips, rows = len(found.get("ids", ())), len(found.get("pose", ()))
        if shapes != {"ids": (clips,), "ranges": (clips, 2), "pose": (rows, 4, 4), "intrinsics": (rows, 4)}:
            needed = "ids (N,), ranges (N,2), pose (M,4,4) and intrinsics (M,4)"
            raise ValueError(f"{sidecar}: holds {shapes}; needs {needed}")
        try:
            self._pose, self._pixels = (found[name].astype(np.float64) for name in ("pose", "intrinsics"))
            self._rows = dict(zip(found["ids"].astype(str).tolist(), found["ranges"].astype(int).tolist()))
            self._metres = json.loads(text(scales))
            with zipfile.ZipFile(self.path):
                self.keys = list(self._rows)
        except FileNotFoundError:
            raise
        except UNREADABLE as error:
            raise ValueError(f"{self.path} and its sidecars: {error!r}") from error

    def info(self, key: str) -> dict[str, Any]:
        """<key>.json of the zip."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                if archive.getinfo(f"{key}.json").file_size > MAX_BYTES:
                    raise ValueError(f"{key}.json: more than {MAX_BYTES >> 20} MiB")
                return dict(json.loads(files.unpacked(archive, f"{key}.json")))
        except UNREADABLE as error:
            raise ValueError(f"{self.path}: {error!r}") from error

    def cameras(self, key: str) -> CameraFile:
        """Of one clip."""
        told = self.info(key)
        try:
            start, count = self._rows[key]
            if start < 0 or count < 1 or start + count > len(self._pose):
                raise ValueError(f"{key}: rows {start} to {start + count} of {len(self._pose)}")
            c2w, pixels = (x[start : start + count].copy() for x in (self._pose, self._pixels))
            metres = self._metres[key]
            scale = float(metres["median"] if isinstance(metres, dict) else metres)
            if not (0 < scale < np.inf):
                raise ValueError(f"{key}: {scale} metres a unit")
            size = float(told["height"]), float(told["width"])
            _, size_hw = normalised(key, [0.0] * 4, [], *size)
            c2w[:, :3, 3] *= scale
            return camera_file(self.path, c2w, pixels / np.tile(size[::-1], 2), None, size_hw)
        except UNREADABLE as error:
            raise ValueError(f"{self.path} and its sidecars: {key}: {error!r}") from error


def read_published(path: str | Path) -> dict[str, CameraFile]:
    """Cameras by key of all clips of a `PublishedZip`, and its errors."""
    clips = PublishedZip(path)
    return {key: clips.cameras(key) for key in clips.keys}
