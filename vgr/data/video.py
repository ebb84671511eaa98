"""Clips in memory, video and image files: local regular files only, nothing that could reach the network."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vgr.data.files import atomic

# The container is named to the decoder, so that a playlist with a video's name is not followed.
_CONTAINERS = {".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}


@dataclass(frozen=True)
class Clip:
    """What a source hands over: frames (F,H,W,3) uint8, c2w (F,4,4) and intrinsics (F,4) float64, fps.

    shots: [{"start", "end", "caption"}] over raw frames; source: where it comes from; depth (F,H,W) float32
    planar metres where the source was asked for it.
    """

    frames: np.ndarray
    c2w: np.ndarray
    intrinsics: np.ndarray
    fps: float
    shots: list[dict[str, Any]]
    source: dict[str, Any] = field(default_factory=dict)
    depth: np.ndarray | None = None


def _careful() -> Any:
    """How colours are converted: rounded, chroma at full width. The usual quick way darkens by a level and more."""
    from av.video.reformatter import Interpolation as Way

    return Way.BICUBIC | Way.ACCURATE_RND | Way.FULL_CHR_H_INT | Way.FULL_CHR_H_INP


def iter_video(video: str | Path | bytes) -> Iterator[tuple[np.ndarray, float]]:
    """Frames (H,W,3) uint8 RGB and their times in seconds, one by one, of a file or an mp4 in memory.

    Raises ValueError for what cannot be decoded, FileNotFoundError where there is no such file.
    """
    import av

    if isinstance(video, bytes):
        name, container = "the video", "mov"
    else:
        name, container = str(video), _CONTAINERS.get(Path(video).suffix.lower())
        if container is None:
            raise ValueError(f"{name}: not a video file by its name; accepted are {', '.join(_CONTAINERS)}")
        if not Path(video).is_file():
            raise FileNotFoundError(2, "no such video file (only local regular files are read)", name)
    with io.BytesIO(video) if isinstance(video, bytes) else Path(video).open("rb") as file:
        try:
            with av.open(file, format=container) as stream:
                if not stream.streams.video:
                    raise ValueError(f"{name}: holds no video stream")
                for frame in stream.decode(stream.streams.video[0]):
                    yield frame.to_ndarray(format="rgb24", interpolation=_careful()), float(frame.time or 0.0)
        except (av.error.FFmpegError, EOFError) as error:
            raise ValueError(f"{name}: cannot be decoded ({error}); is it whole, and h264 or similar?") from error


def read_video(video: str | Path | bytes) -> tuple[np.ndarray, np.ndarray]:
    """All frames (F,H,W,3) uint8 RGB and times (F,) float64 in seconds. Errors as `iter_video`."""
    pairs = list(iter_video(video))
    if not pairs:
        raise ValueError(f"{'the video' if isinstance(video, bytes) else video}: holds no frames")
    frames, times = zip(*pairs, strict=True)
    return np.stack(frames), np.array(times)


@contextlib.contextmanager
def video_stream(
    out: BinaryIO, size_hw: tuple[int, int], fps: float | Fraction, crf: int = 14, live: bool = False
) -> Iterator[Callable[[np.ndarray], None]]:
    """Takes frames (F,H,W,3) uint8 RGB piece by piece and writes an h264 mp4 (yuv420p, BT.601 as labelled).

    live: in fragments, so that what stands in the file can be played while more is written. Raises ValueError.
    """
    import av

    height, width = size_hw
    if height % 2 or width % 2:
        raise ValueError(f"h264 in yuv420p needs even sizes, got {height}x{width}; crop or pad by one pixel")
    fragments = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"} if live else {}
    with av.open(out, "w", format="mp4", options=fragments) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # x264's macroblock tree reads beyond small frames: with it, equal frames gave unequal files.
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}
        stream.options |= {"tune": "zerolatency"} if live else {}
        stream.codec_context.thread_count = 1
        for tag in ("colorspace", "color_primaries", "color_trc"):
            setattr(stream.codec_context, tag, 6)  # SMPTE 170M, what swscale does when nothing is said

        def add(frames_FHWC: np.ndarray) -> None:
            for image in frames_FHWC:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", interpolation=_careful())))

        yield add
        container.mux(stream.encode())


def encode_video(frames_FHWC: np.ndarray, fps: float | Fraction, crf: int = 14) -> bytes:
    """(F,H,W,3) uint8 RGB as an mp4 of `video_stream`; equal bytes for equal frames."""
    if frames_FHWC.dtype != np.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3:
        raise ValueError(f"frames must be (F,H,W,3) uint8, got {frames_FHWC.shape} {frames_FHWC.dtype}")
    out = io.BytesIO()
    with video_stream(out, frames_FHWC.shape[1:3], fps, crf) as add:
        add(frames_FHWC)
    return out.getvalue()


def write_video(path: str | Path, frames_FHWC: np.ndarray, fps: float | Fraction, crf: int = 14) -> None:
    """Writes `encode_video`'s mp4; the file is whole or absent. Raises ValueError, OSError."""
    data = encode_video(frames_FHWC, fps, crf)
    with atomic(path) as file:
        file.write(data)


def read_image(path: str | Path, size_hw: tuple[int, int]) -> np.ndarray:
    """(H,W,3) uint8 RGB, cut around its centre to the shape of size_hw and resized by area averages.

    Raises ValueError naming the file where it is no image, FileNotFoundError where there is none.
    """
    import cv2

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such image file", str(path))
    data = np.frombuffer(path.read_bytes(), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise ValueError(f"{path}: is no image that can be read; give a PNG, JPEG or WebP file")
    height, width = image.shape[:2]
    scale = min(height / size_hw[0], width / size_hw[1])
    cut_h, cut_w = max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))
    top, left = (height - cut_h) // 2, (width - cut_w) // 2
    image = image[top : top + cut_h, left : left + cut_w]
    how = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    return np.ascontiguousarray(cv2.resize(image, size_hw[::-1], interpolation=how)[..., ::-1])


@contextlib.contextmanager
def live_video(path: Path, size_hw: tuple[int, int], fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Takes frames as they are made; the file can be played as it grows, and goes when the whole video is there."""
    try:
        with path.open("wb") as out, video_stream(out, size_hw, fps, live=True) as add:
            yield add
    finally:
        path.unlink(missing_ok=True)
