"""COLMAP's models as pose files: cameras and images, in text or binary, read; written as text.

World-to-camera, ordered by the images' names; pixels start at the image's edge, as ours do. Binary files are mapped,
not loaded, and every count in them is held against the file's length first.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from vgr.geometry.camera_file import (
    Array,
    CameraFile,
    Size,
    camera_file,
    inverse,
    lines,
    natural,
    normalised,
    numbers,
    one_size,
    rotations,
    text,
)  # fmt: skip

# focal lengths among the parameters, then their count; those after the two centre coordinates are distortion
_MODELS = {
    "SIMPLE_PINHOLE": (1, 3), "PINHOLE": (2, 4), "SIMPLE_RADIAL": (1, 4), "RADIAL": (1, 5), "OPENCV": (2, 8),
    "FULL_OPENCV": (2, 12),
}  # fmt: skip
_NUMBERED = {0: "SIMPLE_PINHOLE", 1: "PINHOLE", 2: "SIMPLE_RADIAL", 3: "RADIAL", 4: "OPENCV", 6: "FULL_OPENCV"}
_LONGEST_NAME = 4096
Lens = tuple[list[float], Size]
Image = tuple[str, list[float], str, str]  # name, QW QX QY QZ TX TY TZ, camera, where


def read_colmap(path: Path, size_hw: Size) -> CameraFile:
    """A folder with cameras and images, binary (COLMAP's own choice where both are there) or text, or one of those."""
    folder = path if path.is_dir() else path.parent
    for ending in (path.suffix,) if path.suffix in (".bin", ".txt") and not path.is_dir() else (".bin", ".txt"):
        cameras, images = folder / f"cameras{ending}", folder / f"images{ending}"
        if cameras.is_file() and images.is_file():
            break
    else:
        raise ValueError(f"{folder}: holds no cameras.bin and images.bin, and no cameras.txt and images.txt")
    lenses = (_binary_lenses if ending == ".bin" else _text_lenses)(cameras)
    rows = []
    for name, pose, camera, where in (_binary_images if ending == ".bin" else _text_images)(images):
        if camera not in lenses:
            raise ValueError(f"{where}: no camera {camera} in {cameras}")
        rows.append((natural(name), numbers(where, pose, 7, "QW QX QY QZ TX TY TZ"), lenses[camera], where))
    rows.sort(key=lambda row: row[0])
    poses = np.array([pose for _, pose, _, _ in rows], np.float64).reshape(-1, 7)
    w2c = np.concatenate([rotations(poses[:, :4], [at for *_, at in rows]), poses[:, 4:, None]], axis=2)
    k, size = one_size(images, [lens for _, _, lens, _ in rows])
    return camera_file(images, inverse(w2c), k, None, size)


def _lens(where: str, model: str, width: float, height: float, p: list[float]) -> Lens:
    focals = _MODELS[model][0]
    return normalised(where, [p[0], p[focals - 1], *p[focals : focals + 2]], p[focals + 2 :], height, width)


def _text_lenses(path: Path) -> dict[str, Lens]:
    lenses = {}
    for number, words in lines(path):
        where = f"{path}: line {number}"
        if len(words) < 4 or words[1] not in _MODELS:
            raise ValueError(f"{where}: needs CAMERA_ID MODEL WIDTH HEIGHT and parameters; MODEL: {', '.join(_MODELS)}")
        count = 2 + _MODELS[words[1]][1]
        values = numbers(where, words[2:], count, f"WIDTH HEIGHT and those of {words[1]}")
        lenses[words[0]] = _lens(where, words[1], values[0], values[1], values[2:])
    return lenses


def _text_images(path: Path) -> Iterator[Image]:
    points_follow = False
    for number, line in enumerate(text(path).splitlines(), start=1):
        if points_follow or not line.strip() or line.startswith("#"):  # the line of an image's points may be empty
            points_follow = False
            continue
        words, where = line.split(maxsplit=9), f"{path}: line {number}"
        if len(words) != 10:
            raise ValueError(f"{where}: needs IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
        yield words[9], words[1:8], words[8], where  # type: ignore[misc]
        points_follow = True


class _Binary:
    """Little-endian values of a mapped file, one after the other; ValueError where it ends too soon."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self.path, self.at = path, 0

    def take(self, layout: str) -> tuple:
        end = self.skip(1, struct.calcsize(f"<{layout}"))
        return struct.unpack_from(f"<{layout}", self.data, end)

    def skip(self, count: int, size: int) -> int:
        """Passes over so many items of a size; the place where they began."""
        if count * size > len(self.data) - self.at:
            raise ValueError(
                f"{self.path}: says {count} items of {size} bytes or more at byte {self.at} of its {len(self.data)}"
            )
        self.at += count * size
        return self.at - count * size

    def count(self, least: int) -> int:
        """A count of items of at least so many bytes each, all of which the rest of the file could hold."""
        (count,) = self.take("Q")
        self.at = self.skip(count, least)
        return count

    def name(self) -> str:
        end = self.data.find(b"\0", self.at, self.at + _LONGEST_NAME)
        if end < 0:
            raise ValueError(f"{self.path}: no name of an image at byte {self.at}")
        name, self.at = self.data[self.at : end], end + 1
        return name.decode("utf-8", "replace")


def _binary_lenses(path: Path) -> dict[str, Lens]:
    file, lenses = _Binary(path), {}
    for _ in range(file.count(least=48)):
        camera, number, width, height = file.take("IiQQ")
        where, model = f"{path}: camera {camera}", _NUMBERED.get(number)
        if model is None:
            raise ValueError(f"{where}: its model has number {number}; known: {_NUMBERED}")
        count = _MODELS[model][1]
        parameters = numbers(where, list(file.take(f"{count}d")), count, f"those of {model}")
        lenses[str(camera)] = _lens(where, model, width, height, parameters)
    return lenses


def _binary_images(path: Path) -> Iterator[Image]:
    file = _Binary(path)
    for _ in range(file.count(least=73)):
        image, *pose, camera = file.take("I7dI")
        name = file.name()
        file.skip(file.count(least=24), 24)
        yield name, pose, str(camera), f"{path}: image {image}"


def write_colmap(path: Path, c2w: Array, k: Array, fps: float, size_hw: tuple[int, int]) -> None:
    """A folder with cameras.txt, images.txt (frame_000000.png and on, without points) and an empty points3D.txt."""
    height, width = size_hw
    lenses, camera = np.unique(k * (width, height, width, height), axis=0, return_inverse=True)
    w2c = inverse(c2w[:, :3])
    xyzw = Rotation.from_matrix(w2c[:, :3, :3]).as_quat(canonical=True)
    poses = np.concatenate([xyzw[:, 3:], xyzw[:, :3], w2c[:, :3, 3]], axis=1)
    path.mkdir(parents=True, exist_ok=True)
    (path / "cameras.txt").write_text(
        "".join(f"{i} PINHOLE {width} {height} {_words(lens)}\n" for i, lens in enumerate(lenses, start=1))
    )
    (path / "images.txt").write_text(
        "".join(f"{i + 1} {_words(p)} {camera[i] + 1} frame_{i:06d}.png\n\n" for i, p in enumerate(poses))
    )
    (path / "points3D.txt").write_text("")


def _words(values: Array) -> str:
    return " ".join(f"{v:.17g}" for v in values)
