"""What the readers of pose files share: `CameraFile` and the checks of numbers, sizes, text and archives."""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vgr.geometry.cameras import invert
from vgr.types import Cameras

Array = NDArray[np.float64]
Size = tuple[int, int] | None

MAX_BYTES, MAX_POSES = 256 << 20, 200_000
_NPY_HEADER = 16 << 10  # numpy refuses headers of more than 10,000 bytes
# Whatever numpy and zipfile raise for files that are damaged.
UNREADABLE = (
    ValueError, TypeError, OSError, EOFError, MemoryError, RuntimeError, LookupError, SyntaxError, OverflowError,
    zlib.error, zipfile.BadZipFile,
)  # fmt: skip


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


def camera_file(
    path: Path, c2w: Array, k: Array | None = None, times: Array | None = None, size_hw: Size = None
) -> CameraFile:
    """From c2w (F,4,4), k (F,4) and times (F,)."""
    frames = len(c2w)
    if not 0 < frames <= MAX_POSES:
        raise ValueError(f"{path}: {frames} poses; it must hold 1 to {MAX_POSES}")
    intrinsics = torch.from_numpy(np.full((frames, 4), math.nan) if k is None else k)
    seconds = None if times is None else torch.from_numpy(times - times[0])
    return CameraFile(torch.from_numpy(c2w)[None], intrinsics[None], seconds, size_hw)


def square(top_F34: Array) -> Array:
    """Poses (F,4,4) of their upper rows."""
    return np.concatenate([top_F34, np.tile([[[0.0, 0.0, 0.0, 1.0]]], (len(top_F34), 1, 1))], axis=1)


def inverse(top_F34: Array) -> Array:
    """Camera-to-world (F,4,4) of the upper rows of world-to-camera, or the other way round."""
    return invert(torch.from_numpy(square(top_F34))).numpy()


def known_size(size_hw: Size, path: Path) -> tuple[int, int]:
    """size_hw, refused where it was not given."""
    if size_hw is None or min(size_hw) < 1:
        raise ValueError(
            f"{path}: its intrinsics need the size of its images, which it does not tell; give size_hw=(height, width) "
            "in pixels (vgr-sample takes it from first_frame=<one of the images>)"
        )
    return size_hw


def arrays(path: Path, wanted: set[str], dtype: type | None = None) -> dict[str, NDArray[Any]]:
    """Those of the wanted arrays that an npz has. Sizes and headers are checked before anything is allocated."""
    path.stat()  # OSError for a missing file; those below speak of its content
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
            there = wanted & {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
            return {name: np.asarray(read_npy(unpacked(archive, f"{name}.npy")), dtype) for name in there}
    except UNREADABLE as error:
        raise ValueError(f"{path}: no npz that can be read ({error})") from error


def unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member of an archive, unpacked to no more bytes than its directory says, which `ZipFile.read` does not heed."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed by method {info.compress_type}; only stored and deflated can be taken")
    with archive.open(info) as member:
        return member.read(info.file_size)


def read_npy(data: bytes | memoryview) -> NDArray[Any]:
    """An array whose header is checked against the bytes present; it lies in them, unless they cannot be written to."""
    stream = io.BytesIO(data[:_NPY_HEADER])
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read_header(stream)
    if dtype.hasobject or stream.tell() + math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of {shape} {dtype} does not fit its {len(data)} bytes, allow_pickle=False")
    array = np.ndarray(shape, dtype, data, stream.tell(), order="F" if columns_first else "C")
    return array if array.flags.writeable else array.copy()


def text(path: Path) -> str:
    """The whole of a text file of at most MAX_BYTES."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES >> 20} MiB")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text ({error.reason}), so none of the camera formats in text") from error


def lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and words of every line that is neither empty nor a comment."""
    for number, line in enumerate(text(path).splitlines(), start=1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield number, words


def numbers(where: str, words: list[Any], count: int, what: str) -> list[float]:
    """So many finite numbers."""
    try:
        values = [float(w) for w in words]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f"{where}: needs {count} finite numbers, {what}; got {' '.join(map(str, words))[:80]!r}")
    return values


def rotations(wxyz_F4: Array, where: list[str]) -> Array:
    """Rotation matrices (F,3,3) of quaternions that are of unit length up to their decimals."""
    length = np.linalg.norm(wxyz_F4, axis=1)
    for i in np.flatnonzero(~(np.abs(length - 1) < 1e-2)):
        raise ValueError(f"{where[i]}: a rotation's quaternion has length 1, not {length[i]:.4g}; wrong columns?")
    q = wxyz_F4 / length[:, None]
    hat = -np.cross(q[:, None, 1:], np.eye(3))
    return np.eye(3) + 2 * q[:, :1, None] * hat + 2 * hat @ hat


def natural(name: str) -> list[str | int]:
    """A key that sorts frame_9 before frame_10."""
    return [int(p) if i % 2 else p for i, p in enumerate(re.split(r"([0-9]+)", name))]


def normalised(
    where: str, pixels: list[float], distortion: list[float], height: float, width: float
) -> tuple[list[float], Size]:
    """fx, fy, cx, cy divided by the size, and the size. COLMAP's and NeRF's pixels start at the edge, as ours do."""
    if any(distortion):
        raise ValueError(f"{where}: lens distortion {distortion}; cameras here have none, undistort the images first")
    if min(height, width) < 1:
        raise ValueError(f"{where}: images of {width:g}x{height:g} pixels")
    return [v / s for v, s in zip(pixels, (width, height) * 2)], (int(height), int(width))


def one_size(path: Path, lenses: list[tuple[list[float], Size]]) -> tuple[Array, Size]:
    """Intrinsics (F,4) of lenses that are all of one image size, and that size."""
    sizes = {size for _, size in lenses}
    if len(sizes) > 1:
        raise ValueError(f"{path}: images of several sizes (height, width), {sizes}; a path needs one")
    return np.array([k for k, _ in lenses], np.float64).reshape(-1, 4), next(iter(sizes), None)
