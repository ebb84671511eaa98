"""What moves on its own: found, kept out of the warp's evidence, or carried along (specs/warp-adapter 2.3, "dynamic
objects").

Of a pair of frames the second is brought onto the first by depth and cameras; where everything stands still they then
agree, and dense flow between them is what the camera does not explain, at any distance between the frames. Flow that
does not come back, what the second frame hides and what lies outside it tell nothing. Where nothing is drawn flow is
a guess, so motion also has to show: the first frame must differ from the second as the camera moved it by more than
from the second as flow moved it. Pairs before and after a frame vote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vgr.geometry.conventions import Array
from vgr.geometry.splat import pixel_centres, pixel_map
from vgr.geometry.warp import Keyframes, Warped, known_depth, warp

REACH = (1, 2, 4)  # frames from the first of a pair to the second, before and after
_LEAST_PX, _SHARE = 0.6, 0.15  # own motion is more, and more than this share of the camera's parallax (depth's error)
_HIDDEN = 1.2  # depth of a point over that seen where it would be: something stands before it
_LOOK_BACK = (8, 4, 2, 1)  # frames over which a way is measured: the farthest in which enough of the thing is known
_ENOUGH = 0.3  # of a thing's pixels
_SHOWS = 1.0  # levels of 255
_SMALL, _HOLE = 6e-4, 1.2e-2  # of the picture: what moves is larger, holes in it are not
Mask = NDArray[np.bool_]


class Moving(NamedTuple):
    """One thing in a frame: mask (H,W) bool; velocity (3,), a frame's way along world axes in the unit of depth."""

    mask: Mask
    velocity: Array


class _Pair(NamedTuple):
    """Frame b brought onto frame a: at (H,W,2), pixels of b from its corner where a's are if still; flow (H,W,2), what
    is left; ratio (H,W), depth there if still over the depth seen there, NaN where that is unknown; where something is
    known (H,W), and that it moves."""

    at: NDArray[np.float32]
    flow: NDArray[np.float32]
    ratio: NDArray[np.float32]
    known: Mask
    moves: Mask


def moving_mask(
    frames_FHW3: NDArray[np.uint8], depth_FHW: ArrayLike, c2w_F44: ArrayLike, intrinsics: ArrayLike
) -> Mask:
    """Where frames (F,H,W,3) uint8 of one shot show something that moves on its own: (F,H,W) bool.

    depth (F,H,W) planar, 0 or not finite where unknown, in the unit of the cameras c2w (F,4,4); intrinsics (4,) or
    (F,4), normalised. Own motion is told from about half a pixel over REACH frames; nothing is told where no depth is
    known. ValueError for shapes that do not match and fewer than 3 frames.
    """
    frames, depth, c2w, k = _checked(frames_FHW3, depth_FHW, c2w_F44, intrinsics)
    found = np.zeros(depth.shape, bool)
    for f in range(len(frames)):
        votes = np.zeros((2, *depth.shape[1:]), np.int32)
        for g in (f + n for reach in REACH for n in (-reach, reach) if 0 <= f + n < len(frames)):
            pair = _pair(frames, depth, c2w, k, f, g)
            votes += np.multiply((pair.moves, pair.known), abs(g - f))  # slow motion shows over long reaches only
        found[f] = _tidy(2 * votes[0] > votes[1])
    return found


def own_motion(
    frames_FHW3: NDArray[np.uint8], depth_FHW: ArrayLike, c2w_F44: ArrayLike, intrinsics: ArrayLike,
    moving_HW: Mask,
) -> list[Moving]:
    """The things of the last frame's mask (H,W), the largest first, each with its own velocity.

    Arguments as `moving_mask`. A thing is a connected part of the mask; its velocity the median of its pixels' ways,
    lifted by the depth of both frames, from 8 frames before or, where too little of it is known by then, fewer. The
    depth of the frame before is first brought to agree with the last's where nothing moves.
    """
    import cv2

    frames, depth, c2w, k = _checked(frames_FHW3, depth_FHW, c2w_F44, intrinsics)
    if moving_HW.shape != depth.shape[1:]:
        raise ValueError(f"the mask must be {depth.shape[1:]}, that of the last frame; got {moving_HW.shape}")
    last, ways = len(frames) - 1, []
    y, x = np.indices(moving_HW.shape, np.float32)
    now = _lift(np.stack([x, y], axis=2) + 0.5, depth[last], c2w[last], k[last])
    for n in (n for n in _LOOK_BACK if n <= last):
        pair = _pair(frames, depth, c2w, k, last, last - n)
        before = cv2.remap(pair.at, x + pair.flow[..., 0], y + pair.flow[..., 1], cv2.INTER_LINEAR)
        still = pair.ratio[np.isfinite(pair.ratio) & ~moving_HW]
        agreed = depth[last - n] * (np.median(still) if len(still) else 1)
        way = (now - _lift(before, agreed, c2w[last - n], k[last - n])) / n
        way[~pair.known] = np.nan
        ways.append(way)
    count, part, stats, _ = cv2.connectedComponentsWithStats(moving_HW.astype(np.uint8))
    things = []
    for i in sorted(range(1, count), key=lambda i: -stats[i, cv2.CC_STAT_AREA]):
        mask = part == i
        told = [own[np.isfinite(own).all(1)] for own in (way[mask] for way in ways)]
        enough = next((own for own in told if len(own) > _ENOUGH * mask.sum()), np.zeros((1, 3)))
        things.append(Moving(mask, np.median(enough, axis=0)))
    return things


def carry(
    keyframes: Keyframes, moving: Sequence[Moving], c2w_F44: Tensor, intrinsics_F4: Tensor, after_F: Sequence[float],
    *, samples: int | None = None, atlas: bool = False,
) -> Warped:
    """`vgr.geometry.warp.warp` in which the first keyframe's moving things go on as they went.

    after (F,): how many frames after the first keyframe each target is. A thing that has gone a way is seen as the
    camera would see it had it gone the opposite way, so each is a warp of its own, and the nearest surface is shown.
    Where other keyframes show moving things their depth has to be 0. ValueError as `warp`, and for masks and times that
    do not fit.
    """
    if len(after_F) != len(c2w_F44) or any(thing.mask.shape != tuple(keyframes.depth.shape[1:]) for thing in moving):
        raise ValueError(f"{len(c2w_F44)} targets want as many times, and depth {tuple(keyframes.depth.shape)} masks "
                         f"of its size; got {len(after_F)}, {[thing.mask.shape for thing in moving]}")  # fmt: skip
    masks = [torch.from_numpy(thing.mask).to(keyframes.depth.device) for thing in moving]
    still, layers = keyframes.depth.clone(), []
    for mask in masks:
        still[0].masked_fill_(mask, 0)
    left = known_depth(still).flatten(1).any(1)
    if bool(left.any()):
        stay = Keyframes(keyframes.images[left], still[left], keyframes.intrinsics[left], keyframes.c2w[left])
        layers.append(warp(stay, c2w_F44, intrinsics_F4, samples=samples, atlas=atlas))
        number = torch.cat([left.nonzero()[:, 0], left.new_tensor([-1], dtype=torch.int64)])  # -1 stays -1
        layers[0].keyframe.copy_(number[layers[0].keyframe.long()])
    after = torch.as_tensor(after_F, dtype=torch.float64)[:, None]
    for thing, mask in zip(moving, masks):
        depth = torch.where(mask, keyframes.depth[:1], 0)
        if not bool(known_depth(depth).any()):
            continue
        gone = c2w_F44.double().clone()
        gone[:, :3, 3] -= (after * torch.from_numpy(thing.velocity)).to(gone.device)
        one = Keyframes(keyframes.images[:1], depth, keyframes.intrinsics[:1], keyframes.c2w[:1])
        layers.append(warp(one, gone, intrinsics_F4, samples=samples))
    best = layers[0]
    for layer in layers[1:]:
        nearer = layer.visible & (~best.visible | (layer.depth < best.depth))
        best = Warped(torch.where(nearer[:, None], layer.images, best.images), best.visible | nearer,
                      torch.where(nearer, layer.depth, best.depth),
                      torch.where(nearer, layer.keyframe, best.keyframe))
    return best


def _pair(frames: NDArray[np.uint8], depth: NDArray[np.float32], c2w: Array, k: Array, a: int, b: int) -> _Pair:
    import cv2

    size_hw = depth.shape[1:]
    known = depth[a] > 0
    to = pixel_map(*(torch.from_numpy(x) for x in (c2w[a], k[a], c2w[b], k[b])), size_hw).numpy()
    ray = np.einsum("ij,jhw->hwi", to[:, :3], pixel_centres(size_hw, torch.device("cpu")).numpy())
    point = ray * depth[a][..., None] + to[:, 3]
    z = point[..., 2]
    known &= z > 0
    at = (point[..., :2] / np.where(known, z, 1)[..., None]).astype(np.float32)
    parallax = np.linalg.norm(at - ray[..., :2] / ray[..., 2:], axis=2)
    known &= ((at > 0) & (at < size_hw[::-1])).all(2)
    x, y = np.where(known, at.transpose(2, 0, 1), 0.5) - 0.5
    there = cv2.remap(depth[b], x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    grey_a, grey_b = (cv2.cvtColor(frames[i], cv2.COLOR_RGB2GRAY) for i in (a, b))
    brought = cv2.remap(grey_b, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    brought[~known] = grey_a[~known]  # what is not in b agrees, and draws no flow to it
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow, back = dis.calc(grey_a, brought, None), dis.calc(brought, grey_a, None)
    v, u = np.indices(size_hw, np.float32)
    u, v = u + flow[..., 0], v + flow[..., 1]
    lost = np.linalg.norm(flow + cv2.remap(back, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), axis=2)
    ratio = np.where(known & (there > 0), z / np.maximum(there, 1e-12), np.nan)
    hidden = cv2.dilate((ratio > _HIDDEN).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0  # as far as blur reaches
    known &= ~hidden & (lost < 1 + 0.05 * np.linalg.norm(flow, axis=2))
    followed = cv2.remap(brought, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    off, left = (cv2.blur(cv2.absdiff(grey_a, other).astype(np.float32), (3, 3)) for other in (brought, followed))
    own = (np.linalg.norm(flow, axis=2) > _LEAST_PX + _SHARE * parallax) & (off > left + _SHOWS)
    return _Pair(at, flow, ratio, known, own & known)


def _lift(pixels_HW2: NDArray[np.float32], depth_HW: NDArray[np.float32], c2w_44: Array, k_4: Array) -> Array:
    """World points (H,W,3) of pixels of a frame, by its depth there; NaN where that is not known."""
    import cv2

    size_hw = depth_HW.shape
    z = cv2.remap(depth_HW, *(pixels_HW2 - 0.5).transpose(2, 0, 1), cv2.INTER_NEAREST).astype(np.float64)
    z[z <= 0] = np.nan
    local = (pixels_HW2 / size_hw[::-1] - k_4[2:]) / k_4[:2]
    return (np.concatenate([local, np.ones((*size_hw, 1))], axis=2) * z[..., None]) @ c2w_44[:3, :3].T + c2w_44[:3, 3]


def _tidy(mask: Mask) -> Mask:
    """Gaps closed, threads and specks left out, holes filled."""
    import cv2

    whole = cv2.morphologyEx(
        mask.astype(np.uint8), cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    )
    whole = cv2.morphologyEx(whole, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    for value, least in ((0, _HOLE), (1, _SMALL)):
        _, part, stats, _ = cv2.connectedComponentsWithStats((whole == value).astype(np.uint8), connectivity=4)
        small = stats[:, cv2.CC_STAT_AREA] < least * mask.size
        small[0] = False  # all that is not of this value
        whole[small[part]] = 1 - value
    return whole > 0


def _checked(
    frames: NDArray[np.uint8], depth: ArrayLike, c2w: ArrayLike, k: ArrayLike
) -> tuple[NDArray[np.uint8], NDArray[np.float32], Array, Array]:
    depth, c2w, k = np.asarray(depth, np.float32), np.asarray(c2w, np.float64), np.asarray(k, np.float64)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) < 3:
        raise ValueError(f"frames must be uint8 of shape (F, H, W, 3), F >= 3; got {frames.dtype} {frames.shape}")
    if depth.shape != frames.shape[:3] or c2w.shape != (len(frames), 4, 4) or k.shape not in ((4,), (len(frames), 4)):
        raise ValueError(f"frames {frames.shape} want depth {frames.shape[:3]}, one a pixel, c2w ({len(frames)}, 4, 4) "
                         f"and intrinsics (4,) or one a frame; got {depth.shape}, {c2w.shape}, {k.shape}")  # fmt: skip
    if not np.isfinite(c2w).all():
        raise ValueError("c2w holds numbers that are not finite: leave frames that are not registered out")
    return frames, np.where(np.isfinite(depth), depth, 0), c2w, np.broadcast_to(k, (len(frames), 4)).copy()
