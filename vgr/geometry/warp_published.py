"""The forward warp by the published rules (specs/warp-adapter 2.2 item 3 and 2.3), for comparison and for weights
that were trained on it: sky lifted to a plane, vertices at edges left out, colours splatted, holes filled by colour.

Of several keyframes the first is the anchor, the latest frame in published code: its quads have count x count samples,
those of the others one. What is documented as a fault there is not copied: a hole is looked up in the keyframe that
most of its neighbours came from, not always in the latest, and targets keep their own intrinsics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from vgr.geometry.splat import (
    clear_border,
    corners,
    land,
    look_up,
    mesh_samples,
    over_window,
    pixel_centres,
    projection,
    tall,
)

DEPTH_EDGE, NORMAL_EDGE_DEG = 0.03, 5.0
NEAR = 1e-4
_SKY_PIXELS, _RING_PX, _RING_PIXELS = 1024, 17, 128


def published_frames(
    images_KCHW: Tensor, depth_KHW: Tensor, k_K4: Tensor, there_FK34: Tensor, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Image, visible, depth and keyframe of each frame; depth (K,H,W) is 0 where unknown, maps as `pixel_map` makes."""
    size_hw, parts = tuple(depth_KHW.shape[1:]), []
    for index, (image, depth, k) in enumerate(zip(images_KCHW, depth_KHW, k_K4)):
        sky = torch.zeros_like(depth, dtype=torch.bool)
        if len(depth_KHW) == 1:
            depth, sky = lift_sky(depth)
        kept = whole_quads((depth > 0) & ~edges(depth, k), sky)
        if not bool(kept.any()):  # noise tears everything: published code then tears nothing
            kept = whole_quads(depth > 0, sky)
        centres = pixel_centres(size_hw, depth.device)
        mesh = torch.cat([depth * centres, centres[:2], image])
        parts.append(mesh_samples(mesh, kept, count if index == 0 else 1))
    samples = torch.cat([pad(part[3:], (0, 0, 1, 0), value=float(i)) for i, part in enumerate(parts)], dim=1)
    if not samples.shape[1]:
        raise ValueError("depth has no 2x2 quad of known pixels, which published rules need; take rules='ours'")
    for there_K34 in there_FK34:
        landed = [land(part[:3], there, size_hw, NEAR) for part, there in zip(parts, there_K34)]
        cell, z = (torch.cat(both) for both in zip(*landed))
        yield _frame(cell, z, samples, images_KCHW)


def _frame(
    cell_N: Tensor, z_N: Tensor, samples_DN: Tensor, images_KCHW: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One frame: the nearest sample's colour, and holes with four seen neighbours looked up in the source.

    samples: each one's keyframe, pixel x and y there, and colour.
    """
    height, width = images_KCHW.shape[2:]
    winner, seen = nearest_sample(cell_N, z_N, (height, width))
    depth, which = torch.where(seen, z_N[winner], 0), torch.where(seen, samples_DN[0, winner], -1)
    source, colour = samples_DN[1:3, winner], samples_DN[3:, winner[1:-1, 1:-1]]
    neighbours = over_window(seen.float())
    hole = ~seen[1:-1, 1:-1] & (neighbours >= 4)
    depth = torch.where(hole, over_window(depth) / neighbours.clamp(min=1), depth[1:-1, 1:-1])
    most, at, shown = torch.zeros_like(depth), torch.zeros(2, height, width, device=depth.device), which[1:-1, 1:-1]
    for index in range(len(images_KCHW)):
        mine = which == index
        number = over_window(mine.float())
        better = hole & (number > most)
        at = torch.where(better, over_window(torch.where(mine, source, 0)) / number, at)
        most, shown = torch.where(better, number, most), torch.where(better, float(index), shown)
    looked = look_up(tall(images_KCHW), *at, shown.clamp(min=0), height)
    return torch.where(hole, looked, colour), seen[1:-1, 1:-1] | hole, depth, shown


def whole_quads(valid_HW: Tensor, sky_HW: Tensor) -> Tensor:
    """Quads (H-1,W-1) with four valid corners, all of them lifted sky or none."""
    valid, sky = corners(valid_HW[None]).all(0)[0], corners(sky_HW[None])
    return valid & (sky.all(0)[0] | ~sky.any(0)[0])


def nearest_sample(cell_N: Tensor, z_N: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Index of the nearest sample in each pixel of a bordered frame (H+2,W+2), the lowest of equals, and where any is.

    One pass: depth's bits above, the index below, and the least of both.
    """
    height, width = size_hw
    key = (z_N.view(torch.int32).long() << 32) | torch.arange(len(z_N), device=z_N.device)
    nothing = int(np.float32(np.inf).view(np.int32)) << 32
    least = torch.full(((height + 2) * (width + 2),), nothing, device=z_N.device)
    least = clear_border(least.scatter_reduce_(0, cell_N, key, "amin").view(height + 2, width + 2), nothing)
    return least & 0xFFFFFFFF, least < nothing


def edges(depth_HW: Tensor, k_4: Tensor) -> Tensor:
    """Where (H,W) depth jumps by more than 3 % within 3x3 pixels and normals turn by more than 5 degrees.

    Points without depth, at the camera's centre, take part in the normals, so borders of unknown areas are edges.
    """
    known = depth_HW > 0
    high = max_pool2d(depth_HW[None], 3, 1, 1)[0]
    low = -max_pool2d(torch.where(known, -depth_HW, -torch.inf)[None], 3, 1, 1)[0]
    jump = known & ((high - low) > DEPTH_EDGE * depth_HW)
    size_hw = tuple(depth_HW.shape)
    ray = torch.linalg.inv(projection(k_4, size_hw)).float() @ pixel_centres(size_hw, depth_HW.device).flatten(1)
    points = depth_HW * ray.view(3, *size_hw)
    around = pad(points[None], (1, 1, 1, 1), mode="replicate")[0]
    across, down = around[:, 1:-1, 2:] - around[:, 1:-1, :-2], around[:, 2:, 1:-1] - around[:, :-2, 1:-1]
    normal = torch.nn.functional.normalize(torch.linalg.cross(across, down, dim=0), dim=0)
    around, least = pad(normal[None], (1, 1, 1, 1), mode="replicate")[0], torch.ones_like(depth_HW)
    height, width = size_hw
    for y in range(3):
        for x in range(3):
            least = torch.minimum(least, (normal * around[:, y : y + height, x : x + width]).sum(0))
    return jump & (least < math.cos(math.radians(NORMAL_EDGE_DEG)))


def lift_sky(depth_HW: Tensor) -> tuple[Tensor, Tensor]:
    """Depth with unknown areas that touch the top border and have 1024 pixels or more put on planes, and where.

    A plane lies at the 95th percentile of the known depths within 8 pixels of the area, if there are 128 of them, and
    no nearer than the 98th percentile of all.
    """
    depth, filled = depth_HW.cpu().numpy().copy(), np.zeros(depth_HW.shape, bool)
    known = depth > 0
    overall = float(np.quantile(depth[known], 0.98))
    areas, _ = ndimage.label(~known, structure=np.ones((3, 3)))
    for label in set(areas[0][areas[0] > 0].tolist()):
        area = areas == label
        if area.sum() < _SKY_PIXELS:
            continue
        ring = known & ndimage.maximum_filter(area, _RING_PX, mode="constant")
        far = float(np.quantile(depth[ring], 0.95)) if ring.sum() >= _RING_PIXELS else overall
        depth[area], filled = max(far, overall), filled | area
    return torch.from_numpy(depth).to(depth_HW.device), torch.from_numpy(filled).to(depth_HW.device)
