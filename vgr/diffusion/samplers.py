"""Solvers of the flow: functions over a denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vgr.types import Conditioning, Denoiser


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Conditioning,
    sigmas: Tensor,
    first_frame: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Euler steps down `sigmas` (steps + 1, ending in 0) from noise (B,C,T,H,W) to latents (spec 1.4).

    first_frame (B,C,1,H,W): given clean latents, held at latent frame 0 with t = 0. Updates use the exact sigma;
    a model that truncates its times does so itself. `on_step(i)` is called after each step.
    """
    x = noise.clone()
    held = torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
    if first_frame is not None:
        x[:, :, :1] = first_frame
        held[0] = True
    for i in range(len(sigmas) - 1):
        sigma, following = float(sigmas[i]), float(sigmas[i + 1])
        t = torch.where(held, 0.0, sigma).to(torch.float32).expand(x.shape[0], -1)
        v, _ = denoiser(x, t, cond)
        step = torch.where(held, 0.0, following - sigma).to(x.dtype)
        x = x + step.view(1, 1, -1, 1, 1) * v.to(x.dtype)
        if on_step is not None:
            on_step(i)
    return x
