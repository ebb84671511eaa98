"""Normalisation with fp32 arithmetic, whatever the precision around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vgr.nn.precision import writes_in_place


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms (...,1) of the last axis, in one pass; the composite rms_norm of the CPU backend takes two."""
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight in fp32; by hand, since the composite's backward passes over x twice as often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        unit, scale, weight = ctx.saved_tensors
        product, to_x = (grad * unit).reshape(-1, weight.numel()), None  # grad may come in another order of axes
        to_weight = product.sum(0) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad.device.type, enabled=False):
                along = (product @ weight).view(scale.shape) / -weight.numel()
            to_x = torch.addcmul(grad * weight, unit, along) * scale
        return to_x, to_weight, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis of width D; computed in fp32, returned in fp32."""

    def __init__(self, width: int, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """x of any shape (...,D), the result multiplied by `factor`."""
        x, weight = x.float(), self.weight.float() * factor
        if not writes_in_place():
            return _RMSNorm.apply(x, weight, self.eps)
        return (x * _inverse_rms(x, self.eps)).mul_(weight)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift without affine parameters; x (B,T,S,D), shift and scale (B,T,1,D)."""
    h = F.layer_norm(x.float(), (x.shape[-1],), eps=1e-6)
    return torch.addcmul(shift, h, 1.0 + scale)
