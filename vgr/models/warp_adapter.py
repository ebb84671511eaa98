"""Warp-as-History: the past as the wanted camera sees it, given to any denoiser that takes `cond.history`.

Sections are those of the warp adapter's specification. What the camera cannot see is dropped token by token, and
beyond the first, noisiest part of denoising all of it: there the base alone decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgr.geometry.moving import Moving, carry, moving_mask, own_motion
from vgr.geometry.warp import Keyframes, chunk_video, known_depth, warp
from vgr.nn import lora
from vgr.seeding import noised_frames
from vgr.types import Cameras, Codec, Conditioning, Denoiser, HistoryBlock, Layout, raw_frames

# Depth (H,W) of an image (H,W,3) uint8, the raw frame of that number; 0 or not finite where nothing can be said.
DepthOf = Callable[[Tensor, int], Tensor]
RULES = ("area", "center")  # of `select_tokens`
MOVING = ("keep", "drop", "carry")
FROM_TIME = 0.74  # evidence is read at times from there on: Helios' first stage (8.3)
MAX_RESCALE = 10.0  # of a keyframe's depth, to that of the scene so far (2.1)
_LOOK_BACK = 9  # frames before a chunk in which what moves is sought


def select_tokens(
    visible: Tensor, stride: tuple[int, int, int], patch: tuple[int, int, int], threshold: float = 0.1,
    rule: str = "area",
) -> Tensor:  # fmt: skip
    """Tokens (B,t,h,w), bool, that are visible enough to be kept (2.5); training and inference call it alike (3.4).

    visible (B,F,H,W): bool, or from 0 to 1, of the F = 1 + (T-1) R raw frames; stride (R, h, w): raw frames and pixels
    of a latent; patch (t,h,w): latents of a token, the last frames and cells repeated to fill it. A latent frame is as
    visible as its last raw frame, a token as its latents on average, and it is kept from `threshold` on. rule: how
    visible a latent is. "area": the mean of its pixels; "center": bilinear at its centre, as published, which under a
    stride of 8 reads 4 pixels of 64. Ours is the default: what a threshold says of a token is then true of all of it,
    and specks at centres do not decide. A published adapter was trained with the other. ValueError for other rules and
    sizes.
    """
    _, frames, height, width = visible.shape
    if rule not in RULES or (frames - 1) % stride[0] or height % stride[1] or width % stride[2]:
        raise ValueError(
            f"visible (B,F,H,W) of {frames} frames, {height}x{width}, by rule {rule}: F must be 1 + a multiple of "
            f"{stride[0]}, the sizes multiples of {stride[1]} and {stride[2]}, the rule area or center"
        )
    share = visible[:, :: stride[0]].float()
    if rule == "area":
        share = F.avg_pool2d(share, stride[1:])
    else:
        share = F.interpolate(share, (height // stride[1], width // stride[2]), mode="bilinear")
    rest = [-size % p for size, p in zip(share.shape[1:], patch)]
    share = F.pad(share[:, None], (0, rest[2], 0, rest[1], 0, rest[0]), mode="replicate")
    return F.avg_pool3d(share, patch)[:, 0] >= threshold


def evidence_block(
    latents: Tensor, visible: Tensor, position: Tensor, seeds: Sequence[int], *, stride: tuple[int, int, int],
    patch: tuple[int, int, int] = (1, 2, 2), threshold: float = 0.1, rule: str = "area", tier: str = "short",
    noise: tuple[float, float] = (0.111, 0.135),
) -> HistoryBlock:  # fmt: skip
    """A warp's latents (B,C,T,H,W) as evidence of the frames at `position` (T,), with noise on them (2.4, 2.5).

    Each frame becomes sigma eps + (1 - sigma) x, sigma uniform within `noise`; both are functions of its row's seed
    and its position alone. The others: see `select_tokens`. ValueError where visible is not of these latents.
    """
    keep = select_tokens(visible, stride, patch, threshold, rule)
    if visible.shape[1] != 1 + (latents.shape[2] - 1) * stride[0] or len(seeds) != len(latents):
        raise ValueError(
            f"{latents.shape[2]} latent frames of {len(latents)} rows need {1 + (latents.shape[2] - 1) * stride[0]} "
            f"raw frames and as many seeds, got {visible.shape[1]} and {len(seeds)}"
        )
    return HistoryBlock(noised_frames(latents, seeds, "evidence", position, noise), position, tier, keep)


def with_evidence(denoiser: Denoiser, evidence: Sequence[HistoryBlock] = (), from_time: float = FROM_TIME) -> Denoiser:
    """`denoiser` with `evidence` beside what cond.history holds, all of it only at times from `from_time` on (8.3).

    The time that counts is a sample's chunk's, the latest of its frames: a given first frame stands at 0. Chunks below
    it lose their evidence, and calls in which all do are the base's. Commits, whose time is 0, have none. The state is
    the denoiser's, and so are `new_state`, `lean` and what it takes. ValueError for one that takes no history.
    """
    if not getattr(denoiser, "takes_history", False):
        name = getattr(denoiser, "__name__", type(denoiser).__name__)
        raise ValueError(f"{name} does not read cond.history: evidence would change nothing")

    def call(x: Tensor, t: Tensor, cond: Conditioning, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        history = (*cond.history, *evidence)
        open_BT = None if not history else _latest(t, cond.layout) >= from_time
        history = [_among(block, open_BT, cond.layout) for block in history]
        cond = dataclasses.replace(cond, history=tuple(block for block in history if block is not None))
        return denoiser(x, t, cond, state, **options)

    return _as(call, denoiser)


def _as(call: Any, denoiser: Any) -> Denoiser:
    """`call`, which has the denoiser's states and takes what it takes."""
    for name in ("new_state", "lean", "takes_history", "takes_cameras"):
        if hasattr(denoiser, name):
            setattr(call, name, getattr(denoiser, name))
    return call


def where_shown(adapted: Denoiser, frozen: Denoiser) -> Denoiser:
    """The adapted model where a call has evidence, the frozen one elsewhere, and for all that is committed."""

    def call(
        x: Tensor, t: Tensor, cond: Conditioning, state: Any = None, *, commit: bool = False
    ) -> tuple[Tensor, Any]:
        return (adapted if cond.history and not commit else frozen)(x, t, cond, state, commit=commit)

    return _as(call, frozen)


def _latest(t: Tensor, layout: Layout) -> Tensor:
    """Of each frame the latest time (B,T) of the frames of its chunk and role."""
    together = (layout.chunk[:, None] == layout.chunk) & (layout.role[:, None] == layout.role)
    return torch.where(together, t[:, None], 0.0).amax(2)


def _among(block: HistoryBlock, open_BT: Tensor, layout: Layout) -> HistoryBlock | None:
    """What is left of a block where its targets are open: itself if all are, None if none."""
    targets = (layout.role == 0).nonzero()[:, 0]
    place = targets[(layout.position[targets] == block.position[:, None]).int().argmax(1)]
    shown = open_BT[:, place]
    some, every = torch.stack([shown.any(), shown.all()]).tolist()
    if every or not some:
        return block if every else None
    if block.keep is None or block.keep.shape[1] != len(block.position):
        raise ValueError("samples or chunks on both sides of from_time need evidence whose `keep` tells frames apart")
    return dataclasses.replace(block, keep=block.keep & shown[:, :, None, None])


@dataclass(frozen=True)
class _Keyframe:
    frame: int
    image: Tensor
    depth: Tensor


def _still(depth: Tensor, mask_HW: np.ndarray) -> Tensor:
    """Depth without what moves; all of it where nothing else is known, as a keyframe has to show something."""
    still = torch.where(torch.from_numpy(mask_HW), 0, depth)
    return still if bool(known_depth(still).any()) else depth


def without_adapters(model: torch.nn.Module) -> Denoiser:
    """The model as it is without its adapters (`nn.lora`), frozen beside itself."""

    def call(x: Tensor, t: Tensor, cond: Conditioning, state: Any = None, **options: Any) -> tuple[Tensor, Any]:
        with lora.without(model):
            return model(x, t, cond, state, **options)

    return _as(call, model)


class WarpEvidence:
    """Called with a chunk's conditioning and the raw frames before it, gives the chunk's evidence (2.3, 4.1).

    `diffusion.rollout.Session` asks it as a chunk is about to be made. cameras (1,F): of all raw frames the rollout
    will have, in the unit of depth_of at its first frame; a frame made is taken to be where its camera was told to be.
    rescale: each keyframe's depth is brought to the scale of what is known already where the two see the same; False
    where depth_of has one scale anyway. keyframes: how many are kept beside the newest, the first image and the ends of
    the latest chunks; memory does not grow beyond them. moving: what moves on its own is warped as if it stood
    ("keep", as published), left out ("drop"), or taken along its own way ("carry"). The other arguments:
    `evidence_block`'s and `vgr.geometry.warp.warp`'s. ValueError for cameras that end before the rollout.
    """

    def __init__(
        self, cameras: Cameras, depth_of: DepthOf, codec: Codec, *, seed: int, keyframes: int = 4,
        threshold: float = 0.1, rule: str = "area", rules: str = "ours", atlas: bool = False, rescale: bool = True,
        moving: str = "drop",
    ) -> None:  # fmt: skip
        if keyframes < 1 or cameras.c2w.ndim != 4 or len(cameras.c2w) != 1:
            raise ValueError(f"keyframes={keyframes} with cameras {tuple(cameras.c2w.shape)}: at least 1, of one video")
        if moving not in MOVING:
            raise ValueError(f"moving={moving}: choose {', '.join(MOVING)}")
        if moving == "carry" and rules != "ours":
            raise ValueError("moving=carry is drawn by our rules; use rules=ours")
        self.cameras, self.depth_of, self.codec, self.seed = cameras, depth_of, codec, seed
        self.keyframes, self.rescale, self.moving = keyframes, rescale, moving
        self.select, self.rules, self.atlas = {"threshold": threshold, "rule": rule}, rules, atlas
        self._kept: list[_Keyframe] = []

    def __call__(self, cond: Conditioning, before: Tensor | None) -> tuple[HistoryBlock, ...]:
        """One block, at the positions of the chunk's frames; none where nothing was seen yet."""
        if before is None:
            return ()
        position, stride = cond.layout.position, self.codec.stride[0]
        begins = int(position[0]) == 0
        alone = begins or self.codec.clip is not None  # a clip of its own, behind nothing
        a, b = (raw_frames(int(p), stride, self.codec.clip) for p in (position[0], position[-1] + 1))
        if b > self.cameras.c2w.shape[1]:
            raise ValueError(f"the rollout goes to raw frame {b - 1}, but the camera's path has only "
                             f"{self.cameras.c2w.shape[1]} frames: give a longer path or fewer seconds")  # fmt: skip
        things = self._add(before[-_LOOK_BACK:], max(a - 1, 0))
        newest, way = self._geometry(self._kept[::-1]), (self.cameras.c2w[0, a:b], self.cameras.intrinsics[0, a:b])
        if things:
            found = carry(newest, things, *way, torch.arange(1, b - a + 1), atlas=self.atlas)
        else:
            found = warp(newest, *way, rules=self.rules, atlas=self.atlas)
        video, visible = chunk_video(found, newest.images[0], begins=begins)
        if things:  # from here on only what stands still serves
            mask = np.any([thing.mask for thing in things], axis=0)
            self._kept[-1] = replace(self._kept[-1], depth=_still(self._kept[-1].depth, mask))
        video = video[:, 1:] if alone and not begins else video
        latents = self.codec.encode(video[None].to(position.device))[:, :, 0 if alone else 1 :]
        shown = visible[None, 0 if alone else stride - 1 :]  # from the first latent frame's last raw frame on
        return (evidence_block(latents, shown, position, [self.seed], stride=self.codec.stride, **self.select),)

    def _add(self, frames: Tensor, last: int) -> list[Moving]:
        """The newest keyframe, frames' last, number `last`; gives what is to be carried. Of older ones the first and
        the latest stay."""
        numbers = range(last + 1 - len(frames), last + 1)
        depth = self.depth_of(frames[-1], last).float()
        picture = frames[-1].permute(2, 0, 1).float() / 127.5 - 1
        scale = self._scale(depth, last)
        things: list[Moving] = []
        if self.moving != "keep" and len(frames) >= 3:
            depths = torch.stack([*(self.depth_of(x, n).float() for x, n in zip(frames[:-1], numbers)), depth]) * scale
            c2w, k = (x[0, list(numbers)].double().numpy() for x in (self.cameras.c2w, self.cameras.intrinsics))
            shot = frames.numpy(), depths.numpy(), c2w, k
            mask = moving_mask(*shot)[-1]
            if self.moving == "carry":
                things = own_motion(*shot, mask)
            else:
                depth = _still(depth, mask)
        self._kept.append(_Keyframe(last, picture, depth * scale))
        if len(self._kept) > self.keyframes + 1:
            del self._kept[1]
        return things

    def _scale(self, depth: Tensor, frame: int) -> float:
        """What brings a new frame's depth to that of the keyframes, 1 without any (2.3)."""
        if not self._kept or not self.rescale:
            return 1.0
        at = slice(frame, frame + 1)
        seen = warp(self._geometry(self._kept[::-1]), self.cameras.c2w[0, at], self.cameras.intrinsics[0, at])
        both = seen.visible[0] & known_depth(depth) & known_depth(seen.depth[0])
        if not bool(both.any()):
            return 1.0
        return float((seen.depth[0][both] / depth[both]).median().clamp(1 / MAX_RESCALE, MAX_RESCALE))

    def _geometry(self, kept: list[_Keyframe]) -> Keyframes:
        at = [one.frame for one in kept]
        return Keyframes(
            torch.stack([one.image for one in kept]), torch.stack([one.depth for one in kept]),
            self.cameras.intrinsics[0, at].float(), self.cameras.c2w[0, at].float(),
        )  # fmt: skip
