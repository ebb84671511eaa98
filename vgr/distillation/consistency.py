"""Causal consistency distillation: a start for few-step students without stored trajectories (causal video, spec 5).

Points of a teacher's path have one end. A teacher's Euler step joins two neighbours of a grid, both under the clean
frames of the data before them; the student's estimate of the end from the noisier one is to equal its average's from
the other, and at t = 0 the end is the point itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vgr.diffusion import flow, timesteps
from vgr.diffusion.objectives import Noised
from vgr.seeding import normal_like

Velocity = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def consistency(
    latents: Tensor,
    positions: Tensor,
    chunk_T: Tensor,
    seed: int,
    *,
    teacher: Velocity,
    average: Velocity,
    steps: int,
    shift: float,
    shared: bool = True,
) -> Noised:
    """Squared error of x - t v against the average's estimate one Euler step of the teacher further down.

    teacher, average: velocities (B,C,T,H,W) at (x, t) of the frozen teacher and of the student's moving average.
    The grid has `steps` steps of equal size before the flow shift. shared: one time for all chunks, else one each.
    The error of x - t v is that of v with weight t^2. A function of (seed, position).
    """
    u_BT = timesteps.chunk_uniform(positions, chunk_T, seed, shared)
    above = (u_BT * steps).ceil()
    t_BT, below_BT = (timesteps.shifted(n / steps, shift).float().to(latents.device) for n in (above, above - 1))
    x = flow.interpolate(latents, normal_like(latents, seed, "noise", positions), t_BT)
    point = flow.clean_estimate(x, teacher(x, t_BT), t_BT - below_BT)
    end = flow.clean_estimate(point, average(point, below_BT), below_BT)
    return Noised(x, t_BT, (x - end) / flow.per_frame(t_BT), t_BT.square(), latents)
