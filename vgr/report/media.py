"""Pictures and videos of a page as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from vgr.report.sets import Frames


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def reduced(frames_FHW3: Frames, most: int) -> Frames:
    """Frames of at most that width, even sizes, by area averages; smaller ones as they are."""
    import cv2

    height, width = frames_FHW3.shape[1:3]
    if width <= most:
        return frames_FHW3
    size = (most, 2 * max(1, round(most * height / width / 2)))
    return np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames_FHW3])


def video_uri(frames_FHW3: Frames, fps: float, width: int = 256) -> str:
    """The video enlarged by a whole factor without smoothing, to about `width`, or reduced to twice it: a data URI."""
    from vgr.data.video import encode_video

    frames_FHW3 = reduced(frames_FHW3, 2 * width)
    factor = max(1, round(width / frames_FHW3.shape[2]))
    large = frames_FHW3.repeat(factor, 1).repeat(factor, 2)
    even = large[:, : large.shape[1] // 2 * 2, : large.shape[2] // 2 * 2]
    return data_uri("video/mp4", encode_video(even, fps, crf=22))


def sheet(rows: Sequence[Frames], count: int = 9, gap: int = 1) -> np.ndarray:
    """Frames of several videos at `count` equal times side by side, one row a video, RGBA (H,W,4), clear gaps."""
    picks = np.stack([reduced(v[np.linspace(0, len(v) - 1, count).round().astype(int)], 256) for v in rows])
    tiles = np.pad(picks, ((0, 0), (0, 0), (0, 0), (0, 0), (0, 1)), constant_values=255)  # opaque
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)))
    return np.concatenate(np.concatenate(tiles, axis=1), axis=1)[:-gap, :-gap]


def png(image_HW4: np.ndarray) -> bytes:
    """RGBA as PNG."""
    import cv2

    return cv2.imencode(".png", cv2.cvtColor(image_HW4, cv2.COLOR_RGBA2BGRA))[1].tobytes()
