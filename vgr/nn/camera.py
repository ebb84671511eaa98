"""How cameras enter attention: ray-local frames (UCPE) and raw-frame Pluecker rays on the latent grid.

Both use the released world model's convention: intrinsics in latent cells and integer cell indices, no
half-cell offset, so that its weights mean here what they mean there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vgr.nn.precision import writes_in_place


def cell_directions(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Unit rays in camera axes through latent cells: normalised intrinsics (...,4) to (...,H*W,3)."""
    fx, fy, cx, cy = (intrinsics[..., i, None] for i in range(4))
    u = torch.arange(width, dtype=intrinsics.dtype, device=intrinsics.device).repeat(height)
    v = torch.arange(height, dtype=intrinsics.dtype, device=intrinsics.device).repeat_interleave(width)
    x = (u - cx * width) / (fx * width)
    y = (v - cy * height) / (fy * height)
    return F.normalize(torch.stack([x, y, torch.ones_like(x)], dim=-1), dim=-1)


def ray_transforms(c2w: Tensor, intrinsics: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """World-to-ray-local matrices P (B,T,S,4,4) of every token and their inverses (SANA-WM section 3.3).

    c2w (B,T,4,4) relative poses, intrinsics (B,T,4). The local z axis is the token's ray, x is normal to the
    camera's vertical axis, the origin is the camera centre. A ray that is not a number gives the identity.
    """
    rotation, origin = c2w[..., :3, :3], c2w[..., :3, 3]
    z = F.normalize(cell_directions(intrinsics, height, width) @ rotation.mT, dim=-1, eps=1e-6)
    down = rotation[..., None, :, 1].expand_as(z)
    x = F.normalize(torch.linalg.cross(down, z), dim=-1, eps=1e-6)
    y = F.normalize(torch.linalg.cross(z, x), dim=-1, eps=1e-6)
    axes = torch.stack([x, y, z], dim=-1)
    inverse = torch.zeros(*axes.shape[:-2], 4, 4, dtype=c2w.dtype, device=c2w.device)
    inverse[..., :3, :3] = axes
    inverse[..., :3, 3] = origin.unsqueeze(-2)
    inverse[..., 3, 3] = 1.0
    matrix = torch.zeros_like(inverse)
    matrix[..., :3, :3] = axes.mT
    matrix[..., :3, 3] = -(axes.mT @ origin[..., None, :, None]).squeeze(-1)
    matrix[..., 3, 3] = 1.0
    valid = torch.isfinite(inverse).all(-1).all(-1)[..., None, None]
    eye = torch.eye(4, dtype=c2w.dtype, device=c2w.device)
    return torch.where(valid, matrix, eye), torch.where(valid, inverse, eye)


def pluecker_tokens(raw_c2w: Tensor, raw_intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Pluecker rays [d, o x d] of every raw frame on the latent grid: (B,T,R,4,4) to (B,T,S,6R), frame-major."""
    rotation, origin = raw_c2w[..., :3, :3], raw_c2w[..., :3, 3]
    d = cell_directions(raw_intrinsics, height, width) @ rotation.mT
    moment = torch.linalg.cross(origin.unsqueeze(-2).expand_as(d), d)
    return torch.cat([d, moment], dim=-1).permute(0, 1, 3, 2, 4).flatten(3)


def transform_groups(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply consecutive groups of four channels, taken as column vectors: x (B,T,S,N,K), matrix (B,T,S,4,4)."""
    # One (N*K/4, 4) x (4, 4) product a token: a broadcast over heads would be many times slower backward.
    groups = x.reshape(-1, x.shape[-2] * x.shape[-1] // 4, 4)
    return torch.bmm(groups, matrix.reshape(-1, 4, 4).mT).view(x.shape)


def limit_rms(transformed: Tensor, original: Tensor) -> Tensor:
    """Shrink each token's head so that its channel RMS does not exceed the original's (spec 4.2, renormalisation)."""
    before, after = (
        torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + 1e-6 for x in (original, transformed)
    )
    factor = (before / after).sqrt().clamp(max=1.0)
    return transformed.mul_(factor) if writes_in_place() else transformed * factor
