"""ODE initialisation: a student learns to jump from any of its few times to the end of a teacher's path (spec 6.2).

A trajectory is a teacher's solution from one noise, kept at the student's times and at its end: S snapshots
(B,S,C,T,H,W). In shards the snapshots stand one after another along channels, (S*C,T,H,W). A causal teacher's path
is made under the true frames before each chunk (causal video, spec 5), which stand behind as one snapshot more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgr.diffusion import flow
from vgr.diffusion.objectives import Noised
from vgr.diffusion.samplers import euler
from vgr.seeding import torch_generator
from vgr.types import Conditioning, Denoiser


def trajectory(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Conditioning,
    times: Sequence[float],
    grid: Tensor,
    first_frame: Tensor | None = None,
) -> Tensor:
    """The teacher's path (B,S,C,T,H,W) from noise (B,C,T,H,W), kept at `times`, which fall from 1 to 0.

    Euler steps along `grid` (falling to 0), which `times` join where it lacks them. first_frame (B,C,1,H,W) is held.
    """
    sigmas = torch.tensor(sorted({*grid.tolist(), *map(float, times)}, reverse=True), dtype=torch.float64)
    cuts = [int((sigmas == float(time)).nonzero()) for time in times]
    x = noise
    if first_frame is not None:
        x = torch.cat([first_frame.to(x), x[:, :, 1:]], dim=2)
    snapshots = [x]
    for a, b in zip(cuts, cuts[1:]):
        x = euler(denoiser, x, cond, sigmas[a : b + 1], first_frame)
        snapshots.append(x)
    return torch.stack(snapshots, dim=1)


def regression(
    latents: Tensor,
    positions: Tensor,
    chunk_T: Tensor,
    seed: int,
    *,
    times: Sequence[float],
    history: bool = False,
    image: bool = True,
) -> Noised:
    """Squared error of x - t v against the trajectory's end, at a random snapshot for each chunk (spec 6.2).

    latents (B,S*C,T,H,W): trajectories at `times` (S of them, falling from 1 to 0). history: a last snapshot (S+1)
    holds the true frames, which are the past of each chunk. image: frame 0 is given, clean always. The error of
    x - t v is that of v with weight t^2. A function of (seed, position).
    """
    snapshots = latents.unflatten(1, (len(times) + history, -1))
    context = snapshots[:, -1] if history else None
    chunks = int(chunk_T.max()) + 1
    rows = [
        torch.randint(len(times), (chunks,), generator=torch_generator(seed, "snapshot", position))
        for position in positions.tolist()
    ]
    chosen_BT = torch.stack(rows)[:, chunk_T.cpu()].to(latents.device)
    if image:
        chosen_BT[:, 0] = len(times) - 1
    t_BT = torch.tensor(list(times), dtype=torch.float32, device=latents.device)[chosen_BT]
    index = chosen_BT[:, None, None, :, None, None].expand(-1, 1, *snapshots.shape[2:])
    x, end = snapshots.gather(1, index).squeeze(1), snapshots[:, len(times) - 1]
    slope = flow.per_frame(torch.where(t_BT > 0, t_BT, 1.0))
    return Noised(x, t_BT, (x - end) / slope, t_BT.square(), context)
