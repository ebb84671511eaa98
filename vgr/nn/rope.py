"""Rotary positions over the (time, height, width) grid of latents, as complex rotations of interleaved pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs given to T, H and W: floor(K/6) each for H and W, the rest for T (K = head_dim)."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def rope_table(
    position: Tensor, height: int, width: int, head_dim: int, keep: tuple[int, int, int] | None = None
) -> Tensor:
    """Rotations (T, H*W, pairs) complex64 for integer frame positions (T,) and a latent grid.

    Each axis has its own frequencies 10000^(-j / pairs_axis), made in fp64. `keep` takes only the first
    (highest) frequencies of every axis: the camera branch's table is cut from the main one, not made anew.
    """
    grids = (
        position.double().view(-1, 1, 1),
        torch.arange(height, dtype=torch.float64, device=position.device).view(1, -1, 1),
        torch.arange(width, dtype=torch.float64, device=position.device).view(1, 1, -1),
    )
    shape = (position.shape[0], height, width)
    angles = []
    for axis, (grid, pairs) in enumerate(zip(grids, axis_pairs(head_dim))):
        used = pairs if keep is None else keep[axis]
        exponent = torch.arange(used, dtype=torch.float64, device=position.device) / max(pairs, 1)
        angles.append((grid.unsqueeze(-1) * 10000.0**-exponent).expand(*shape, used))
    angle = torch.cat(angles, dim=-1).flatten(1, 2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate the last axis' interleaved pairs: x (B,T,S,N,K) fp32, table (T,S,K/2). The inverse is `table.conj()`.

    out: where to write, without a gradient.
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    into = None if out is None else torch.view_as_complex(out.unflatten(-1, (-1, 2)))
    return torch.view_as_real(torch.mul(pairs, table.unsqueeze(-2), out=into)).flatten(-2)
