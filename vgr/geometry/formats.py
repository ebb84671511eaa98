"""Pose files of others, converted at the border (specs/benchmarks 4, specs/world-model 4.1, 8 and 9.1).

  vgr            npz: c2w (F,4,4), intrinsics (F,4), fps; what shards, sets and vgr-sample write
  sana_wm_bench  npz: c2w (F,4,4), intrinsics (F,3,3) in pixels of the source image, fps, num_frames
  kitti          text: the 12 numbers of a 3x4 camera-to-world matrix a line
  tum            text: time (s) tx ty tz qx qy qz qw a line, camera-to-world
  realestate10k  text (CameraCtrl's too): a title line, then time (us) fx fy cx cy 0 0 and a 3x4 world-to-camera
                 matrix a line; intrinsics divided by the image's size
  colmap         a folder with cameras and images, .bin or .txt, or one of these: world-to-camera, ordered by name
  nerf           transforms.json of NeRF, instant-ngp and nerfstudio: camera-to-world with OpenGL axes

Only kitti's and tum's own recordings, the bench and ours are in metres; the rest is in units of its own. The world
model's published zips hold the cameras of many clips: `vgr.geometry.published`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from vgr.geometry.camera_file import (
    Array,
    CameraFile,
    Size,
    arrays,
    camera_file,
    inverse,
    known_size,
    lines,
    natural,
    normalised,
    numbers,
    one_size,
    rotations,
    square,
    text,
)  # fmt: skip
from vgr.geometry.cameras import crop_intrinsics, interpolate, relative_to_first
from vgr.geometry.checks import check_cameras
from vgr.geometry.colmap_files import read_colmap, write_colmap
from vgr.types import Cameras

_COLUMNS = {12: "kitti", 8: "tum", 19: "realestate10k"}


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


def write_cameras(
    path: str | Path, cameras: Cameras, fps: float, format: str = "vgr", *, size_hw: Size = None
) -> None:
    """Write the first video of `cameras` (B,F) in any of the module's formats; kitti and tum hold poses only.

    colmap writes a folder, in text. size_hw: height and width in pixels of the images, for sana_wm_bench, colmap and
    nerf, whose intrinsics are in pixels. ValueError for a format or size that is missing, and for intrinsics that are
    not finite where the format holds them.
    """
    path = Path(path)
    if format not in _WRITERS:
        raise ValueError(f"cannot write camera format {format!r}; it can be {', '.join(_WRITERS)}")
    if format in ("sana_wm_bench", "colmap", "nerf") and (size_hw is None or min(size_hw) < 1):
        raise ValueError(f"{format} holds intrinsics in pixels: give size_hw=(height, width); got {size_hw}")
    c2w, k = (x[0].double().cpu().numpy() for x in (cameras.c2w, cameras.intrinsics))
    if format not in ("kitti", "tum") and not np.isfinite(k).all():
        raise ValueError(f"{format} holds intrinsics and these are not finite; kitti and tum hold poses only")
    _WRITERS[format](path, c2w, k, fps, size_hw)


def follow(
    file: CameraFile, fps: float, size_hw: tuple[int, int], longest: int, own: Tensor, *, name: str, scale: float = 1.0,
    own_lens: bool = False,
) -> tuple[Tensor, Tensor]:
    """Poses (F,4,4) from the first one on and intrinsics (F,4) of a pose file, at another rate and picture size.

    Without times the file's poses are taken one a frame. Its intrinsics follow its pictures when they are cut to the
    shape of size_hw as a first frame is; `own` (4,) stands in where it has none or own_lens. scale: metres of a unit.
    longest: frames at most. ValueError beginning with `name` for what cannot be followed.
    """
    c2w, k = file.c2w[0], file.intrinsics[0]
    if file.size_hw is not None:
        (height, width), (h, w) = file.size_hw, size_hw
        ratio = min(height / h, width / w)
        k = crop_intrinsics(k, file.size_hw, ((height - h * ratio) / 2, (width - w * ratio) / 2, h * ratio, w * ratio))
    if own_lens or bool(k.isnan().all()):
        k = own.expand(len(c2w), 4)
    try:  # before poses are taken between the file's: a bad one would get another number, or be hidden
        check_cameras(Cameras(c2w[None], k[None]), fps, size_hw)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be a number, the metres of one unit of the pose file")
    seconds = (len(c2w) - 1) / fps if file.times is None else float(file.times[-1])
    shown = 1 + math.floor(seconds * fps + 1e-6)
    if not 2 <= shown <= longest:
        raise ValueError(
            f"{name} holds {len(c2w)} poses over {seconds:.2f} s, {shown} frames at {fps:g} a second; "
            f"this model makes 2 to {longest} frames, so cut the file"
        )
    c2w = relative_to_first(c2w)
    c2w[:, :3, 3] *= scale
    if file.times is not None:
        new = (torch.arange(shown, dtype=torch.float64) / fps).clamp(max=seconds)
        c2w = interpolate(c2w, file.times, new)
        k = torch.from_numpy(np.stack([np.interp(new, file.times, column) for column in k.T], axis=1))
    return c2w, k


def _pixels(k: Array, size_hw: tuple[int, int]) -> Array:
    return k * np.tile(size_hw[::-1], 2)


def _write_vgr(path: Path, c2w: Array, k: Array, fps: float, size_hw: Size) -> None:
    np.savez(path, c2w=c2w, intrinsics=k, fps=fps)


def _write_bench(path: Path, c2w: Array, k: Array, fps: float, size_hw: tuple[int, int]) -> None:
    K = np.tile(np.eye(3), (len(k), 1, 1))
    K[:, (0, 1, 0, 1), (0, 1, 2, 2)] = _pixels(k, size_hw)
    np.savez(path, c2w=c2w, intrinsics=K, fps=fps, num_frames=len(c2w))


def _write_kitti(path: Path, c2w: Array, k: Array, fps: float, size_hw: Size) -> None:
    np.savetxt(path, c2w[:, :3].reshape(-1, 12), fmt="%.17g")


def _write_tum(path: Path, c2w: Array, k: Array, fps: float, size_hw: Size) -> None:
    quaternions = Rotation.from_matrix(c2w[:, :3, :3]).as_quat(canonical=True)
    rows = [np.arange(len(c2w))[:, None] / fps, c2w[:, :3, 3], quaternions]
    np.savetxt(path, np.concatenate(rows, axis=-1), fmt="%.17g")


def _write_realestate(path: Path, c2w: Array, k: Array, fps: float, size_hw: Size) -> None:
    stamps = np.round(np.arange(len(c2w))[:, None] / fps * 1e6)
    rows = [stamps, k, np.zeros((len(k), 2)), inverse(c2w[:, :3])[:, :3].reshape(-1, 12)]
    np.savetxt(path, np.concatenate(rows, axis=-1), fmt="%.17g", header="vgr", comments="")


def _write_nerf(path: Path, c2w: Array, k: Array, fps: float, size_hw: tuple[int, int]) -> None:
    frames = [
        {"file_path": f"images/frame_{i:06d}.png", "transform_matrix": pose.tolist(),
         **dict(zip(("fl_x", "fl_y", "cx", "cy"), lens.tolist()))}
        for i, (pose, lens) in enumerate(zip(c2w * (1.0, -1.0, -1.0, 1.0), _pixels(k, size_hw)))
    ]  # fmt: skip
    path.write_text(json.dumps({"w": size_hw[1], "h": size_hw[0], "frames": frames}, indent=1))


def _guess(path: Path) -> str:
    if path.is_dir() or path.stem in ("images", "cameras") and path.suffix in (".txt", ".bin"):
        return "colmap"
    if path.suffix == ".json":
        return "nerf"
    if path.suffix == ".npz":
        return "sana_wm_bench" if _camera_arrays(path)["intrinsics"].ndim == 3 else "vgr"
    for _, words in list(lines(path))[:2]:  # the first may be a title
        if len(words) in _COLUMNS:
            return _COLUMNS[len(words)]
    raise ValueError(f"{path}: none of the camera formats {', '.join(_READERS)}")


def _camera_arrays(path: Path) -> dict[str, Array]:
    """c2w, intrinsics and, where they are there, fps and num_frames."""
    found = arrays(path, {"c2w", "intrinsics", "fps", "num_frames"}, np.float64)
    if missing := {"c2w", "intrinsics"} - set(found):
        raise ValueError(f"{path}: holds no {' and no '.join(sorted(missing))}; needs c2w (F,4,4) and intrinsics")
    return found


def _read_npz(path: Path, size_hw: Size, pixels: bool) -> CameraFile:
    found = _camera_arrays(path)
    c2w, k, fps = found["c2w"], found["intrinsics"], found.get("fps")
    frames, each = (len(c2w) if c2w.ndim else 0), ((3, 3) if pixels else (4,))
    count = found.get("num_frames", np.array(frames))
    if c2w.shape != (frames, 4, 4) or k.shape != (frames, *each) or (count != frames).any():
        raise ValueError(
            f"{path}: c2w {c2w.shape}, intrinsics {k.shape}, num_frames {count}; needs c2w (F,4,4), intrinsics "
            f"({'F,3,3' if pixels else 'F,4'}) and, if at all, num_frames = F"
        )
    if fps is not None and not (fps.size == 1 and 0 < fps < math.inf):
        raise ValueError(f"{path}: fps is {fps}; it must be one number > 0")
    if pixels:
        height, width = size_hw = known_size(size_hw, path)
        k = np.stack([k[:, 0, 0] / width, k[:, 1, 1] / height, k[:, 0, 2] / width, k[:, 1, 2] / height], axis=1)
    return camera_file(path, c2w, k, None if fps is None else np.arange(frames) / fps, size_hw if pixels else None)


def _table(path: Path, what: str, count: int) -> tuple[Array, list[str]]:
    """The file's lines as (F,count), and what to call them."""
    told = list(lines(path))
    if count == 19 and told and len(told[0][1]) != count:  # RealEstate10K's title
        told = told[1:]
    where = [f"{path}: line {number}" for number, _ in told]
    rows = [numbers(at, words, count, what) for at, (_, words) in zip(where, told)]
    return np.array(rows, np.float64).reshape(-1, count), where


def _increasing(times: Array, where: list[str]) -> Array:
    for i in np.flatnonzero(np.diff(times) <= 0):
        raise ValueError(f"{where[i + 1]}: time {times[i + 1]:.12g} does not follow {times[i]:.12g}")
    return times


def _read_kitti(path: Path, size_hw: Size) -> CameraFile:
    return camera_file(path, square(_table(path, "a 3x4 matrix by rows", 12)[0].reshape(-1, 3, 4)))


def _read_tum(path: Path, size_hw: Size) -> CameraFile:
    rows, where = _table(path, "time tx ty tz qx qy qz qw", 8)
    top = np.concatenate([rotations(rows[:, [7, 4, 5, 6]], where), rows[:, 1:4, None]], axis=2)
    return camera_file(path, square(top), times=_increasing(rows[:, 0], where))


def _read_realestate(path: Path, size_hw: Size) -> CameraFile:
    rows, where = _table(path, "time fx fy cx cy 0 0 and a 3x4 matrix by rows", 19)
    for i in np.flatnonzero(rows[:, 5:7].any(axis=1)):
        raise ValueError(f"{where[i]}: columns 6 and 7, lens distortion, must be 0; undistort the images first")
    # Frame numbers or zeros may stand in the column of microseconds: they tell no time.
    timed = len(rows) > 1 and abs(rows[-1, 0] - rows[0, 0]) >= 1000 * (len(rows) - 1)
    times = _increasing(rows[:, 0] * 1e-6, where) if timed else None
    return camera_file(path, inverse(rows[:, 7:].reshape(-1, 3, 4)), rows[:, 1:5], times, size_hw)


def _read_nerf(path: Path, size_hw: Size) -> CameraFile:
    try:
        top = json.loads(text(path))
        frames = top.pop("frames")
        if all("file_path" in frame for frame in frames):
            frames.sort(key=lambda frame: natural(frame["file_path"]))
        rows = [[v for row in frame["transform_matrix"][:3] for v in row] for frame in frames]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: needs an object with frames, each with a transform_matrix ({error!r})") from error
    where = [f"{path}: frame {frame.get('file_path', i)}" for i, frame in enumerate(frames)]
    c2w = [numbers(at, row, 12, "the upper rows of transform_matrix") for at, row in zip(where, rows)]
    k, size = one_size(path, [_nerf_lens(at, {**top, **f}, size_hw, path) for at, f in zip(where, frames)])
    # OpenGL's camera looks along -z with y up: the camera is turned, not the world.
    return camera_file(path, square(np.array(c2w).reshape(-1, 3, 4) * (1.0, -1.0, -1.0, 1.0)), k, None, size)


def _nerf_lens(where: str, given: dict[str, Any], size_hw: Size, path: Path) -> tuple[list[float], Size]:
    if "fl_x" not in given and "camera_angle_x" not in given:
        return [math.nan] * 4, None
    if given.get("camera_model", "OPENCV") not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
        raise ValueError(f"{where}: camera_model {given['camera_model']}; only OPENCV and pinhole cameras can be taken")
    names = [n for n in (*_NERF_LENS, *_NERF_DISTORTION) if n in given]
    v = dict(zip(names, numbers(where, [given[n] for n in names], len(names), " ".join(names))))
    height, width = (v["h"], v["w"]) if "h" in v and "w" in v else known_size(size_hw, path)

    def focal(axis: str, size: float, otherwise: float) -> float:
        angle = v.get(f"camera_angle_{axis}")
        return v.get(f"fl_{axis}", otherwise if angle is None else size / 2 / max(math.tan(angle / 2), 1e-9))

    fx = focal("x", width, math.nan)
    pixels = [fx, focal("y", height, fx), v.get("cx", width / 2), v.get("cy", height / 2)]
    return normalised(where, pixels, [v.get(n, 0.0) for n in _NERF_DISTORTION], height, width)


_NERF_LENS = ("w", "h", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "cx", "cy")
_NERF_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_READERS: dict[str, Callable[[Path, Size], CameraFile]] = {
    "vgr": partial(_read_npz, pixels=False), "sana_wm_bench": partial(_read_npz, pixels=True), "kitti": _read_kitti,
    "tum": _read_tum, "realestate10k": _read_realestate, "colmap": read_colmap, "nerf": _read_nerf,
}  # fmt: skip
_WRITERS: dict[str, Callable[..., None]] = {
    "vgr": _write_vgr, "sana_wm_bench": _write_bench, "kitti": _write_kitti, "tum": _write_tum,
    "realestate10k": _write_realestate, "colmap": write_colmap, "nerf": _write_nerf,
}  # fmt: skip
