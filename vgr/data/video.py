"""Clips in memory, video and image files: local regular files only, nothing that could reach the network."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vgr.data.files import atomic

# The container is named to the decoder, so that a playlist with a video's name is not followed.
CONTAINERS = {
    ".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".3gp": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi",
    ".ts": "mpegts", ".mts": "mpegts", ".m2ts": "mpegts", ".mpg": "mpeg", ".mpeg": "mpeg", ".wmv": "asf", ".flv": "flv",
    ".ogv": "ogg", ".gif": "gif",
}  # fmt: skip
MAX_PIXELS = 1 << 26  # of a picture, twice 8K: more is a broken header, or somebody's joke
Damage = list[tuple[float, str]]  # seconds into the video, and what is wrong there


@dataclass(frozen=True)
class Warps:
    """What the cameras of a clip's chunks see of frames before: one video a chunk, and what of it they do see.

    videos: (n,H,W,3) uint8, of the first chunk its own frames, of a later one the frame before it and then its own;
    visible (F,H,W) bool, of the clip's frames.
    """

    videos: list[np.ndarray]
    visible: np.ndarray


@dataclass(frozen=True)
class Clip:
    """What a source hands over: frames (F,H,W,3) uint8, c2w (F,4,4) and intrinsics (F,4) float64, fps.

    shots: [{"start", "end", "caption"}] over raw frames; source: where it comes from; depth (F,H,W) float32
    planar metres where the source was asked for it; metric_scale: whether the poses are in metres; warps: for a
    warp adapter.
    """

    frames: np.ndarray
    c2w: np.ndarray
    intrinsics: np.ndarray
    fps: float
    shots: list[dict[str, Any]]
    source: dict[str, Any] = field(default_factory=dict)
    depth: np.ndarray | None = None
    metric_scale: bool = True
    warps: Warps | None = None


def _careful() -> Any:
    """How colours are converted: rounded, chroma at full width. The usual quick way darkens by a level and more."""
    from av.video.reformatter import Interpolation as Way

    return Way.BICUBIC | Way.ACCURATE_RND | Way.FULL_CHR_H_INT | Way.FULL_CHR_H_INP


@contextlib.contextmanager
def _opened(video: str | Path | bytes) -> Iterator[tuple[Any, Any, str]]:
    """The container, its first video stream that is no cover picture, and what to call it. Errors as `iter_video`."""
    import av

    name, container = "the video", "mov"
    if not isinstance(video, bytes):
        name, container = str(video), CONTAINERS.get(Path(video).suffix.lower())
        if container is None:
            raise ValueError(f"{name}: not a video file by its name; accepted are {', '.join(CONTAINERS)}")
        if not Path(video).is_file():
            raise FileNotFoundError(2, "no such video file (only local regular files are read)", name)
    with io.BytesIO(video) if isinstance(video, bytes) else Path(video).open("rb") as file:
        try:
            with av.open(file, format=container, metadata_errors="replace") as opened:
                cover = av.stream.Disposition.attached_pic
                stream = next((s for s in opened.streams.video if not s.disposition & cover), None)
                if stream is None or stream.codec_context is None:
                    raise ValueError(f"{name}: holds no video stream" + (" of a known kind" if stream else ""))
                _check_size(name, stream.codec_context)
                yield opened, stream, name
        except (av.error.FFmpegError, EOFError, OSError) as error:  # OSError: a damaged header seeks before the start
            raise ValueError(f"{name}: cannot be decoded ({error}); is it whole, and h264 or similar?") from error


def _check_size(name: str, holder: Any) -> None:
    if not 0 < holder.width * holder.height <= MAX_PIXELS:
        raise ValueError(f"{name}: pictures of {holder.width}x{holder.height}; 1 to {MAX_PIXELS} pixels can be taken")


@dataclass(frozen=True)
class VideoInfo:
    """Of a file's first video stream: size as shown, average frames a second, length in seconds (0 where unknown)
    and what is unusual about it, in words."""

    size_hw: tuple[int, int]
    fps: float
    seconds: float
    notes: tuple[str, ...]


def probe(video: str | Path | bytes) -> VideoInfo:
    """What a video's header and first frame say. Errors as `iter_video`."""
    with _opened(video) as (container, stream, name):
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError(f"{name}: holds no frames")
        shown, count = Shown(first, 0.0, 0, stream.sample_aspect_ratio, {}), len(container.streams.video)
        bits = first.format.components[0].bits
        notes = (
            f"stream {stream.index}, the first of {count} with video" if count > 1 else "",
            f"turned by {first.rotation} degrees" if first.rotation else "",
            f"{bits} bits a colour" if bits > 8 else "",
            f"pixels of {stream.sample_aspect_ratio} made square" if shown.stretch != 1 else "",
        )  # fmt: skip
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        return VideoInfo(shown.size_hw, float(stream.average_rate or 0), seconds, tuple(filter(None, notes)))


class Shown:
    """A decoded frame as it is to be shown: time in seconds and index in its file; `rgb` converts it, by scalers."""

    def __init__(self, frame: Any, time_s: float, index: int, aspect: Fraction | None, scalers: dict[Any, Any]) -> None:
        self.frame, self.time_s, self.index = frame, time_s, index
        self._scalers = scalers  # by size, for all frames of a file: setting one up takes longer than a small picture
        self.turns = round(frame.rotation / 90) % 4  # counter-clockwise quarters
        self.stretch = aspect if aspect and Fraction(1, 4) <= aspect <= 4 else Fraction(1)  # of a pixel's width

    @property
    def size_hw(self) -> tuple[int, int]:
        """With square pixels, the right way up."""
        size = self.frame.height, max(1, round(self.frame.width * self.stretch))
        return size[:: -1 if self.turns % 2 else 1]

    def rgb(self, size_hw: tuple[int, int] | None = None) -> np.ndarray:
        """(H,W,3) uint8, scaled and cut around its centre to size_hw as `fitted` says; None: whole."""
        import cv2
        from av.video.reformatter import VideoReformatter

        (height, width), (top, left) = (self.size_hw, (0, 0)) if size_hw is None else fitted(self.size_hw, size_hw)
        cut_h, cut_w = size_hw or (height, width)
        if self.turns % 2:
            height, width = width, height
        scaler = self._scalers.setdefault((height, width), VideoReformatter())
        # Planes, which swscale makes in half the time of packed colours, bit for bit the same. One thread: several
        # write over each other's edges now and then, eight pixels at a time.
        planes = scaler.reformat(self.frame, width, height, "gbrp", self._colours(), interpolation=_careful(),
                                 threads=1).planes
        g, b, r = (np.frombuffer(p, np.uint8).reshape(height, p.line_size)[:, :width] for p in planes)
        return np.ascontiguousarray(np.rot90(cv2.merge((r, g, b)), self.turns)[top : top + cut_h, left : left + cut_w])

    def _colours(self) -> Any:
        """Unlabelled pictures of HD size are BT.709 by custom; otherwise as labelled."""
        from av.video.reformatter import Colorspace

        unlabelled, large = self.frame.colorspace == 2, min(self.frame.width, self.frame.height) >= 720
        return Colorspace.ITU709 if unlabelled and large and "yuv" in self.frame.format.name else None


def fitted(shown_hw: tuple[int, int], size_hw: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size to which a picture is scaled so that it just covers size_hw, and top and left of the middle cut in it.

    Normalised intrinsics k become `crop_intrinsics(k, scaled, (top, left, *size_hw))`.
    """
    scale = max(size_hw[0] / shown_hw[0], size_hw[1] / shown_hw[1])
    height, width = (max(want, round(have * scale)) for want, have in zip(size_hw, shown_hw))
    return (height, width), ((height - size_hw[0]) // 2, (width - size_hw[1]) // 2)


def iter_frames(
    video: str | Path | bytes, damage: Damage | None = None, start_s: float | None = None, index: int = 0
) -> Iterator[Shown]:
    """Decoded frames one by one, from the one at start_s on, which is number `index` (None: from the first on).

    damage: takes what cannot be decoded, with its position, and the rest is still given; None: raises ValueError.
    Errors otherwise as `iter_video`.
    """
    import av

    with _opened(video) as (container, stream, name):
        if start_s is not None and container.format.name[:3] in ("mov", "mat"):  # others have no index to trust
            container.seek(max(0, int((start_s - 0.5) / stream.time_base)), stream=stream)
        last, size, scalers = -1.0 if start_s is None else start_s - 1e-6, None, {}

        def wrong(at: float, what: str) -> None:
            if damage is None:
                raise ValueError(f"{name}: cannot be decoded at {max(at, 0):.2f} s ({what})")
            damage.append((max(at, 0.0), what))

        for packet in _packets(container, stream, wrong):
            try:
                frames = packet.decode()
            except (av.error.FFmpegError, EOFError) as error:
                wrong(last if packet.pts is None else float(packet.pts * packet.time_base), str(error))
                continue
            for frame in frames:
                time_s = last if frame.time is None else float(frame.time)
                if start_s is not None and time_s <= last:
                    continue  # between the key frame and the one asked for
                if damage is not None and frame.is_corrupt:
                    wrong(time_s, "a corrupt frame")
                elif time_s <= last:
                    wrong(last, "time does not advance")
                elif (frame.width, frame.height) != (size or (frame.width, frame.height)):
                    wrong(time_s, f"pictures change from {size[0]}x{size[1]} to {frame.width}x{frame.height}")
                else:
                    _check_size(name, frame)
                    yield Shown(frame, time_s, index, stream.sample_aspect_ratio, scalers)
                    start_s, size, last = None, (frame.width, frame.height), time_s
                index += start_s is None
        end = (container.start_time or 0) / 1e6 + container.duration / 1e6 if container.duration else last
        if stream.duration:
            end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        if damage is not None and end - last > max(0.25, 3 / float(stream.average_rate or 12)):
            wrong(last, f"ends here, of {end:.2f} s")


def _packets(container: Any, stream: Any, wrong: Callable[[float, str], None]) -> Iterator[Any]:
    import av

    at = 0.0
    try:
        for packet in container.demux(stream):
            at = at if packet.pts is None else float(packet.pts * packet.time_base)
            yield packet
    except (av.error.FFmpegError, EOFError) as error:
        wrong(at, str(error))


def joined(damage: Damage) -> list[tuple[float, float, str]]:
    """Damage less than a second apart is one: start, end, what came first and how often."""
    spans: list[list[Any]] = []
    for at, what in sorted(damage):
        if spans and at - spans[-1][1] < 1:
            spans[-1][1], spans[-1][3] = at, spans[-1][3] + 1
        else:
            spans.append([at, at, what, 1])
    return [(a, b, what if n == 1 else f"{what}, and {n - 1} more") for a, b, what, n in spans]


def at_rate(
    frames: Iterable[Shown], fps: float, origin_s: float | None = None, first: int = 0
) -> Iterator[tuple[int, Shown]]:
    """Number k and the frame nearest to the time origin_s + k / fps, for k = first, first + 1, ...

    origin_s: None for the first frame's time. Where frames are rarer than fps some are given twice.
    """
    held: Shown | None = None
    k = first
    for shown in frames:
        origin_s = shown.time_s if origin_s is None else origin_s
        while held is not None and origin_s + k / fps <= (held.time_s + shown.time_s) / 2:
            yield k, held
            k += 1
        held = shown
    while held is not None and origin_s is not None and origin_s + k / fps <= held.time_s + 0.25 / fps:
        yield k, held
        k += 1


def iter_video(video: str | Path | bytes) -> Iterator[tuple[np.ndarray, float]]:
    """Frames (H,W,3) uint8 RGB as shown and their times in seconds, one by one, of a file or an mp4 in memory.

    Raises ValueError for what cannot be decoded, FileNotFoundError where there is no such file.
    """
    for shown in iter_frames(video):
        yield shown.rgb(), shown.time_s


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
                container.mux(stream.encode(frame.reformat(format="yuv420p", interpolation=_careful(), threads=1)))

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
