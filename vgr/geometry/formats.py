"""Pose files of others, converted at the border (specs/benchmarks 4, specs/world-model 4.1 and 9.1).

  vgr            npz: c2w (F,4,4), intrinsics (F,4), fps; what shards, sets and vgr-sample write
  sana_wm_bench  npz: c2w (F,4,4), intrinsics (F,3,3) in pixels of the source image, fps, num_frames
  kitti          text: the 12 numbers of a 3x4 camera-to-world matrix a line
  tum            text: time (s) tx ty tz qx qy qz qw a line, camera-to-world
  realestate10k  text (CameraCtrl's too): a title line, then time (us) fx fy cx cy 0 0 and a 3x4 world-to-camera
                 matrix a line; intrinsics divided by the image's size
  colmap         a folder with cameras.txt and images.txt, or its images.txt: world-to-camera, ordered by name
  nerf           transforms.json of NeRF, instant-ngp and nerfstudio: camera-to-world with OpenGL axes

Only kitti's and tum's own recordings, the bench and ours are in metres; the rest is in units of its own.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from vgr.geometry.cameras import invert
from vgr.types import Cameras

Array = NDArray[np.float64]
Size = tuple[int, int] | None

_MAX_BYTES, _MAX_POSES = 256 << 20, 200_000
_UNREADABLE = (
    ValueError, TypeError, OSError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
_COLUMNS = {12: "kitti", 8: "tum", 19: "realestate10k"}
# focal lengths among the parameters, then their count; those after the two centre coordinates are distortion
_COLMAP = {
    "SIMPLE_PINHOLE": (1, 3), "PINHOLE": (2, 4), "SIMPLE_RADIAL": (1, 4), "RADIAL": (1, 5), "OPENCV": (2, 8),
    "FULL_OPENCV": (2, 12),
}  # fmt: skip


@dataclass(frozen=True)
class CameraFile(Cameras):
    """Cameras (1,F) float64 as a pose file has them; intrinsics are NaN where it has none.

    times (F,): seconds from the first pose, or None. size_hw: the images that the intrinsics belong to, in
    pixels, or None where the file does not depend on it.
    """

    times: Tensor | None = None
    size_hw: Size = None

    @property
    def fps(self) -> float | None:
        """Poses a second, on average; None without times or with a single pose."""
        if self.times is None or len(self.times) < 2:
            return None
        return (len(self.times) - 1) / float(self.times[-1])


def read_cameras(path: str | Path, format: str = "auto", *, size_hw: Size = None) -> CameraFile:
    """The cameras of a pose file in the house's convention: OpenCV camera-to-world, intrinsics divided by the size.

    format: a row of the module's table; "auto" goes by the name and the number of columns. size_hw: height and
    width in pixels of the images, for files whose intrinsics need it and that do not tell. ValueError names the
    file with the line or frame that is wrong, or lists the formats; OSError where there is no file. Whether a
    model can take the cameras is for `vgr.geometry.checks.check_cameras`.
    """
    path = Path(path)
    name = _guess(path) if format == "auto" else format
    if name not in _READERS:
        raise ValueError(f"unknown camera format {format!r}; known: auto, {', '.join(_READERS)}")
    return _READERS[name](path, size_hw)


def write_cameras(path: str | Path, cameras: Cameras, fps: float, format: str = "vgr") -> None:
    """Write the first video of `cameras` (B,F) as vgr, kitti (poses only) or tum (poses and times)."""
    c2w = cameras.c2w[0].double().cpu()
    if format == "vgr":
        np.savez(path, c2w=c2w.numpy(), intrinsics=cameras.intrinsics[0].double().cpu().numpy(), fps=fps)
    elif format == "kitti":
        np.savetxt(path, c2w[:, :3].flatten(1).numpy(), fmt="%.17g")
    elif format == "tum":
        quaternions = Rotation.from_matrix(c2w[:, :3, :3].numpy()).as_quat(canonical=True)
        rows = [np.arange(len(c2w))[:, None] / fps, c2w[:, :3, 3].numpy(), quaternions]
        np.savetxt(path, np.concatenate(rows, axis=-1), fmt="%.17g")
    else:
        raise ValueError(f"cannot write camera format {format!r}; it can be vgr, kitti or tum")


def _guess(path: Path) -> str:
    if path.is_dir() or path.name in ("images.txt", "cameras.txt"):
        return "colmap"
    if path.suffix == ".json":
        return "nerf"
    if path.suffix == ".npz":
        return "sana_wm_bench" if _arrays(path)["intrinsics"].ndim == 3 else "vgr"
    for _, words in list(_lines(path))[:2]:  # the first may be a title
        if len(words) in _COLUMNS:
            return _COLUMNS[len(words)]
    raise ValueError(f"{path}: none of the camera formats {', '.join(_READERS)}")


def _result(
    path: Path, c2w: Array, k: Array | None = None, times: Array | None = None, size_hw: Size = None
) -> CameraFile:
    """From c2w (F,4,4), k (F,4) and times (F,)."""
    frames = len(c2w)
    if not 0 < frames <= _MAX_POSES:
        raise ValueError(f"{path}: {frames} poses; it must hold 1 to {_MAX_POSES}")
    intrinsics = torch.from_numpy(np.full((frames, 4), math.nan) if k is None else k)
    seconds = None if times is None else torch.from_numpy(times - times[0])
    return CameraFile(torch.from_numpy(c2w)[None], intrinsics[None], seconds, size_hw)


def _square(top_F34: Array) -> Array:
    return np.concatenate([top_F34, np.tile([[[0.0, 0.0, 0.0, 1.0]]], (len(top_F34), 1, 1))], axis=1)


def _from_world(w2c_F34: Array) -> Array:
    return invert(torch.from_numpy(_square(w2c_F34))).numpy()


def _arrays(path: Path) -> dict[str, Array]:
    """c2w, intrinsics and, where they are there, fps and num_frames; sizes are checked before anything is read."""
    path.stat()  # OSError for a missing file; those below speak of its content
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_BYTES:
                raise ValueError(f"more than {_MAX_BYTES >> 20} MiB")
        with np.load(path, allow_pickle=False) as file:
            names = {"c2w", "intrinsics", "fps", "num_frames"} & set(file)
            found = {name: np.asarray(file[name], np.float64) for name in names}
    except _UNREADABLE as error:
        raise ValueError(f"{path}: no npz of cameras that can be read ({error})") from error
    if missing := {"c2w", "intrinsics"} - set(found):
        raise ValueError(f"{path}: holds no {' and no '.join(sorted(missing))}; needs c2w (F,4,4) and intrinsics")
    return found


def _read_npz(path: Path, size_hw: Size, pixels: bool) -> CameraFile:
    arrays = _arrays(path)
    c2w, k, fps = arrays["c2w"], arrays["intrinsics"], arrays.get("fps")
    frames, each = (len(c2w) if c2w.ndim else 0), ((3, 3) if pixels else (4,))
    count = arrays.get("num_frames", np.array(frames))
    if c2w.shape != (frames, 4, 4) or k.shape != (frames, *each) or (count != frames).any():
        raise ValueError(
            f"{path}: c2w {c2w.shape}, intrinsics {k.shape}, num_frames {count}; needs c2w (F,4,4), intrinsics "
            f"({'F,3,3' if pixels else 'F,4'}) and, if at all, num_frames = F"
        )
    if fps is not None and not (fps.size == 1 and 0 < fps < math.inf):
        raise ValueError(f"{path}: fps is {fps}; it must be one number > 0")
    if pixels:
        height, width = size_hw = _known(size_hw, path)
        k = np.stack([k[:, 0, 0] / width, k[:, 1, 1] / height, k[:, 0, 2] / width, k[:, 1, 2] / height], axis=1)
    return _result(path, c2w, k, None if fps is None else np.arange(frames) / fps, size_hw if pixels else None)


def _known(size_hw: Size, path: Path) -> tuple[int, int]:
    if size_hw is None or min(size_hw) < 1:
        raise ValueError(
            f"{path}: its intrinsics need the size of its images, which it does not tell; give size_hw=(height, width) "
            "in pixels (vgr-sample takes it from first_frame=<one of the images>)"
        )
    return size_hw


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: more than {_MAX_BYTES >> 20} MiB")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text ({error.reason}); camera formats: {', '.join(_READERS)}") from error


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and words of every line that is neither empty nor a comment."""
    for number, line in enumerate(_text(path).splitlines(), start=1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield number, words


def _numbers(where: str, words: list[Any], count: int, what: str) -> list[float]:
    try:
        values = [float(w) for w in words]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f"{where}: needs {count} finite numbers, {what}; got {' '.join(map(str, words))[:80]!r}")
    return values


def _table(path: Path, what: str, count: int) -> tuple[Array, list[str]]:
    """The file's lines as (F,count), and what to call them."""
    lines = list(_lines(path))
    if count == 19 and lines and len(lines[0][1]) != count:  # RealEstate10K's title
        lines = lines[1:]
    where = [f"{path}: line {number}" for number, _ in lines]
    rows = [_numbers(at, words, count, what) for at, (_, words) in zip(where, lines)]
    return np.array(rows, np.float64).reshape(-1, count), where


def _increasing(times: Array, where: list[str]) -> Array:
    for i in np.flatnonzero(np.diff(times) <= 0):
        raise ValueError(f"{where[i + 1]}: time {times[i + 1]:.12g} does not follow {times[i]:.12g}")
    return times


def _read_kitti(path: Path, size_hw: Size) -> CameraFile:
    return _result(path, _square(_table(path, "a 3x4 matrix by rows", 12)[0].reshape(-1, 3, 4)))


def _read_tum(path: Path, size_hw: Size) -> CameraFile:
    rows, where = _table(path, "time tx ty tz qx qy qz qw", 8)
    top = np.concatenate([_rotations(rows[:, [7, 4, 5, 6]], where), rows[:, 1:4, None]], axis=2)
    return _result(path, _square(top), times=_increasing(rows[:, 0], where))


def _read_realestate(path: Path, size_hw: Size) -> CameraFile:
    rows, where = _table(path, "time fx fy cx cy 0 0 and a 3x4 matrix by rows", 19)
    for i in np.flatnonzero(rows[:, 5:7].any(axis=1)):
        raise ValueError(f"{where[i]}: columns 6 and 7, lens distortion, must be 0; undistort the images first")
    # Frame numbers or zeros may stand in the column of microseconds: they tell no time.
    timed = len(rows) > 1 and abs(rows[-1, 0] - rows[0, 0]) >= 1000 * (len(rows) - 1)
    times = _increasing(rows[:, 0] * 1e-6, where) if timed else None
    return _result(path, _from_world(rows[:, 7:].reshape(-1, 3, 4)), rows[:, 1:5], times, size_hw)


def _rotations(wxyz_F4: Array, where: list[str]) -> Array:
    """Rotation matrices (F,3,3) of quaternions that are of unit length up to their decimals."""
    length = np.linalg.norm(wxyz_F4, axis=1)
    for i in np.flatnonzero(np.abs(length - 1) > 1e-2):
        raise ValueError(f"{where[i]}: a rotation's quaternion has length 1, not {length[i]:.4g}; wrong columns?")
    q = wxyz_F4 / length[:, None]
    hat = -np.cross(q[:, None, 1:], np.eye(3))
    return np.eye(3) + 2 * q[:, :1, None] * hat + 2 * hat @ hat


def _natural(name: str) -> list[str | int]:
    """A key that sorts frame_9 before frame_10."""
    return [int(p) if i % 2 else p for i, p in enumerate(re.split(r"([0-9]+)", name))]


def _read_colmap(path: Path, size_hw: Size) -> CameraFile:
    folder = path if path.is_dir() else path.parent
    images, cameras = folder / "images.txt", folder / "cameras.txt"
    if not (images.is_file() and cameras.is_file()):
        raise ValueError(
            f"{folder}: holds no images.txt and cameras.txt; `colmap model_converter --output_type TXT` writes them"
        )
    lenses = {words[0]: _colmap_lens(f"{cameras}: line {n}", words) for n, words in _lines(cameras)}
    rows, points_follow = [], False
    for number, line in enumerate(_text(images).splitlines(), start=1):
        if points_follow or not line.strip() or line.startswith("#"):  # the line of an image's points may be empty
            points_follow = False
            continue
        words, where = line.split(maxsplit=9), f"{images}: line {number}"
        if len(words) != 10 or words[8] not in lenses:
            raise ValueError(f"{where}: needs IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, a camera of {cameras}")
        rows.append((_natural(words[9]), _numbers(where, words[1:8], 7, "QW QX QY QZ TX TY TZ"), words[8], where))
        points_follow = True
    rows.sort()
    poses = np.array([pose for _, pose, _, _ in rows], np.float64).reshape(-1, 7)
    w2c = np.concatenate([_rotations(poses[:, :4], [at for *_, at in rows]), poses[:, 4:, None]], axis=2)
    k, size = _one_size(images, [lenses[camera] for _, _, camera, _ in rows])
    return _result(images, _from_world(w2c), k, None, size)


def _colmap_lens(where: str, words: list[str]) -> tuple[list[float], Size]:
    if len(words) < 4 or words[1] not in _COLMAP:
        raise ValueError(f"{where}: needs CAMERA_ID MODEL WIDTH HEIGHT and parameters; MODEL: {', '.join(_COLMAP)}")
    focals, count = _COLMAP[words[1]]
    width, height, *p = _numbers(where, words[2:], 2 + count, f"WIDTH HEIGHT and those of {words[1]}")
    return _normalised(where, [p[0], p[focals - 1], *p[focals : focals + 2]], p[focals + 2 :], height, width)


def _normalised(
    where: str, pixels: list[float], distortion: list[float], height: float, width: float
) -> tuple[list[float], Size]:
    """fx, fy, cx, cy divided by the size, and the size. COLMAP's and NeRF's pixels start at the edge, as ours do."""
    if any(distortion):
        raise ValueError(f"{where}: lens distortion {distortion}; cameras here have none, undistort the images first")
    if min(height, width) < 1:
        raise ValueError(f"{where}: images of {width:g}x{height:g} pixels")
    return [v / s for v, s in zip(pixels, (width, height) * 2)], (int(height), int(width))


def _one_size(path: Path, lenses: list[tuple[list[float], Size]]) -> tuple[Array, Size]:
    sizes = {size for _, size in lenses}
    if len(sizes) > 1:
        raise ValueError(f"{path}: images of several sizes (height, width), {sizes}; a path needs one")
    return np.array([k for k, _ in lenses], np.float64).reshape(-1, 4), next(iter(sizes), None)


def _read_nerf(path: Path, size_hw: Size) -> CameraFile:
    try:
        top = json.loads(_text(path))
        frames = top.pop("frames")
        if all("file_path" in frame for frame in frames):
            frames.sort(key=lambda frame: _natural(frame["file_path"]))
        rows = [[v for row in frame["transform_matrix"][:3] for v in row] for frame in frames]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: needs an object with frames, each with a transform_matrix ({error!r})") from error
    where = [f"{path}: frame {frame.get('file_path', i)}" for i, frame in enumerate(frames)]
    c2w = [_numbers(at, row, 12, "the upper rows of transform_matrix") for at, row in zip(where, rows)]
    k, size = _one_size(path, [_nerf_lens(at, {**top, **f}, size_hw, path) for at, f in zip(where, frames)])
    # OpenGL's camera looks along -z with y up: the camera is turned, not the world.
    return _result(path, _square(np.array(c2w).reshape(-1, 3, 4) * (1.0, -1.0, -1.0, 1.0)), k, None, size)


def _nerf_lens(where: str, given: dict[str, Any], size_hw: Size, path: Path) -> tuple[list[float], Size]:
    if "fl_x" not in given and "camera_angle_x" not in given:
        return [math.nan] * 4, None
    if given.get("camera_model", "OPENCV") not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
        raise ValueError(f"{where}: camera_model {given['camera_model']}; only OPENCV and pinhole cameras can be taken")
    names = [n for n in (*_NERF_LENS, *_NERF_DISTORTION) if n in given]
    v = dict(zip(names, _numbers(where, [given[n] for n in names], len(names), " ".join(names))))
    height, width = (v["h"], v["w"]) if "h" in v and "w" in v else _known(size_hw, path)

    def focal(axis: str, size: float, otherwise: float) -> float:
        angle = v.get(f"camera_angle_{axis}")
        return v.get(f"fl_{axis}", otherwise if angle is None else size / 2 / max(math.tan(angle / 2), 1e-9))

    fx = focal("x", width, math.nan)
    pixels = [fx, focal("y", height, fx), v.get("cx", width / 2), v.get("cy", height / 2)]
    return _normalised(where, pixels, [v.get(n, 0.0) for n in _NERF_DISTORTION], height, width)


_NERF_LENS = ("w", "h", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "cx", "cy")
_NERF_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_READERS: dict[str, Callable[[Path, Size], CameraFile]] = {
    "vgr": partial(_read_npz, pixels=False), "sana_wm_bench": partial(_read_npz, pixels=True), "kitti": _read_kitti,
    "tum": _read_tum, "realestate10k": _read_realestate, "colmap": _read_colmap, "nerf": _read_nerf,
}  # fmt: skip
