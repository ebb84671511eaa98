"""What a camera-controlled model can take, and what it was trained on (specs/world-model 4.1, 8 and 9.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vgr.geometry.cameras import fov_deg, turn_deg
from vgr.types import Cameras

FOV_DEG = (25.0, 120.0)  # both axes: refused beyond (4.1), never trained on (8)
FOCAL_SPREAD = 0.20  # |fx - fy| / mean in pixels (8)
METRES_PER_S, DEGREES_PER_S = 0.4, 12.0  # the fastest paths of the benchmark (9.1)
_ROUNDING = 1e-3  # of rotations written with four decimals or more


def check_cameras(cameras: Cameras, fps: float, size_hw: tuple[int, int], stride: int = 1) -> list[str]:
    """Refuse cameras that a model cannot take; what lies outside its trained range comes back in words.

    cameras (B,F) at fps frames a second, for pictures of size_hw pixels; stride: raw frames of a latent frame.
    ValueError names the frame: numbers that are not finite, poses that are not rigid, a field of view outside
    FOV_DEG; or the count, with the nearest that fits the stride. Warned of: pixels far from square, and speeds
    beyond the benchmark's, with the median beside the largest, so that a jump can be told from a fast path.
    """
    frames = cameras.c2w.shape[1]
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a finite number > 0; got {fps}")
    if frames < 1 or (frames - 1) % stride:
        lower = 1 + max(0, frames - 1) // stride * stride
        raise ValueError(
            f"{frames} camera poses do not fit a temporal stride of {stride}; the nearest counts that do are "
            f"{lower} and {lower + stride}"
        )
    c2w, k = cameras.c2w.double(), cameras.intrinsics.double()
    _refuse(~c2w.isfinite().flatten(-2).all(-1), lambda at: "the pose holds numbers that are not finite")
    rotation = c2w[..., :3, :3]
    error = (rotation.mT @ rotation - torch.eye(3, dtype=c2w.dtype, device=c2w.device)).abs().amax((-1, -2))
    _refuse(
        error > _ROUNDING,
        lambda at: f"the 3x3 part is no rotation, R'R is {error[at]:.3g} off the identity; take scale and shear out",
    )
    _refuse(
        torch.linalg.det(rotation) < 0,
        lambda at: "the 3x3 part mirrors (determinant -1); axes are x right, y down, z forward",
    )
    _refuse(
        (c2w[..., 3, :] != c2w.new_tensor([0.0, 0.0, 0.0, 1.0])).any(-1),
        lambda at: f"the last row is {c2w[at][3].tolist()}, not 0 0 0 1; transposed?",
    )
    _refuse(~k.isfinite().all(-1), lambda at: f"intrinsics {k[at].tolist()}; four finite numbers are needed")
    fov = fov_deg(k)
    _refuse(
        ~((fov > FOV_DEG[0]) & (fov < FOV_DEG[1])).all(-1),
        lambda at: (
            f"field of view {fov[at][0]:.1f} x {fov[at][1]:.1f} degrees (intrinsics divided by width and height "
            f"{[round(v, 4) for v in k[at].tolist()]}); both must lie between {FOV_DEG[0]:g} and {FOV_DEG[1]:g}"
        ),
    )
    return _warnings(c2w, k, fps, size_hw)


def _refuse(bad_BF: Tensor, what: Callable[[tuple[int, int]], str]) -> None:
    if bool(bad_BF.any()):
        at = tuple(bad_BF.nonzero()[0].tolist())
        raise ValueError(f"camera {_name(at, bad_BF)}: {what(at)}")


def _name(at: tuple[int, int], like_B: Tensor) -> str:
    return f"frame {at[1]}" + (f" of video {at[0]}" if len(like_B) > 1 else "")


def _warnings(c2w: Tensor, k: Tensor, fps: float, size_hw: tuple[int, int]) -> list[str]:
    fx, fy = k[..., 0] * size_hw[1], k[..., 1] * size_hw[0]
    spread = (fx - fy).abs() / ((fx + fy) / 2)
    at = divmod(int(spread.argmax()), k.shape[1])
    found = []
    if spread[at] > FOCAL_SPREAD:
        found.append(
            f"{_name(at, k)}: fx and fy are {fx[at]:.1f} and {fy[at]:.1f} pixels at {size_hw[1]}x{size_hw[0]}, "
            f"{100 * spread[at]:.0f} % apart; trained on at most {100 * FOCAL_SPREAD:g} %"
        )
    if c2w.shape[1] < 2:
        return found
    metres = c2w[..., :3, 3].diff(dim=1).norm(dim=-1)
    turn = turn_deg(c2w[:, :-1, :3, :3].mT @ c2w[:, 1:, :3, :3])
    for what, unit, speed, limit in (
        ("translation", "m/s", metres * fps, METRES_PER_S),
        ("rotation", "degrees/s", turn * fps, DEGREES_PER_S),
    ):
        b, f = divmod(int(speed.argmax()), speed.shape[1])
        if speed[b, f] > limit * (1 + 1e-6):
            found.append(
                f"{_name((b, f + 1), c2w)}: {what} at {speed[b, f]:.3g} {unit} (median {speed.median():.3g}); "
                f"the benchmark's paths stay below {limit:g}"
            )
    return found
