"""Cameras of the world model's published zips (specs/world-model 8): sidecars that hold many clips."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vgr.geometry import camera_file as files
from vgr.geometry.camera_file import MAX_BYTES, UNREADABLE, Array, CameraFile, arrays, camera_file, normalised, text


def read_published(path: str | Path) -> dict[str, CameraFile]:
    """Cameras by key of a raw zip: camera-to-world in metres, intrinsics divided by the size that <key>.json tells.

    Beside x.zip stand x_camera.npz with ids (N,), ranges (N,2) of first row and count, pose (M,4,4) camera-to-world and
    intrinsics (M,4) in pixels, and x_metric_scale_stats.json, metres of a unit by key (a number, or an object with
    median). A key whose scale or size is missing is refused: the published loader takes 1 and a guess.
    ValueError names the file and the key; OSError where there is none.
    """
    path = Path(path)
    sidecar, scales = (path.with_name(path.stem + end) for end in ("_camera.npz", "_metric_scale_stats.json"))
    found = arrays(sidecar, {"ids", "ranges", "pose", "intrinsics"})
    shapes = {name: array.shape for name, array in found.items()}
    clips, rows = len(found.get("ids", ())), len(found.get("pose", ()))
    if shapes != {"ids": (clips,), "ranges": (clips, 2), "pose": (rows, 4, 4), "intrinsics": (rows, 4)}:
        raise ValueError(f"{sidecar}: holds {shapes}; needs ids (N,), ranges (N,2), pose (M,4,4) and intrinsics (M,4)")
    cameras: dict[str, CameraFile] = {}
    try:
        metres = json.loads(text(scales))
        pose, pixels = (found[name].astype(np.float64) for name in ("pose", "intrinsics"))
        with zipfile.ZipFile(path) as archive:
            for key, (start, count) in zip(found["ids"].astype(str).tolist(), found["ranges"].astype(int).tolist()):
                if start < 0 or count < 1 or start + count > rows:
                    raise ValueError(f"{key}: rows {start} to {start + count} of {rows}")
                here = slice(start, start + count)
                cameras[key] = _clip(path, key, pose[here], pixels[here], metres, archive)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path} and its sidecars: {error!r}") from error
    return cameras


def _clip(
    path: Path, key: str, c2w: Array, pixels: Array, metres: dict[str, Any], archive: zipfile.ZipFile
) -> CameraFile:
    if archive.getinfo(f"{key}.json").file_size > MAX_BYTES:
        raise ValueError(f"{key}.json: more than {MAX_BYTES >> 20} MiB")
    told, scale = json.loads(files.unpacked(archive, f"{key}.json")), metres[key]
    scale = float(scale["median"] if isinstance(scale, dict) else scale)
    if not (0 < scale < np.inf):
        raise ValueError(f"{key}: {scale} metres a unit")
    size = float(told["height"]), float(told["width"])
    _, size_hw = normalised(key, [0.0] * 4, [], *size)
    c2w[:, :3, 3] *= scale
    return camera_file(path, c2w, pixels / np.tile(size[::-1], 2), None, size_hw)
