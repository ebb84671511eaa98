"""Camera geometry in torch: relative poses, rotations, grouping by latent frame.

OpenCV axes (x right, y down, z forward), camera-to-world, metres. Intrinsics k = (fx, fy, cx, cy) are divided
by image width and height and measured from the image's edges, so the centre of pixel i is (i + 0.5) / W and
resizing an image leaves k as it is. Everything is differentiable, batched over leading dimensions and keeps
the dtype it is given (float32 or wider; half precision is too coarse for poses).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from vgr.types import Cameras, LatentCameras


def invert(pose_44: Tensor) -> Tensor:
    """Inverse of rigid poses (..,4,4): [R^T, -R^T t]. Camera-to-world becomes world-to-camera and back."""
    inverse = torch.zeros_like(pose_44)
    inverse[..., :3, :3] = pose_44[..., :3, :3].mT
    inverse[..., :3, 3:] = -pose_44[..., :3, :3].mT @ pose_44[..., :3, 3:]
    inverse[..., 3, 3] = 1
    return inverse


def relative_to_first(c2w_F44: Tensor) -> Tensor:
    """Camera-to-world (..,F,4,4) relative to frame 0 (specs/world-model 4.1): the first pose is the identity."""
    return invert(c2w_F44[..., :1, :, :]) @ c2w_F44


def so3_exp(w_3: Tensor) -> Tensor:
    """Rotation matrices (..,3,3) of rotation vectors (..,3) in radians."""
    x, y, z = w_3.unbind(-1)
    o = torch.zeros_like(x)
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], dim=-1).unflatten(-1, (3, 3))
    return torch.linalg.matrix_exp(cross)


def turn_deg(rotation_33: Tensor) -> Tensor:
    """Angles (..) of rotation matrices (..,3,3), in degrees; float64."""
    flat = Rotation.from_matrix(rotation_33.reshape(-1, 3, 3).double().numpy())
    return torch.rad2deg(torch.from_numpy(flat.magnitude())).view(rotation_33.shape[:-2])


def interpolate(c2w_F44: Tensor, times: Tensor, new_times: Tensor) -> Tensor:
    """Poses (G,4,4) at new_times (G,) from poses (F,4,4) at increasing times (F,): slerp and linear translation.

    ValueError if times do not increase strictly or new_times leave their range (nothing is extrapolated).
    """
    at, new = times.double().numpy(), new_times.double().numpy()
    if len(at) == 1:
        at, c2w_F44 = np.append(at, at + 1.0), c2w_F44.expand(2, 4, 4)
    poses = c2w_F44.double().numpy()
    result = np.tile(np.eye(4), (len(new), 1, 1))
    result[:, :3, :3] = Slerp(at, Rotation.from_matrix(poses[:, :3, :3]))(new).as_matrix()
    result[:, :3, 3] = make_interp_spline(at, poses[:, :3, 3], k=1)(new)
    return torch.from_numpy(result).to(c2w_F44.dtype)


def from_fov(hfov_deg: float, aspect: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """k (4,) of square pixels and a centred axis: horizontal field of view in degrees, aspect = width / height."""
    if not 0 < hfov_deg < 180 or not aspect > 0:
        raise ValueError(f"hfov_deg must lie in (0, 180) and aspect be > 0; got {hfov_deg}, {aspect}")
    fx = 0.5 / math.tan(math.radians(hfov_deg) / 2)
    return torch.tensor([fx, fx * aspect, 0.5, 0.5], dtype=dtype)


def fov_deg(k_4: Tensor) -> Tensor:
    """Full horizontal and vertical field of view in degrees, (..,2), of k (..,4); the axis may be off centre."""
    f, c = k_4[..., :2], k_4[..., 2:]
    return torch.rad2deg(torch.atan(c / f) + torch.atan((1 - c) / f))


def crop_intrinsics(k_4: Tensor, size_hw: tuple[float, float], box_tlhw: tuple[float, ...]) -> Tensor:
    """k (..,4) after cutting the box (top, left, height, width), in pixels, out of an image of size_hw pixels.

    A box beyond the image (padding) is allowed. Resizing before or after changes nothing in normalised k.
    """
    (height, width), (top, left, box_height, box_width) = size_hw, box_tlhw
    if min(height, width, box_height, box_width) <= 0:
        raise ValueError(f"sizes must be > 0 pixels; got image {tuple(size_hw)}, box {tuple(box_tlhw)}")
    fx, fy, cx, cy = k_4.unbind(-1)
    return torch.stack(
        [
            fx * width / box_width,
            fy * height / box_height,
            (cx * width - left) / box_width,
            (cy * height - top) / box_height,
        ],
        dim=-1,
    )


def group_by_latent(cameras: Cameras, stride: int) -> LatentCameras:
    """Cameras of F = 1 + stride*(T-1) raw frames, grouped by latent frame and relative to raw frame 0.

    Latent i stands for raw frame stride*i; its group is raw frames stride*i-(stride-1) .. stride*i, that of
    latent 0 is raw frames 0 .. stride-1 (specs/world-model 4.3), the last pose repeated past the clip's end.
    """
    frames, k = cameras.c2w.shape[1], cameras.intrinsics
    if (frames - 1) % stride:
        raise ValueError(
            f"{frames} camera frames do not fit a temporal stride of {stride}: the count must be "
            f"1 + {stride} * n (for example {1 + stride * max(1, (frames - 1) // stride)})"
        )
    c2w = relative_to_first(cameras.c2w)
    last = torch.arange(0, frames, stride, device=c2w.device)
    group = last[:, None] + torch.arange(1 - stride, 1, device=c2w.device)
    group[0] += stride - 1
    group = group.clamp(max=frames - 1)
    return LatentCameras(c2w[:, last], k[:, last], c2w[:, group], k[:, group])
