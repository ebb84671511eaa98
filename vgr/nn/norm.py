"""Normalisation with fp32 arithmetic, whatever the precision around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis of width D; computed in fp32, returned in fp32."""

    def __init__(self, width: int, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        # One pass for the norm; the composite rms_norm of the CPU backend squares and averages in two.
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        return x * torch.rsqrt(square / x.shape[-1] + self.eps) * self.weight.float()


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift without affine parameters; x (B,T,S,D), shift and scale (B,T,1,D)."""
    h = F.layer_norm(x.float(), (x.shape[-1],), eps=1e-6)
    return torch.addcmul(shift, h, 1.0 + scale)
