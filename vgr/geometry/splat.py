"""What both warps are made of (specs/warp-adapter 2.3): maps between pixels, mesh samples, where they land, filling.

Pixels are measured from the image's left and top edges, so the centre of pixel (i, j) is (i + 0.5, j + 0.5). A point
that a camera sees at depth d is d * (x, y, 1): linear in the point, so that a 3x4 map takes it to another camera's
and means of corners are means of points. Frames stand with a border of one pixel, where all that misses them lands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad


def projection(k_4: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Matrices (..,3,3), float64, from camera axes to homogeneous pixels, of intrinsics (..,4)."""
    k, (height, width) = k_4.double(), size_hw
    matrix = k.new_zeros(*k.shape[:-1], 3, 3)
    matrix[..., 0, 0], matrix[..., 0, 2] = width * k[..., 0], width * k[..., 2]
    matrix[..., 1, 1], matrix[..., 1, 2] = height * k[..., 1], height * k[..., 3]
    matrix[..., 2, 2] = 1
    return matrix


def pixel_map(c2w: Tensor, k: Tensor, to_c2w: Tensor, to_k: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Maps (..,3,4), float32, of d * (x, y, 1) in one camera to the same of another; leading dimensions broadcast.

    Made in float64, and by the inverse itself rather than the transpose: a camera's map to itself is the identity
    however its rotation was rounded, and moving the world moves nothing.
    """
    between = torch.linalg.inv(to_c2w.double()) @ c2w.double()
    turn = projection(to_k, size_hw) @ between[..., :3, :3] @ torch.linalg.inv(projection(k, size_hw))
    shift = projection(to_k, size_hw) @ between[..., :3, 3:]
    return torch.cat([turn, shift.expand(*turn.shape[:-1], 1)], dim=-1).float()


def pixel_centres(size_hw: tuple[int, int], device: torch.device) -> Tensor:
    """(3,H,W): x, y and 1 of every pixel's centre."""
    y, x = (torch.arange(n, device=device) + 0.5 for n in size_hw)
    return torch.stack([x.expand(size_hw), y[:, None].expand(size_hw), torch.ones(size_hw, device=device)])


def corners(image_DHW: Tensor) -> Tensor:
    """(4,D,H-1,W-1): the corners of every 2x2 quad, left before right, top before bottom."""
    top, bottom = image_DHW[:, :-1], image_DHW[:, 1:]
    return torch.stack([top[..., :-1], top[..., 1:], bottom[..., :-1], bottom[..., 1:]])


def mesh_samples(image_DHW: Tensor, kept_QP: Tensor, count: int) -> Tensor:
    """(D,N): count x count bilinear samples of every kept quad (H-1,W-1), at offsets (i + 0.5) / count in it."""
    at = (torch.arange(count, device=image_DHW.device) + 0.5) / count
    line = torch.stack([1 - at, at], dim=1)
    weights = torch.einsum("ab,cd->acbd", line, line).reshape(count**2, 4)  # rows, columns; top and bottom, left, right
    mine = corners(image_DHW)[..., kept_QP]
    return (weights @ mine.flatten(1)).view(count**2, *mine.shape[1:]).transpose(0, 1).flatten(1)


def land(points_3N: Tensor, map_34: Tensor, size_hw: tuple[int, int], near: float = 0.0) -> tuple[Tensor, Tensor]:
    """Where points land in a bordered frame: cell (N,) int64 and depth (N,), infinite for what is not beyond near."""
    height, width = size_hw
    x, y, z = (map_34[:, :3] @ points_3N).add_(map_34[:, 3:]).unbind(0)
    z = z.masked_fill_(z <= near, torch.inf)
    column = (x / z).clamp_(-1, width).floor_().int()
    row = (y / z).clamp_(-1, height).floor_().int()
    return row.mul_(width + 2).add_(column).add_(width + 3).long(), z


def nearest_depth(cell_N: Tensor, depth_N: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Bordered frame (H+2,W+2) of the least depth that landed in each pixel, infinite where none did."""
    height, width = size_hw
    # Positive floats are ordered as their bits are, and integers have a minimum of their own in hardware.
    empty = torch.full(((height + 2) * (width + 2),), torch.inf, device=depth_N.device).view(torch.int32)
    found = empty.scatter_reduce_(0, cell_N, depth_N.view(torch.int32), "amin").view(torch.float32)
    return clear_border(found.view(height + 2, width + 2), torch.inf)


def clear_border(frame: Tensor, value: float) -> Tensor:
    """The bordered frame (..,H+2,W+2) itself, its border set to a value."""
    for edge in (frame[..., 0, :], frame[..., -1, :], frame[..., 0], frame[..., -1]):
        edge.fill_(value)
    return frame


def over_window(bordered: Tensor, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """The 3x3 window about each pixel of a bordered frame (..,H+2,W+2) combined to one value: its sum, (..,H,W)."""
    across = combine(combine(bordered[..., :-2], bordered[..., 1:-1]), bordered[..., 2:])
    return combine(combine(across[..., :-2, :], across[..., 1:-1, :]), across[..., 2:, :])


def tall(images_KCHW: Tensor) -> Tensor:
    """(1,C,K*H,W): pictures one below the other, as `look_up` takes them."""
    return images_KCHW.transpose(0, 1).flatten(1, 2)[None]


def look_up(tall_1CLW: Tensor, x_HW: Tensor, y_HW: Tensor, which_HW: Tensor, height: int) -> Tensor:
    """Colours (C,H,W) at pixels (x, y) of picture `which`, bilinear, the edge repeated beyond a picture."""
    length, width = tall_1CLW.shape[-2:]
    x = x_HW.clamp(0.5, width - 0.5)
    y = y_HW.clamp(0.5, height - 0.5).add_(which_HW, alpha=height)  # half a pixel inside: no neighbour shines through
    grid = torch.stack([x.mul_(2 / width).sub_(1), y.mul_(2 / length).sub_(1)], dim=-1)
    return grid_sample(tall_1CLW, grid[None], padding_mode="border", align_corners=False)[0]


class Atlas:
    """Background by direction: equirectangular colours 384x768 of what is far or has no depth; no parallax (2.3).

    Directions are those of the first keyframe's camera, so that moving the world moves nothing.
    """

    SIZE, QUANTILE, REACH = (384, 768), 0.65, 3

    def __init__(self, images_KCHW: Tensor, depth_KHW: Tensor, k_K4: Tensor, c2w_K44: Tensor) -> None:
        self._size_hw, self._first = tuple(depth_KHW.shape[1:]), c2w_K44[0]
        sums = images_KCHW.new_zeros(images_KCHW.shape[1] + 1, self.SIZE[0] * self.SIZE[1])
        for image, depth, k, c2w in zip(images_KCHW, depth_KHW, k_K4, c2w_K44):
            far = (depth == 0) | (depth > depth[depth > 0].quantile(self.QUANTILE))
            x, y = self._texels(k, c2w)
            texel = (y.long().clamp_(max=self.SIZE[0] - 1) * self.SIZE[1] + x.long() % self.SIZE[1])[far]
            sums.index_add_(1, texel, torch.cat([image, torch.ones_like(image[:1])])[:, far])
        sums = sums.view(-1, *self.SIZE)
        known = sums[-1:] > 0
        self._picture = torch.where(known, sums / sums[-1:].clamp(min=1), 0)
        for _ in range(self.REACH):  # a texel a round, from either side, around the seam too
            beside = self._picture.roll(1, -1) + self._picture.roll(-1, -1)
            empty = self._picture[-1:] == 0
            self._picture = torch.where(empty, beside / beside[-1:].clamp(min=1), self._picture)

    def _texels(self, k_4: Tensor, c2w_44: Tensor) -> tuple[Tensor, Tensor]:
        """Texel coordinates x, y (H,W), from the atlas's left and top edges, of a camera's pixel centres."""
        turn = torch.linalg.inv(self._first.double())[:3, :3] @ c2w_44.double()[:3, :3]
        ray = (turn @ torch.linalg.inv(projection(k_4, self._size_hw))).float()
        x, y, z = (ray @ pixel_centres(self._size_hw, k_4.device).flatten(1)).view(3, *self._size_hw)
        yaw, pitch = torch.atan2(x, z), torch.atan2(y, torch.hypot(x, z))
        return (yaw / torch.pi + 1) * self.SIZE[1] / 2, (pitch / torch.pi + 0.5) * self.SIZE[0]

    def view(self, k_4: Tensor, c2w_44: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (C,H,W) of a camera's view of it, and where (H,W) it knows any."""
        x, y = self._texels(k_4, c2w_44)
        wrapped = pad(self._picture[None], (1, 1, 0, 0), mode="circular")
        seen = look_up(wrapped, x + 1, y, torch.zeros_like(x), self.SIZE[0])
        return seen[:-1] / seen[-1:].clamp(min=1e-6), seen[-1] > 1e-6
