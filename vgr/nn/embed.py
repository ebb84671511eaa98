"""Times as features, and latents as patches and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoid(t: Tensor, dim: int = 256) -> Tensor:
    """[cos | sin] features (...,dim) of times (...), frequencies 10000^(-j / (dim/2)); fp32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def patches(x: Tensor, size: int) -> Tensor:
    """Latents (B,C,T,H,W) to (B,T,S,C*size*size): square patches row by row, channels first inside one."""
    x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # B C T h size w size
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)


def pixels(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Patches (B,T,S,size*size*C) on a grid, channels last inside one, to latents (B,C,T,H,W)."""
    x = x.unflatten(-1, (size, size, -1)).unflatten(2, grid)  # B T h w size size C
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
