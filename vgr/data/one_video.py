"""One video as training data of a warp adapter: windows of it, beside what its cameras see of earlier frames.

Specs/warp-adapter 3.1. Cameras and depth are the video's own or estimated, so that a warp and the frames it stands for
agree by construction; nothing of a scale is assumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vgr.data.annotators import DepthModel
from vgr.data.filters import Meter
from vgr.data.modules import ShardData
from vgr.data.sidecars import camera_file, poses_at
from vgr.data.video import Clip, Shown, Warps, at_rate, fitted, iter_frames, probe
from vgr.geometry.camera_file import arrays
from vgr.geometry.cameras import crop_intrinsics, from_fov, interpolate
from vgr.geometry.checks import check_cameras
from vgr.geometry.conventions import check_convention
from vgr.geometry.depth import densify, scale_to
from vgr.geometry.moving import moving_mask
from vgr.geometry.reconstruct import reconstruct
from vgr.geometry.warp import Keyframes, chunk_video, known_depth, warp
from vgr.seeding import numpy_generator
from vgr.types import Cameras, Layout, latents_holding, raw_frames

Array = NDArray[np.float64]
EXTRA = 0.5  # how often a chunk also sees one or two frames of its own future (3.1)
MAX_KEYFRAMES = 4  # of a chunk, future ones apart: a rollout has as many and more, at growing distance


@dataclass(frozen=True)
class Known:
    """All of a video: frames (F,H,W,3) uint8, c2w (F,4,4), intrinsics (F,4), depth (F,H,W) in the unit of c2w."""

    frames: NDArray[np.uint8]
    c2w: Array
    intrinsics: Array
    depth: NDArray[np.float32]


def video_folder(split_folder: str | Path, video: str | None) -> Path:
    """Where a video's windows stand instead of in .../train or .../val: beside it, by its name and where it lies."""
    folder = Path(split_folder)
    if video is None:
        return folder
    path = Path(video)
    name = f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    return folder.parent / name / folder.name


class OneVideoData(ShardData):
    """`ShardData` of one video's windows, which `vgr-train` makes first; without a video, of shards made before.

    windows: how many are trained on; source: of `OneVideo`, what the model's chunk and the codec do not say. The others
    are `ShardData`'s.
    """

    def __init__(self, train: str, val: str, video: str | None, windows: int, source: Mapping[str, Any],
                 **settings: Any) -> None:
        super().__init__(str(video_folder(train, video)), str(video_folder(val, video)), **settings)


class OneVideo:
    """Windows of `frames` raw frames of one shot at fps, forward or backward, in chunks of `chunk` latent frames.

    Each chunk has a warp of its anchor, the last frame before it (the first chunk: its own first frame), of up to
    MAX_KEYFRAMES - 1 ends of chunks before that, and with probability EXTRA of one or two frames still to come.
    stride: the codec's raw frames of a latent frame; clip: its own, chunks then are clips, all of one length. reverse:
    how often time runs backward. cameras: "files", beside the video as in a folder of videos, or "estimate". depth:
    "sparse", from the points of the estimate, "files", an array `depth` (F,h,w) in <name>.depth.npz in the unit of the
    cameras, or the folder of a network. moving: "drop" what moves on its own from the warps, or "keep" it where it
    stood, as published. Both splits are of the one video, with other draws. `read`, or the first `capture`, says by
    ValueError why a video cannot serve: too short, cut, without parallax, poses of other frames or another convention,
    depth of another size or without a pixel.
    """

    def __init__(self, video: str, frames: int, size_hw: tuple[int, int], fps: float, chunk: int, stride: int,
                 caption: str = "", cameras: str = "estimate", depth: str = "sparse", hfov_deg: float | None = None,
                 moving: str = "drop", reverse: float = 0.5, licence: str = "not stated",
                 clip: int | None = None) -> None:
        self.video, self.frames, self.size_hw = str(video), frames, (int(size_hw[0]), int(size_hw[1]))
        self.fps, self.chunk, self.stride, self.caption = float(fps), chunk, stride, caption
        self.cameras, self.depth, self.hfov_deg = cameras, depth, hfov_deg
        self.moving, self.reverse, self.licence, self.clips_per_visit = moving, reverse, licence, 1
        self.splits: dict[str, Any] = {"train": [Path(video).name], "val": [Path(video).name]}
        if clip not in (None, chunk):
            raise ValueError(f"training.chunk={chunk}, codec.clip={clip}: one is the other")
        self._clip, self._latents = clip, latents_holding(frames, stride, clip)
        fits = raw_frames(self._latents, stride, clip) == frames and self._latents > (chunk if clip is None else 0)
        if not fits or not 0 <= reverse <= 1:
            told = f"1 + n x {stride}, at least {1 + chunk * stride}" if clip is None else "whole clips of "
            told += "" if clip is None else str(raw_frames(chunk, stride))
            raise ValueError(f"data.source.frames={frames}, data.source.reverse={reverse}: frames must be {told}, and "
                             "the share 0 to 1")
        if moving not in ("drop", "keep"):
            raise ValueError(f"data.source.moving={moving}: drop what moves on its own from the warps, or keep it")
        if cameras not in ("files", "estimate") or (depth == "sparse" and cameras == "files"):
            raise ValueError(f"data.source.cameras={cameras}, data.source.depth={depth}: files or estimate, and "
                             "sparse depth comes of the estimate, beside files give depth=files or a network's folder")
        self.bytes = Path(video).stat().st_size  # another video under the same name has another
        self._known: Known | None = None

    def read(self) -> Known:
        """The video, its cameras and depth, estimated where they are to be: seconds to minutes, once."""
        self._known = self._known or self._read()
        return self._known

    def capture(self, seed: int, split: str, visit: int) -> list[Clip]:
        """The window of one visit: a pure function of (seed, split, visit)."""
        known, rng = self.read(), numpy_generator(seed, "one-video", split, visit)
        start = int(rng.integers(len(known.frames) - self.frames + 1))
        at = np.arange(start, start + self.frames)
        at = at[::-1] if rng.random() < self.reverse else at
        images = torch.from_numpy(known.frames[at].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        depth, c2w, k = (torch.from_numpy(x[at].copy()).float() for x in (known.depth, known.c2w, known.intrinsics))
        layout = Layout.chunked(1, self._latents, self.chunk, clips=self._clip is not None)
        ends = [raw_frames(int((layout.chunk <= c).sum()), self.stride, self._clip) for c in layout.chunk.unique()]
        videos, visible = [], []
        for a, b in zip([0, *ends], ends):
            chosen = self._keyframes(rng, a, b, ends)
            keyframes = Keyframes(images[chosen], depth[chosen], k[chosen], c2w[chosen])
            found = warp(keyframes, c2w[a:b], k[a:b])
            video, seen = chunk_video(found, images[chosen[0]], begins=a == 0)
            video = video[:, 1:] if self._clip is not None and a else video  # a clip of its own, behind nothing
            videos.append(video.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy())
            visible.append(seen.numpy())
        shots = [{"start": 0, "end": self.frames, "caption": self.caption}]
        about = {"name": "one video", "video": Path(self.video).name, "frames": [int(at[0]), int(at[-1])]}
        return [Clip(known.frames[at], known.c2w[at], known.intrinsics[at], self.fps, shots, about, metric_scale=False,
                     warps=Warps(videos, np.concatenate(visible)))]

    def _keyframes(self, rng: np.random.Generator, a: int, b: int, ends: list[int]) -> list[int]:
        """Frames of the window that the chunk a to b is warped from, the preferred first."""
        anchor = max(a - 1, 0)
        before = [e - 1 for e in (1, *ends) if e - 1 < anchor]
        kept = int(rng.integers(min(len(before), MAX_KEYFRAMES - 1) + 1))
        chosen = [anchor, *sorted(rng.permutation(before)[:kept].tolist(), reverse=True)]
        if rng.random() < EXTRA:
            chosen += rng.choice(np.arange(max(a, 1), b), size=int(rng.integers(1, 3)), replace=False).tolist()
        return chosen

    def _read(self) -> Known:
        path, meter = Path(self.video), Meter()
        last = 0

        def decoded() -> Iterator[Shown]:
            nonlocal last
            for x in iter_frames(path):
                last = x.index
                yield x

        found = [(x.index, x.time_s, x.rgb(self.size_hw)) for _, x in at_rate(decoded(), self.fps)]
        if len(found) < self.frames:
            raise ValueError(f"data.video={path}: {len(found)} frames at {self.fps:g} a second, fewer than the "
                             f"{self.frames} of a window; give a longer video, a higher fps or fewer frames")
        indices, times, frames = (np.array(x) for x in zip(*found))
        for frame in frames:
            meter.add(frame)
        meter.done()
        if meter.cuts:
            at = ", ".join(f"{times[c]:.2f}" for c in meter.cuts[:5])
            raise ValueError(f"data.video={path}: cuts at {at} s; give one shot, for example by ffmpeg -ss and -t")
        points = np.zeros((0, 3))
        if self.cameras == "files":
            c2w, k = self._from_files(path, last + 1, indices, times)
        else:
            c2w, k, points = self._estimated(frames)
        cameras = Cameras(torch.from_numpy(c2w)[None], torch.from_numpy(k)[None])
        check_cameras(cameras, self.fps, self.size_hw)
        if check_convention(frames, cameras).verdict != "agrees":
            raise ValueError(f"data.video={path}: the camera hardly moves from its place, so that no warp tells near "
                             "from far; give a video with parallax")
        depth = self._depth(path, frames, c2w, k, points)
        if self.moving == "drop":
            still = np.where(moving_mask(frames, depth, c2w, k), 0, depth)
            some = known_depth(torch.from_numpy(still)).flatten(1).any(1).numpy()
            depth = np.where(some[:, None, None], still, depth)
        return Known(frames, c2w, k, depth)

    def _from_files(
        self, path: Path, count: int, indices: NDArray[np.int64], times: Array
    ) -> tuple[Array, Array]:
        shown_hw = probe(path).size_hw
        c2w, k = poses_at(camera_file(path, shown_hw), count, indices, times - times[0])
        if bool(k.isnan().any()):
            if self.hfov_deg is None:
                raise ValueError(f"the poses of {path.name} come without intrinsics; give data.source.hfov_deg")
            k = from_fov(self.hfov_deg, shown_hw[1] / shown_hw[0], torch.float64).repeat(len(times), 1)
        scaled, (top, left) = fitted(shown_hw, self.size_hw)
        return c2w.numpy(), crop_intrinsics(k, scaled, (top, left, *self.size_hw)).numpy()

    def _estimated(self, frames: NDArray[np.uint8]) -> tuple[Array, Array, Array]:
        """c2w, intrinsics and sparse points by structure from motion. ValueError with its account where it fails."""
        count, known = len(frames), None
        if self.hfov_deg is not None:
            known = from_fov(self.hfov_deg, self.size_hw[1] / self.size_hw[0], torch.float64).numpy()
        at = np.union1d(np.arange(0, count, max(1, round(self.fps / 8))), [count - 1])
        found = reconstruct(frames[at], known)
        lost = int((~np.isfinite(found.c2w).all((1, 2))).sum())
        if found.reason or found.motion != "structure" or lost:
            why = found.reason or (f"{lost} of {len(at)} frames could not be placed" if lost else
                                   "it only turns, and turning shows no depth")  # fmt: skip
            raise ValueError(f"data.video={self.video} cannot be reconstructed: {why} (registered "
                             f"{found.registered:.0%}, {len(found.points)} points, confidence {found.confidence:.2f}); "
                             "give poses and depth as files, or a video with more texture, light or parallax")
        c2w = interpolate(torch.from_numpy(found.c2w), torch.from_numpy(at), torch.arange(count)).numpy()
        return c2w, np.tile(found.intrinsics, (count, 1)), found.points

    def _depth(self, path: Path, frames: NDArray[np.uint8], c2w: Array, k: Array, points: Array) -> NDArray[np.float32]:
        if self.depth == "sparse":
            return densify(points, c2w, k[0], self.size_hw)
        if self.depth != "files":
            depth = DepthModel(self.depth)(frames)
            return depth * scale_to(depth, points, c2w, k) if len(points) else depth
        file = path.with_suffix(".depth.npz")
        depth = arrays(file, {"depth"}, np.float32).get("depth")
        wanted = (len(frames), *self.size_hw)
        if depth is None or depth.shape != wanted:
            told = "no array depth" if depth is None else f"depth {depth.shape}"
            raise ValueError(f"{file}: {told}, but the video's frames at data.source.fps and size_hw are {wanted}")
        usable = (np.isfinite(depth) & (depth > 0)).any((1, 2))
        if not usable.all():
            raise ValueError(f"{file}: frame {int((~usable).argmax())} has no depth that is finite and above 0")
        return depth
