"""Rectified flow: x_t = (1 - t) x_0 + t noise, velocity v = noise - x_0 (SANA-WM section 5.2), one t per frame."""

from __future__ import annotations

from torch import Tensor


def _per_frame(t: Tensor) -> Tensor:
    return t[:, None, :, None, None]


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Latents (B,C,T,H,W) at times t (B,T) on the straight path from data to noise; t = 0 returns x0 exactly."""
    return x0 + _per_frame(t) * (noise - x0)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The path's derivative, noise minus data."""
    return noise - x0


def clean_estimate(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The end of the path at t = 0 that velocity v at x points to: x - t v."""
    return x - _per_frame(t) * v


def velocity_loss(v: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """Mean squared error per sample (B,) over the frames that count; v, target (B,C,T,H,W), frames (B,T) bool."""
    per_frame = (v.float() - target.float()).square().mean((1, 3, 4))
    weight = frames.to(per_frame.dtype)
    return (per_frame * weight).sum(1) / weight.sum(1).clamp_min(1.0)
