"""Pictures and videos of a page as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from vgr.report.sets import Frames


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video_uri(frames_FHW3: Frames, fps: float, width: int = 256) -> str:
    """The video enlarged by a whole factor without smoothing, to about `width`, as a data URI (mp4)."""
    from vgr.data.video import encode_video

    factor = max(1, round(width / frames_FHW3.shape[2]))
    return data_uri("video/mp4", encode_video(frames_FHW3.repeat(factor, 1).repeat(factor, 2), fps, crf=22))


def sheet(rows: Sequence[Frames], count: int = 9, gap: int = 1) -> np.ndarray:
    """Frames of several videos at `count` equal times side by side, one row a video, RGBA (H,W,4), clear gaps."""
    _, height, width, _ = rows[0].shape
    image = np.zeros((len(rows) * (height + gap) - gap, count * (width + gap) - gap, 4), np.uint8)
    for r, video in enumerate(rows):
        for c, i in enumerate(np.linspace(0, len(video) - 1, count).round().astype(int)):
            y, x = r * (height + gap), c * (width + gap)
            image[y : y + height, x : x + width, :3] = video[i]
            image[y : y + height, x : x + width, 3] = 255
    return image


def png(image_HW4: np.ndarray) -> bytes:
    """RGBA as PNG."""
    import cv2

    return cv2.imencode(".png", cv2.cvtColor(image_HW4, cv2.COLOR_RGBA2BGRA))[1].tobytes()
