"""Noise levels: how training draws them and which grid a sampler walks down."""

from __future__ import annotations

import torch
from torch import Tensor

from vgr.seeding import torch_generator


def shifted(t: Tensor, shift: float) -> Tensor:
    """The flow shift s t / (1 + (s - 1) t): more time at high noise for s > 1."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def sigma_grid(steps: int, shift: float) -> Tensor:
    """The released sampler's grid (spec 1.4): steps + 1 values in fp64 from 1 down to exactly 0.

    The lower end is shifted before the grid is laid and the whole grid is shifted once more, as the scheduler
    does it; the last non-zero value therefore depends on the shift alone (0.0877 at 9.8).
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"sampling needs steps >= 1 and shift > 0, got steps={steps}, shift={shift}")
    low = shifted(torch.tensor(0.001, dtype=torch.float64), shift).item()
    grid = shifted(torch.linspace(1.0, low, steps, dtype=torch.float64), shift)
    return torch.cat([grid, grid.new_zeros(1)])


def training_times(positions: Tensor, frames: int, seed: int, shift: float, clean_first: float) -> Tensor:
    """Times (B,T) for samples at `positions` (B,) of the run's order (SANA-WM section 5.1).

    One level per sample, u = sigmoid(normal), floor(1000 u) / 1000, shifted; frame 0 is clean (t = 0) with
    probability `clean_first`. A function of (seed, position) alone; fp32 on the positions' device.
    """
    rows = []
    for position in positions.tolist():
        generator = torch_generator(seed, "time", int(position))
        u = torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64))
        t = shifted(torch.floor(1000.0 * u) / 1000.0, shift).float().repeat(frames)
        if torch.rand((), generator=generator) < clean_first:
            t[0] = 0.0
        rows.append(t)
    return torch.stack(rows).to(positions.device)
