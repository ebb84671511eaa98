"""How a batch of clean latents becomes what a denoiser is trained on: noisy latents, their times and a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vgr.diffusion import flow, timesteps
from vgr.seeding import normal_like


@dataclass(frozen=True)
class Noised:
    """x, target (B,C,T,H,W): noisy latents and the velocity to predict; t (B,T); weight (B,T) of squared errors."""

    x: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor


def flow_matching(
    latents_BCTHW: Tensor,
    positions: Tensor,
    chunk_T: Tensor,
    seed: int,
    *,
    shift: float,
    first_frame_clean: float,
    mixture: Mapping[str, float] = timesteps.MIXTURE,
) -> Noised:
    """SANA-WM sections 5.2 and C.2: a straight path to noise, errors unweighted, clean frames not counted.

    One time a sample for a single chunk, otherwise `mixture` over the chunks (see `timesteps.training_times`). Noise
    and times are functions of (seed, position).
    """
    t_BT = timesteps.training_times(positions, chunk_T, seed, shift, first_frame_clean, mixture)
    t_BT = t_BT.to(latents_BCTHW.device)
    noise = normal_like(latents_BCTHW, seed, "noise", positions)
    x = flow.interpolate(latents_BCTHW, noise, t_BT)
    return Noised(x, t_BT, flow.velocity(latents_BCTHW, noise), (t_BT > 0).float())
