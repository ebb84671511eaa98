"""Time embeddings."""

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
