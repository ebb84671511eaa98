"""What the rooms of the house hand to each other. Plain data, no behaviour beyond slicing and moving.

Shape letters: B batch, T latent frames, F raw frames, C channels, H W height width, L tokens, D width,
N heads, K head dim, J text tokens, S shots, R raw frames of one latent frame.

Conventions: cameras are OpenCV (x right, y down, z forward), camera-to-world, metres; intrinsics are
(fx, fy, cx, cy) divided by image width (fx, cx) and height (fy, cy), measured from the left and top image
edges, so the centre of pixel i is (i + 0.5) / W. Times t lie in [0, 1], 0 is clean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


def _map_tensors(value: Any, fn: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(x, fn) for x in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _map_tensors(getattr(value, f.name), fn) for f in dataclasses.fields(value)}
        )
    return value


def raw_frames(latents: int, stride: int, clip: int | None = None) -> int:
    """Raw frames of a video's first `latents` latent frames: one, then `stride` each, in every clip of `clip` anew."""
    whole, rest = (0, latents) if clip is None else divmod(latents, clip)
    return whole * (1 + ((clip or 1) - 1) * stride) + (1 + (rest - 1) * stride if rest else 0)


def latents_holding(raw: int, stride: int, clip: int | None = None) -> int:
    """The fewest latent frames that hold so many raw frames, in whole clips where there are such."""
    return 1 + -(-(raw - 1) // stride) if clip is None else clip * -(-raw // raw_frames(clip, stride))


def latent_frames(raw: int, stride: int, clip: int | None = None) -> int:
    """T of exactly so many raw frames; ValueError with the nearest that fit. One image has one, whatever the clip."""
    count = 1 if raw == 1 else latents_holding(raw, stride, clip)
    if raw < 1 or raw_frames(count, stride, clip) != raw:
        step, least, base = (stride, 1, "1 + ") if clip is None else (raw_frames(clip, stride),) * 2 + ("",)
        above = max(raw_frames(count, stride, clip), least + step)
        raise ValueError(
            f"{raw} frames do not fit the codec's temporal stride {stride}; "
            f"use {base}n * {step}, for example {above - step} or {above}"
        )
    return count


@dataclass(frozen=True)
class Cameras:
    """Cameras of raw frames: c2w (B,F,4,4) in metres, intrinsics (B,F,4) normalised; both fp32 or wider."""

    c2w: Tensor
    intrinsics: Tensor

    def frames(self, a: int, b: int) -> Cameras:
        """Raw frames a (included) to b (excluded)."""
        return Cameras(self.c2w[:, a:b], self.intrinsics[:, a:b])

    def to(self, device: torch.device | str) -> Cameras:
        return _map_tensors(self, lambda x: x.to(device))


@dataclass(frozen=True)
class LatentCameras:
    """Cameras grouped by latent frame, relative to the clip's first raw frame.

    c2w (B,T,4,4), intrinsics (B,T,4): the camera at each latent frame's last raw frame (frame 0 for the first).
    raw_c2w (B,T,R,4,4), raw_intrinsics (B,T,R,4): those of all its raw frames, R the codec's temporal stride.
    Built by `vgr.geometry.cameras.group_by_latent`.
    """

    c2w: Tensor
    intrinsics: Tensor
    raw_c2w: Tensor
    raw_intrinsics: Tensor

    def frames(self, a: int, b: int) -> LatentCameras:
        return _map_tensors(self, lambda x: x[:, a:b])


@dataclass(frozen=True)
class Layout:
    """Where each latent frame of a call stands.

    position (T,) index in the video, survives slicing; chunk (T,); role (T,) 0 target, 1 context;
    shot (B,T). All int64. Masks are derived from these, never from lengths or times.
    """

    position: Tensor
    chunk: Tensor
    role: Tensor
    shot: Tensor

    @staticmethod
    def whole(batch: int, frames: int, device: torch.device | str = "cpu") -> Layout:
        """One chunk of target frames 0..frames-1, one shot: what a bidirectional model sees."""
        zeros = torch.zeros(frames, dtype=torch.int64, device=device)
        return Layout(torch.arange(frames, device=device), zeros, zeros, zeros.expand(batch, frames))

    @staticmethod
    def chunked(
        batch: int, frames: int, chunk: int, device: torch.device | str = "cpu", clips: bool = False
    ) -> Layout:
        """Frames in chunks of `chunk`, the first one a frame longer, a short rest joined to the last (spec 3.8).

        clips: chunks are clips of their own (`Codec.clip`), all of one length.
        """
        whole = Layout.whole(batch, frames, device)
        if clips:
            return dataclasses.replace(whole, chunk=whole.position // chunk)
        count = max(1, (frames - 1) // chunk)
        index = ((whole.position - 1).clamp_min(0) // chunk).clamp_max(count - 1)
        return dataclasses.replace(whole, chunk=index)

    def frames(self, a: int, b: int) -> Layout:
        return Layout(self.position[a:b], self.chunk[a:b], self.role[a:b], self.shot[:, a:b])

    def packed(self) -> Layout:
        """Packed teacher forcing: every frame once as context, then once as target, at equal positions."""
        position, chunk = self.position.repeat(2), self.chunk.repeat(2)
        role = torch.cat([torch.ones_like(self.role), torch.zeros_like(self.role)])
        return Layout(position, chunk, role, self.shot.repeat(1, 2))


@dataclass(frozen=True)
class TextStates:
    """Encoded text: states (B,S,J,D), mask (B,S,J) bool, true for real tokens; one row of J per shot."""

    states: Tensor
    mask: Tensor


@dataclass(frozen=True)
class HistoryBlock:
    """Clean latent frames that a call attends to and never commits: the past itself, or the past as the camera sees it.

    latents (B,C,T,H,W); position (T,) int64: the index in the video that each frame speaks of, for aligned evidence
    that of the target it shows; tier: the patch embedding that reads it, of a model that has several ("prefix",
    "short", "mid", "long"); keep: bool, (B,t,h,w) over the tokens of that embedding, the others are left out of
    attention altogether, None: all are kept.
    """

    latents: Tensor
    position: Tensor
    tier: str = "short"
    keep: Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told beside the noisy latents.

    text: one encoded prompt per shot, chosen per frame through `layout.shot`, or one for all; cameras: None for models
    without a camera; prompt (B,T) int64: the text each frame reads where it is not its shot's (a cut is marked);
    history: evidence for this call's frames, whatever the slice; stage: of a model that denoises in stages of growing
    size, with times of their own. A given clean first frame is not a field: it stands in x at t = 0.
    """

    layout: Layout
    text: TextStates
    cameras: LatentCameras | None = None
    prompt: Tensor | None = None
    history: tuple[HistoryBlock, ...] = ()
    stage: int | None = None

    def frames(self, a: int, b: int) -> Conditioning:
        """The same conditioning for latent frames a (included) to b (excluded); positions are kept."""
        cameras = None if self.cameras is None else self.cameras.frames(a, b)
        prompt = None if self.prompt is None else self.prompt[:, a:b]
        return dataclasses.replace(self, layout=self.layout.frames(a, b), cameras=cameras, prompt=prompt)

    def packed(self) -> Conditioning:
        """Of a call with each frame twice, as context and as target: see `Layout.packed`."""
        cameras = None if self.cameras is None else _map_tensors(self.cameras, lambda x: torch.cat([x, x], dim=1))
        prompt = None if self.prompt is None else self.prompt.repeat(1, 2)
        return dataclasses.replace(self, layout=self.layout.packed(), cameras=cameras, prompt=prompt)

    def to(self, device: torch.device | str) -> Conditioning:
        return _map_tensors(self, lambda x: x.to(device))


@dataclass(frozen=True)
class Warp:
    """What each frame's camera sees of frames before its chunk (warp adapter, specs 2.3, 2.4).

    latents (B,C,T,h,w); visible (B,F,H,W) bool, of the pixels of raw frames; still (B,C,1,h,w): where chunks are clips
    of their own, the last latent frame of the first raw frame standing still for a clip.
    """

    latents: Tensor
    visible: Tensor
    still: Tensor | None = None


@dataclass(frozen=True)
class VideoBatch:
    """A batch of clips as the loader gives them.

    latents (B,C,T,H,W) fp32 normalised; cameras of the F = 1 + (T-1)*R raw frames; fps (B,);
    captions: B lists with one string per shot; shot (B,T) int64; keys: sample names;
    position (B,) int64: index of each sample in the run's endless order, the seed of its noise and dropout;
    warp: where a set is a warp adapter's.
    """

    latents: Tensor
    cameras: Cameras
    fps: Tensor
    captions: tuple[tuple[str, ...], ...]
    shot: Tensor
    keys: tuple[str, ...]
    position: Tensor
    warp: Warp | None = None

    def to(self, device: torch.device | str) -> VideoBatch:
        """All but positions, which seed CPU generators: there they cost no synchronisation."""
        return dataclasses.replace(_map_tensors(self, lambda x: x.to(device)), position=self.position)


class Denoiser(Protocol):
    """v, state = denoiser(x_BCTHW, t_BT, cond, state, commit=...); `x - t v` is the path's end at t = 0."""

    def __call__(
        self, x: Tensor, t: Tensor, cond: Conditioning, state: Any = None, *, commit: bool = False
    ) -> tuple[Tensor, Any]: ...


class Shard(Protocol):
    """How a block hears of context parallelism: this rank holds `frames(total)` of a call's latent frames (spec 5.4).

    Every rank of the group calls the same operations in the same order. All are differentiable, and gradients are
    those of the sum of the ranks' losses. `vgr.parallel.context.ContextShard` implements it.
    """

    rank: int
    size: int

    def frames(self, total: int, rank: int | None = None) -> tuple[int, int]:
        """Frames a (included) to b (excluded) of `total` that this rank, or the given one, holds."""

    def all_gather(self, x: Tensor, dim: int = 0, total: int | None = None) -> Tensor:
        """The ranks' tensors joined along dim: equal lengths, or the ranks' frames of `total`."""

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """The first axis dealt out in pieces of `send` rows to ranks 0, 1, ...; theirs to this one, joined in order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks of something small (it is gathered first)."""

    def halo(self, x: Tensor, reach: int, total: int) -> Tensor:
        """x (B,T,...), this rank's frames a to b of `total`, widened to frames max(a-reach,0) to min(b+reach,total)."""

    def prefix(self, c: Tensor, h: Tensor, reverse: bool = False) -> Tensor:
        """The state that reaches this rank through the ones before it, each mapping S to C_p S + H_p, from zero.

        c (X,K,K), h (X,K,E) to (X,K,E); reverse: through the ranks after it, the last one first.
        """


class Codec(Protocol):
    """Video <-> latents, as real VAEs do it. Video is (B,3,F,H,W) in [-1, 1]; latents are normalised.

    stride (t, h, w): F raw frames give T = 1 + (F-1)/t latent frames, the first frame stands alone; clip: so many
    latent frames are encoded and decoded by themselves, as a video of their own, None: the video is one clip.
    `fingerprint` names configuration and weights; shards and checkpoints carry it.
    """

    stride: tuple[int, int, int]
    clip: int | None
    channels: int
    fingerprint: str

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def stream(self) -> Callable[[Tensor], Tensor]:
        """Takes successive latent frames, gives their raw frames; together they equal `decode`."""
        ...


class TextEncoder(Protocol):
    """Captions, B tuples of S strings (ragged S is padded with masked shots), to TextStates on its own device."""

    width: int

    def __call__(self, captions: tuple[tuple[str, ...], ...]) -> TextStates: ...
