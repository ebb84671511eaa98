"""Distribution matching distillation as self-forcing uses it (spec 6.2): two scores say where samples should move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vgr.diffusion import flow, timesteps
from vgr.seeding import torch_generator


def score_times(
    positions: Tensor, frames: int, seed: int, shift: float, purpose: str, first_clean: bool = True
) -> Tensor:
    """Times (B,T) at which the scores are asked: uniform, shifted, within [0.02, 0.98]; frame 0 clean if given."""
    generators = [torch_generator(seed, purpose, position) for position in positions.tolist()]
    rows = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
    t = timesteps.shifted(torch.stack(rows), shift).clamp(0.02, 0.98).float()
    t_BT = t[:, None].repeat(1, frames)
    if first_clean:
        t_BT[:, 0] = 0.0
    return t_BT


def matching_loss(sample: Tensor, fake: Tensor, real: Tensor, frames_BT: Tensor) -> Tensor:
    """Half the squared distance (B,) of samples (B,C,T,H,W) to where the scores' difference moves them.

    fake, real: clean estimates of the two scores at one noisy version of the samples. The step
    g = (fake - real) / mean |sample - real| is taken per sample over `frames_BT` (B,T bool) and has no gradient.
    """
    weight = flow.per_frame(frames_BT.to(sample.dtype))
    with torch.no_grad():
        count = weight.expand_as(sample).sum((1, 2, 3, 4), keepdim=True).clamp_min(1.0)
        scale = ((sample - real).abs() * weight).sum((1, 2, 3, 4), keepdim=True) / count
        target = sample - (fake - real) / scale.clamp_min(1e-6)
    return 0.5 * flow.velocity_loss(sample, target, frames_BT)


def discriminator_loss(true_B: Tensor, made_B: Tensor) -> Tensor:
    """softplus(-d(true)) + softplus(d(made)), from logits (B,) (causal video, spec 6.1 eq. 11)."""
    return F.softplus(-true_B) + F.softplus(made_B)
