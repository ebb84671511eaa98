"""Camera geometry in torch: SE(3), intrinsics, rays, Pluecker coordinates, grouping by latent frame.

OpenCV axes (x right, y down, z forward), camera-to-world, metres. Intrinsics k = (fx, fy, cx, cy) are divided
by image width and height and measured from the image's edges, so the centre of pixel i is (i + 0.5) / W and
resizing an image leaves k as it is. Everything is differentiable, batched over leading dimensions and keeps
the dtype it is given (float32 or wider; half precision is too coarse for poses).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgr.types import Cameras, LatentCameras


def _pose(rotation: Tensor, translation: Tensor) -> Tensor:
    """(..,3,3) and (..,3) to (..,4,4)."""
    top = torch.cat([rotation, translation.unsqueeze(-1)], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


def invert(pose_44: Tensor) -> Tensor:
    """Inverse of rigid poses (..,4,4): [R^T, -R^T t]. Camera-to-world becomes world-to-camera and back."""
    rotation_t = pose_44[..., :3, :3].transpose(-1, -2)
    return _pose(rotation_t, -(rotation_t @ pose_44[..., :3, 3:]).squeeze(-1))


def relative_to(pose: Tensor, reference: Tensor) -> Tensor:
    """Poses (..,4,4) seen from `reference` (..,4,4): reference^-1 pose."""
    return invert(reference) @ pose


def relative_to_first(c2w_F44: Tensor) -> Tensor:
    """Camera-to-world (..,F,4,4) relative to frame 0 (specs/world-model 4.1): the first pose is the identity."""
    return relative_to(c2w_F44, c2w_F44[..., :1, :, :])


def _hat(w_3: Tensor) -> Tensor:
    """Cross-product matrix (..,3,3) of (..,3)."""
    x, y, z = w_3.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], dim=-1).unflatten(-1, (3, 3))


def _angle_terms(w_3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sin(a)/a, (1-cos a)/a^2 and (a - sin a)/a^3 of a = |w|, each (..,1,1), smooth through a = 0.

    Where a^2 < 0.25 the power series is used, exact to float64 there; the other branch gets a safe angle,
    since a NaN gradient survives torch.where.
    """
    square = (w_3 * w_3).sum(-1)[..., None, None]
    small = square < 0.25
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    a = b = c = torch.zeros_like(square)
    for n in range(7, -1, -1):  # alternating series in a^2 by Horner's rule
        a = 1 / math.factorial(2 * n + 1) - square * a
        b = 1 / math.factorial(2 * n + 2) - square * b
        c = 1 / math.factorial(2 * n + 3) - square * c
    sine = angle.sin()
    return (
        torch.where(small, a, sine / angle),
        torch.where(small, b, 2 * (angle / 2).sin() ** 2 / angle**2),
        torch.where(small, c, (angle - sine) / angle**3),
    )


def so3_exp(w_3: Tensor) -> Tensor:
    """Rotation matrices (..,3,3) of rotation vectors (..,3) in radians (Rodrigues)."""
    a, b, _ = _angle_terms(w_3)
    hat = _hat(w_3)
    return torch.eye(3, dtype=w_3.dtype, device=w_3.device) + a * hat + b * (hat @ hat)


def so3_log(R_33: Tensor) -> Tensor:
    """Rotation vectors (..,3) in radians, |w| <= pi, of rotation matrices (..,3,3).

    Goes through the unit quaternion computed from its largest component, which loses no precision near 0 or
    pi (the trace formula loses half the digits at both ends). At exactly pi either sign of the axis is right.
    """
    m = R_33.flatten(-2)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = m.unbind(-1)
    squares = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz], dim=-1)
    rows = torch.stack(
        [
            torch.stack([squares[..., 0], zy - yz, xz - zx, yx - xy], dim=-1),
            torch.stack([zy - yz, squares[..., 1], xy + yx, xz + zx], dim=-1),
            torch.stack([xz - zx, xy + yx, squares[..., 2], yz + zy], dim=-1),
            torch.stack([yx - xy, xz + zx, yz + zy, squares[..., 3]], dim=-1),
        ],
        dim=-2,
    )
    best = squares.argmax(-1, keepdim=True)
    q = rows.gather(-2, best.unsqueeze(-1).expand(*best.shape, 4)).squeeze(-2)
    q = q / (2 * squares.gather(-1, best).sqrt())
    q = torch.where(q[..., :1] < 0, -q, q)
    w, v = q[..., :1], q[..., 1:]
    square = (v * v).sum(-1, keepdim=True)
    small = square < 1e-8
    length = torch.where(small, torch.ones_like(square), square).sqrt()
    w_safe = torch.where(small, w, torch.ones_like(w))
    factor = torch.where(small, 2 / w_safe * (1 - square / (3 * w_safe**2)), 2 * torch.atan2(length, w) / length)
    return factor * v


def se3_exp(xi_6: Tensor) -> Tensor:
    """Poses (..,4,4) of twists (..,6) ordered [rotation vector (radians), translation part (metres)]."""
    w, v = xi_6[..., :3], xi_6[..., 3:]
    _, b, c = _angle_terms(w)
    hat = _hat(w)
    jacobian = torch.eye(3, dtype=w.dtype, device=w.device) + b * hat + c * (hat @ hat)
    return _pose(so3_exp(w), (jacobian @ v.unsqueeze(-1)).squeeze(-1))


def se3_log(pose_44: Tensor) -> Tensor:
    """Twists (..,6) of poses (..,4,4); the inverse of `se3_exp` for angles up to pi."""
    w = so3_log(pose_44[..., :3, :3])
    a, b, _ = _angle_terms(w)
    hat = _hat(w)
    square = (w * w).sum(-1)[..., None, None]
    small = square < 0.01
    series = 1 / 12 + square * (1 / 720 + square * (1 / 30240 + square / 1209600))
    d = torch.where(small, series, (1 - a / (2 * b)) / torch.where(small, torch.ones_like(square), square))
    inverse = torch.eye(3, dtype=w.dtype, device=w.device) - hat / 2 + d * (hat @ hat)
    return torch.cat([w, (inverse @ pose_44[..., :3, 3:]).squeeze(-1)], dim=-1)


def interpolate(c2w_F44: Tensor, times: Tensor, new_times: Tensor) -> Tensor:
    """Poses (..,G,4,4) at new_times (G,) from poses (..,F,4,4) at times (F,): slerp and linear translation.

    ValueError if times do not increase strictly or new_times leave their range (nothing is extrapolated).
    """
    times = torch.as_tensor(times, dtype=c2w_F44.dtype, device=c2w_F44.device)
    new_times = torch.as_tensor(new_times, dtype=c2w_F44.dtype, device=c2w_F44.device)
    if times.shape != c2w_F44.shape[-3:-2] or not bool((times.diff() > 0).all()):
        raise ValueError(
            f"times must be {c2w_F44.shape[-3]} strictly increasing values, one a pose; got {times.tolist()}"
        )
    if new_times.numel() and (new_times.min() < times[0] or new_times.max() > times[-1]):
        raise ValueError(
            f"new_times [{new_times.min():g}, {new_times.max():g}] leave the range of times "
            f"[{times[0]:g}, {times[-1]:g}]; poses are not extrapolated"
        )
    if times.numel() == 1:
        return c2w_F44.expand(*c2w_F44.shape[:-3], new_times.numel(), 4, 4)
    left = (torch.searchsorted(times, new_times, right=True) - 1).clamp(0, times.numel() - 2)
    share = ((new_times - times[left]) / (times[left + 1] - times[left]))[:, None]
    a, b = c2w_F44[..., left, :, :], c2w_F44[..., left + 1, :, :]
    turn = so3_log(a[..., :3, :3].transpose(-1, -2) @ b[..., :3, :3])
    return _pose(a[..., :3, :3] @ so3_exp(share * turn), a[..., :3, 3] + share * (b[..., :3, 3] - a[..., :3, 3]))


def intrinsics_matrix(k_4: Tensor, width: float = 1, height: float = 1) -> Tensor:
    """(..,3,3) matrix of normalised k (..,4); with the image's width and height in pixels, in pixels."""
    fx, fy, cx, cy = k_4.unbind(-1)
    o, one = torch.zeros_like(fx), torch.ones_like(fx)
    rows = [fx * width, o, cx * width, o, fy * height, cy * height, o, o, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


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


def rays(c2w: Tensor, k_4: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """World-frame rays through pixel centres: origins and unit directions, each (..,H,W,3).

    c2w (..,4,4) and k (..,4) broadcast against each other.
    """
    k_4 = k_4.to(c2w.dtype)
    x = (torch.arange(width, dtype=c2w.dtype, device=c2w.device) + 0.5) / width
    y = (torch.arange(height, dtype=c2w.dtype, device=c2w.device) + 0.5) / height
    fx, fy, cx, cy = k_4[..., None, None, :].unbind(-1)
    u, v = torch.broadcast_tensors((x - cx) / fx, (y[:, None] - cy) / fy)
    local = torch.nn.functional.normalize(torch.stack([u, v, torch.ones_like(u)], dim=-1), dim=-1)
    directions = torch.einsum("...ij,...hwj->...hwi", c2w[..., :3, :3], local)
    return c2w[..., None, None, :3, 3].expand_as(directions), directions


def pluecker(c2w: Tensor, k_4: Tensor, height: int, width: int) -> Tensor:
    """Pluecker coordinates (..,6,H,W) of the pixel rays, channels [d, o x d] (specs/world-model 4.3)."""
    origins, directions = rays(c2w, k_4, height, width)
    moments = torch.linalg.cross(origins, directions)
    return torch.cat([directions, moments], dim=-1).movedim(-1, -3)


def project(points_world: Tensor, c2w: Tensor, k_4: Tensor) -> tuple[Tensor, Tensor]:
    """World points (..,P,3) to normalised image coordinates (..,P,2) and depth along z (..,P) in metres.

    c2w (..,4,4) and k (..,4) have the points' leading dimensions. Points are visible only where depth > 0 and
    both coordinates lie in [0, 1]; behind the camera the coordinates are those of the mirrored ray.
    """
    local = (points_world - c2w[..., None, :3, 3]) @ c2w[..., :3, :3]
    depth = local[..., 2]
    k_4 = k_4[..., None, :].to(local.dtype)
    return k_4[..., :2] * local[..., :2] / depth.unsqueeze(-1) + k_4[..., 2:], depth


def group_by_latent(cameras: Cameras, stride: int) -> LatentCameras:
    """Cameras of F = 1 + stride*(T-1) raw frames, grouped by latent frame and relative to raw frame 0.

    Latent i stands for raw frame stride*i; its group is raw frames stride*i-(stride-1) .. stride*i, that of
    latent 0 is raw frames 0 .. stride-1 (specs/world-model 4.3), the last pose repeated past the clip's end.
    """
    frames = cameras.c2w.shape[1]
    if stride < 1 or frames < 1 or (frames - 1) % stride:
        raise ValueError(
            f"{frames} camera frames do not fit a temporal stride of {stride}: the count must be "
            f"1 + {stride} * n (for example {1 + stride * max(1, (frames - 1) // max(stride, 1))})"
        )
    if cameras.intrinsics.shape[:2] != cameras.c2w.shape[:2]:
        raise ValueError(
            f"c2w has (B,F) = {tuple(cameras.c2w.shape[:2])} but intrinsics {tuple(cameras.intrinsics.shape[:2])}"
        )
    c2w = relative_to_first(cameras.c2w)
    last = torch.arange(0, frames, stride, device=c2w.device)
    group = last[:, None] + torch.arange(1 - stride, 1, device=c2w.device)
    group = torch.where(last[:, None] == 0, group + stride - 1, group).clamp(max=frames - 1)
    k = cameras.intrinsics
    return LatentCameras(c2w[:, last], k[:, last], c2w[:, group], k[:, group])
