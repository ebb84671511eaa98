"""Camera geometry in torch: relative poses, rotations, grouping by latent frame.

OpenCV axes (x right, y down, z forward), camera-to-world, metres. Intrinsics k = (fx, fy, cx, cy) are divided
by image width and height and measured from the image's edges, so the centre of pixel i is (i + 0.5) / W and
resizing an image leaves k as it is. Everything is differentiable, batched over leading dimensions and keeps
the dtype it is given (float32 or wider; half precision is too coarse for poses).
"""

from __future__ import annotations

import torch
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
