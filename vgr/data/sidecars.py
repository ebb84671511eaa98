"""Files beside a video: its captions and its cameras."""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vgr.data.video import CONTAINERS
from vgr.geometry.cameras import interpolate
from vgr.geometry.formats import CameraFile, read_cameras


def poses_at(
    file: CameraFile, frames: int, indices: NDArray[np.int64], seconds: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """c2w (N,4,4) and k (N,4): of frames by index where the file has a pose for each of `frames`, else by time from
    the first. ValueError where it has neither, or ends before."""
    c2w, k = file.c2w[0], file.intrinsics[0]
    if len(c2w) == frames:
        return c2w[indices].clone(), k[indices]
    if file.times is None:
        raise ValueError(f"{len(c2w)} poses without times for {frames} frames; one for each is needed")
    at, last = torch.from_numpy(seconds), file.times[-1]
    at = torch.where((at - last).abs() < 1e-3, last, at)  # rounding is not extrapolation
    if float(at.max()) > float(last):
        end = float(at.max())
        raise ValueError(f"{len(c2w)} poses, the last at {float(last):.2f} s, but frames go on to {end:.2f} s")
    return interpolate(c2w, file.times, at), k[torch.searchsorted(file.times, at).clamp(max=len(k) - 1)]


def sidecars(path: Path) -> list[Path]:
    """Files beside a video that have its name, other videos apart, and what a folder of its name holds of COLMAP's."""
    beside = [p for p in path.parent.glob(f"{glob.escape(path.stem)}.*") if p.suffix.lower() not in CONTAINERS]
    inside = [path.with_suffix("") / name for name in ("cameras.txt", "images.txt")]
    return sorted(p for p in (*beside, *inside) if p.is_file())


def _is_cameras(path: Path) -> bool:
    if path.suffix == ".npz" or path.name == "images.txt":
        return not path.name.endswith(".depth.npz")
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(4096)
    if path.suffix == ".json":
        return '"frames"' in text or '"camera_angle_x"' in text or '"fl_x"' in text
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")][:2]
    return path.suffix in (".txt", ".tum", ".kitti") and any(len(r) in (8, 12, 19) and _numeric(r) for r in rows)


def _numeric(words: list[str]) -> bool:
    try:
        return all(math.isfinite(float(w)) for w in words)
    except ValueError:
        return False


@lru_cache(8)
def camera_file(path: Path, size_hw: tuple[int, int]) -> CameraFile:
    """The cameras beside a video of pictures of size_hw pixels. ValueError where there are none, or several."""
    found = [p for p in sidecars(path) if _is_cameras(p)]
    if len(found) != 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{path.name} needs one file of cameras beside it, there are {len(found)}: {names or 'none'}")
    return read_cameras(found[0], size_hw=size_hw)


def captions_of(path: Path, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Captions of a video, with start_s and end_s, 0 and infinity where it is of all. ValueError: not understood."""
    entries = list(table)
    for file in sidecars(path):
        if file.suffix not in (".txt", ".json") or file.parent != path.parent or _is_cameras(file):
            continue
        if file.stat().st_size > 1 << 20:
            raise ValueError(f"{file}: a caption of more than a MiB")
        text = file.read_text(encoding="utf-8")
        try:
            given = json.loads(text) if file.suffix == ".json" else {"caption": text.strip()}
        except RecursionError as error:
            raise ValueError(f"{file}: no captions, but a deep nest of brackets") from error
        entries += given if isinstance(given, list) else [given]
    try:
        return [
            {"caption": str(x["caption"]).strip(), "start_s": float(x.get("start_s") or 0),
             "end_s": float(x.get("end_s") or math.inf)} for x in entries
        ]  # fmt: skip
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path.name}: captions need the key `caption` and, of parts, start_s and end_s") from error


def told(captions: list[dict[str, Any]], start_s: float, end_s: float) -> str:
    """The caption that covers most of a shot; of equals the one of the shortest part; "" without any."""

    def cover(x: dict[str, Any]) -> tuple[float, float]:
        return min(end_s, x["end_s"]) - max(start_s, x["start_s"]), x["start_s"] - x["end_s"]

    best = max(captions, key=cover, default=None)
    return best["caption"] if best is not None and cover(best)[0] > 0 else ""


def captions_table(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of captions.csv, none where there is no such file. ValueError where a column is missing."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            found = list(rows)
        except csv.Error as error:
            raise ValueError(f"{path}: no table of captions ({error})") from error
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: needs a first line naming columns file and caption; it has {rows.fieldnames}")
    yield from found
