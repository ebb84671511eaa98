"""Forward warp: frames whose depth is known as other cameras see them, and where they see nothing known.

Our rules (specs/warp-adapter 2.3, "Better rules"): the depth picture is a mesh of 2x2 quads, torn where the depths of a
quad's corners differ by more than BREAK; samples of it are splatted as depth alone, the nearest wins; a hole with four
seen neighbours takes their mean depth; then every seen pixel's centre is lifted by its depth and looked up in the
keyframe that won it. So a frame seen from its own camera is itself. A face that a keyframe grazes, a few pixels high
there, is torn: it shows in stripes from where it is seen in full. Published rules: `warp_published`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgr.geometry.splat import (
    Atlas,
    corners,
    land,
    look_up,
    mesh_samples,
    nearest_depth,
    over_window,
    pixel_centres,
    pixel_map,
    tall,
)
from vgr.geometry.warp_published import published_frames

RULES = ("ours", "published")
BREAK = 1.05  # nearest to farthest corner of a quad; 1.03 to 1.10 give the same
SAMPLES = {"ours": 2, "published": 4}  # along a quad's side
SAME = 1.01  # depths of two keyframes within this are one surface: the earlier keyframe shows it, without speckle
_ROUNDING = 1e-3  # of rotations written with four decimals or more


@dataclass(frozen=True)
class Keyframes:
    """K frames with known geometry, the preferred one first: where several see a surface, the first shows it.

    images (K,C,H,W) of floats; depth (K,H,W) along z in the unit of the poses, 0 or not finite where unknown;
    intrinsics (K,4), normalised; c2w (K,4,4). Raises ValueError for shapes that do not match, integers for colours, a
    frame without any depth, numbers that are not finite and poses that are not rigid or that mirror.
    """

    images: Tensor
    depth: Tensor
    intrinsics: Tensor
    c2w: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or min(shape) < 1 or min(shape[2:]) < 2:
            raise ValueError(f"images must have shape (K,C,H,W), H and W at least 2; got {shape}")
        if not self.images.is_floating_point():
            raise ValueError(f"images must be floats; got {self.images.dtype}: divide levels by 255")
        if not bool(self.images.isfinite().all()):
            raise ValueError("images hold numbers that are not finite; mark unknown pixels by depth 0, not by colour")
        wanted = (shape[0], *shape[2:])
        if tuple(self.depth.shape) != wanted or not self.depth.is_floating_point():
            raise ValueError(f"depth must be floats of shape (K,H,W) = {wanted}, one a pixel of the images; got "
                             f"{self.depth.dtype} of {tuple(self.depth.shape)}: resize depth or images")  # fmt: skip
        known = known_depth(self.depth).flatten(1).any(1).tolist()
        if not all(known):
            raise ValueError(f"depth of keyframe {known.index(False)} has no pixel that is finite and > 0; "
                             "leave that keyframe out or estimate its depth again")  # fmt: skip
        _check_cameras("keyframe", self.c2w, self.intrinsics, shape[0])


@dataclass(frozen=True)
class Warped:
    """F frames. images (F,C,H,W); visible (F,H,W) bool; depth (F,H,W) along the target's z; keyframe (F,H,W), int16.

    Not visible: the first keyframe's mean colour, depth 0, keyframe -1. Seen in the background atlas only: visible,
    depth infinite, keyframe -1.
    """

    images: Tensor
    visible: Tensor
    depth: Tensor
    keyframe: Tensor


def known_depth(depth: Tensor) -> Tensor:
    """Where depth is known: finite and > 0."""
    return depth.isfinite() & (depth > 0)


def median_depth(depth: Tensor) -> float:
    """Median of the known depths (finite and > 0) of any shape, in their unit: the scale of presets (6.2) and of
    published pose files, a tenth of it (2.2). ValueError if none is known."""
    known = depth[known_depth(depth)]
    if not len(known):
        raise ValueError(f"depth of shape {tuple(depth.shape)} has no pixel that is finite and > 0, so no median")
    return float(known.median())


@torch.no_grad()
def warp(
    keyframes: Keyframes,
    c2w_F44: Tensor,
    intrinsics_F4: Tensor,
    *,
    rules: str = "ours",
    samples: int | None = None,
    atlas: bool = False,
) -> Warped:
    """Keyframes as F cameras see them, in float32 on the keyframes' device, frame by frame (specs/warp-adapter 2.3).

    c2w (F,4,4) in the keyframes' world and unit, intrinsics (F,4). rules: "ours", or "published", which tears at
    vertices, splats colours and has the first frame of a clip replaced by its source: that is the caller's. samples
    along a quad's side, 2 by our rules and 4 by published ones: no fewer than a picture is stretched, as in a dolly
    to a third of the distance by 3. atlas fills what is left by direction with what lies far; published from the
    second chunk on. Raises ValueError as `Keyframes` does, for an unknown rule, samples < 1 and no frames.
    """
    if rules not in RULES:
        raise ValueError(f"rules must be one of {', '.join(RULES)}; got {rules!r}")
    count = SAMPLES[rules] if samples is None else samples
    if count < 1:
        raise ValueError(f"samples must be at least 1 along a quad's side; got {samples}")
    _check_cameras("target", c2w_F44, intrinsics_F4, len(c2w_F44))
    device, size_hw = keyframes.images.device, tuple(keyframes.depth.shape[1:])
    images = keyframes.images.float()
    depth = torch.where(known_depth(keyframes.depth), keyframes.depth, 0).float()
    c2w_F44, k_F4, c2w_K44, k_K4 = (x.to(device) for x in (c2w_F44, intrinsics_F4, keyframes.c2w, keyframes.intrinsics))
    there_FK34 = pixel_map(c2w_K44[None], k_K4[None], c2w_F44[:, None], k_F4[:, None], size_hw)
    if rules == "ours":
        back_FK34 = pixel_map(c2w_F44[:, None], k_F4[:, None], c2w_K44[None], k_K4[None], size_hw)
        frames = _frames(images, depth, there_FK34, back_FK34, count)
    else:
        frames = published_frames(images, depth, k_K4, there_FK34, count)
    shape, mean = (len(c2w_F44), *size_hw), images[0].mean((1, 2))[:, None, None]
    types = {"visible": torch.bool, "depth": torch.float32, "keyframe": torch.int16}
    parts = {name: torch.empty(shape, dtype=dtype, device=device) for name, dtype in types.items()}
    found = Warped(images.new_empty(shape[0], images.shape[1], *size_hw), **parts)
    for f, (image, visible, away, which) in enumerate(frames):
        found.images[f] = torch.where(visible, image, mean)
        found.visible[f], found.depth[f], found.keyframe[f] = visible, away, which
    if atlas:
        _behind(found, Atlas(images, depth, k_K4, c2w_K44), k_F4, c2w_F44)
    return found


def forward_warp(
    image_CHW: Tensor, depth_HW: Tensor, intrinsics: Tensor, source_c2w: Tensor, target_c2w: Tensor
) -> tuple[Tensor, Tensor]:
    """One frame as another camera with the same intrinsics (4,) sees it: image (C,H,W) and visible (H,W) bool.

    c2w (4,4) each, depth in their unit, 0 or not finite where unknown; by our rules. See `warp`; the same errors.
    """
    frame = Keyframes(image_CHW[None], depth_HW[None], intrinsics[None], source_c2w[None])
    found = warp(frame, target_c2w[None], intrinsics[None])
    return found.images[0], found.visible[0]


def chunk_video(found: Warped, source_CHW: Tensor, *, begins: bool) -> tuple[Tensor, Tensor]:
    """A chunk's warp of F frames as a codec is to see it, (C,n,H,W), and what is visible of them, (F,H,W) (2.4).

    The source, the frame before, stands before the chunk's frames, n = 1 + F, so that the codec knows whence they come,
    and its latent is left out afterwards. A chunk that begins a video begins with the source: it is frame 0, n = F.
    """
    images, visible, source = found.images, found.visible, source_CHW[None].float()
    if begins:
        images, visible = torch.cat([source, images[1:]]), torch.cat([torch.ones_like(visible[:1]), visible[1:]])
    else:
        images = torch.cat([source, images])
    return images.transpose(0, 1), visible


def _surface(depth_HW: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Points (3,N) of one depth picture: samples of its whole quads, and pixels that no four of them surround; and
    1 / depth (H,W), NaN beside quads that are not whole."""
    four = corners(depth_HW[None])[:, 0]
    whole = (four.amin(0) > 0) & (four.amax(0) <= BREAK * four.amin(0))
    points = depth_HW * pixel_centres(tuple(depth_HW.shape), depth_HW.device)
    # A pixel amid whole quads has samples all about it; at a tear its own point keeps the rim of the surface.
    rim, torn = (~corners(pad(whole, (1, 1, 1, 1), value=outside)[None]).all(0)[0] for outside in (False, True))
    points = torch.cat([mesh_samples(points, whole, count), points[:, rim & (depth_HW > 0)]], dim=1)
    return points, depth_HW.reciprocal().masked_fill(torn, torch.nan)


def _frames(
    images_KCHW: Tensor, depth_KHW: Tensor, there_FK34: Tensor, back_FK34: Tensor, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Image, visible, depth and keyframe of each frame by our rules."""
    size_hw = tuple(depth_KHW.shape[1:])
    surfaces, inverse = zip(*(_surface(depth, count) for depth in depth_KHW))
    pictures = tall(torch.cat([images_KCHW, torch.stack(inverse)[:, None]], dim=1))  # one look-up for both
    centres_3N = pixel_centres(size_hw, images_KCHW.device).flatten(1)
    for there_K34, back_K34 in zip(there_FK34, back_FK34):
        depth, which = _fill(*_nearest(surfaces, there_K34, size_hw))
        seen = depth.isfinite()
        depth = torch.where(seen, depth, 1)
        x, y = _trace(centres_3N, depth, which, back_K34)
        looked = look_up(pictures, x, y, which, size_hw[0])
        depth = _refine(depth, x, y, which, 1 / looked[-1], there_K34)
        yield looked[:-1], seen, torch.where(seen, depth, 0), torch.where(seen, which, -1)


def _nearest(surfaces: tuple[Tensor, ...], there_K34: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bordered depth and keyframe (H+2,W+2) each of what is nearest; the border and where nothing is: inf, and K."""
    depth = which = None
    for index, (points, there) in enumerate(zip(surfaces, there_K34)):
        found = nearest_depth(*land(points, there, size_hw), size_hw)
        if depth is None:
            depth, which = found, torch.where(found.isfinite(), 0.0, float(len(surfaces)))
            continue
        nearer = SAME * found < depth
        depth, which = torch.where(nearer, found, depth), which.masked_fill_(nearer, index)
    return depth, which


def _fill(depth: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Bordered frames to (H,W), a hole with at least four seen neighbours filled by the mean of their depths and
    shown by the first of their keyframes."""
    seen = depth.isfinite()
    neighbours = over_window(seen.float())
    mean = over_window(torch.where(seen, depth, 0)) / neighbours
    hole = ~seen[1:-1, 1:-1] & (neighbours >= 4)
    first = over_window(which, torch.minimum)
    return torch.where(hole, mean, depth[1:-1, 1:-1]), torch.where(hole, first, which[1:-1, 1:-1])


def _trace(centres_3N: Tensor, depth_HW: Tensor, which_HW: Tensor, back_K34: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates x, y (H,W) in each pixel's keyframe of its centre lifted to its depth."""
    x = y = torch.zeros_like(depth_HW)
    for index, back in enumerate(back_K34):
        ray = (back[:, :3] @ centres_3N).view(3, *depth_HW.shape)
        at = torch.addcmul(back[:, 3, None, None], ray, depth_HW)
        mine = which_HW == index
        x, y = torch.where(mine, at[0] / at[2], x), torch.where(mine, at[1] / at[2], y)
    return x, y


def _refine(
    depth_HW: Tensor, x_HW: Tensor, y_HW: Tensor, which_HW: Tensor, source_HW: Tensor, there_K34: Tensor
) -> Tensor:
    """Depth of the surface at pixel centres, from its depth in the keyframe where they trace to, NaN at tears.

    A pixel's nearest sample is up to half a pixel from its centre, which is more than 1 % on a slanted face. 1 / depth,
    not depth, is linear across a plane's picture: hence its bilinear look-up.
    """
    for index, there in enumerate(there_K34):
        by_x, by_y, by_1, shift = there[2]
        found = (by_x * x_HW + by_y * y_HW + by_1) * source_HW + shift
        same = (which_HW == index) & ((found - depth_HW).abs() < (BREAK - 1) * depth_HW)
        depth_HW = torch.where(same, found, depth_HW)
    return depth_HW


def _behind(found: Warped, atlas: Atlas, k_F4: Tensor, c2w_F44: Tensor) -> None:
    """Fills what is not visible from the atlas, in place."""
    for image, visible, depth, k, c2w in zip(found.images, found.visible, found.depth, k_F4, c2w_F44):
        colour, known = atlas.view(k, c2w)
        known &= ~visible
        image.copy_(torch.where(known, colour, image))
        depth.masked_fill_(known, torch.inf)
        visible |= known


def _check_cameras(name: str, c2w: Tensor, intrinsics: Tensor, count: int) -> None:
    """Refuses what is no list of `count` rigid poses and intrinsics, naming the first that is not."""
    if not count or tuple(c2w.shape) != (count, 4, 4) or tuple(intrinsics.shape) != (count, 4):
        raise ValueError(f"{name} cameras must be c2w (n,4,4) and intrinsics (n,4), n {count or 'at least 1'}; got "
                         f"{tuple(c2w.shape)} and {tuple(intrinsics.shape)}")  # fmt: skip
    pose, k = c2w.detach().cpu().double(), intrinsics.detach().cpu().double()
    turn = pose[:, :3, :3]
    off = (turn.mT @ turn - torch.eye(3, dtype=pose.dtype)).abs().amax((1, 2))
    for bad, what in (
        (~pose.isfinite().flatten(1).all(1), "c2w holds numbers that are not finite"),
        ((pose[:, 3] != pose.new_tensor([0, 0, 0, 1])).any(1), "the last row of c2w is not 0 0 0 1; transposed?"),
        (off > _ROUNDING, "the 3x3 part of c2w is no rotation; take scale and shear out"),
        (torch.linalg.det(turn) < 0, "c2w mirrors (determinant -1); axes are x right, y down, z forward"),
        (~k.isfinite().all(1) | (k[:, :2] <= 0).any(1), "intrinsics must be finite with fx and fy > 0"),
        ((k[:, :2] > 20).any(1), "intrinsics look like pixels; divide fx, cx by the width and fy, cy by the height"),
    ):
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(f"{name} {first}: {what}; got c2w {pose[first].tolist()}, intrinsics {k[first].tolist()}")
