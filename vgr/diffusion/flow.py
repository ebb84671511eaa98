"""Rectified flow: x_t = (1 - t) x_0 + t noise, velocity v = noise - x_0 (SANA-WM section 5.2), one t per frame."""

from __future__ import annotations

from torch import Tensor


def per_frame(t: Tensor) -> Tensor:
    """A number for each latent frame (B,T) beside latents (B,C,T,H,W)."""
    return t[:, None, :, None, None]


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Latents (B,C,T,H,W) at times t (B,T) on the straight path from data to noise; t = 0 returns x0 exactly."""
    return x0 + per_frame(t) * (noise - x0)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The path's derivative, noise minus data."""
    return noise - x0


def clean_estimate(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The end of the path at t = 0 that velocity v at x points to: x - t v."""
    return x - per_frame(t) * v


def velocity_loss(v: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error per sample (B,), averaged over frames with a weight above 0.

    v, target (B,C,T,H,W); weight (B,T), bool to choose frames.
    """
    per_frame_error = (v.float() - target.float()).square().mean((1, 3, 4))
    counted = (weight > 0).sum(1).clamp_min(1)
    return (per_frame_error * weight).sum(1) / counted
