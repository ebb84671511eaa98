"""Gated convolutional feed-forward with temporal mixing (GLUMBConvTemp, spec 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgr.nn.precision import writes_in_place
from vgr.nn.temporal import mix_frames
from vgr.types import Shard

# Convolution kernels index with 32 bits; a minute of 720p has more elements than that.
_MAX_ELEMENTS = 2**30


class ConvFeedForward(nn.Module):
    """Expand, SiLU, depthwise 3x3 in space, gate, project; then add a dense 3-tap convolution over time.

    Tokens stay channels-last throughout: 1x1 convolutions are linear layers and the convolutions read the same
    memory as channels-last images. x (B,T,S,D) with S = H*W row-major.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.expand = nn.Linear(width, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = nn.Linear(hidden, width, bias=False)
        self.temporal = nn.Conv2d(width, width, (3, 1), padding=(1, 0), bias=False)
        nn.init.zeros_(self.temporal.weight)

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        chunks: Sequence[int],
        before: Tensor | None = None,
        shard: Shard | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x to the same shape, and what the next call needs as `before` (B,1,S,D): the last frame before mixing."""
        images = x.flatten(0, 1)
        limit = max(1, _MAX_ELEMENTS // (self.depthwise.in_channels * height * width))
        parts = [self._per_frame(part, height, width) for part in images.split(limit)]
        z = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
        return z + mix_frames(z, self.temporal.weight, chunks, before, shard), z[:, -1:]

    def _per_frame(self, x: Tensor, height: int, width: int) -> Tensor:
        """The feed-forward of single frames (F,S,D)."""
        fresh = writes_in_place()  # large tensors, and pages of new ones cost more than the arithmetic
        h = F.silu(self.expand(x), inplace=fresh).unflatten(1, (height, width))
        h = self.depthwise(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        value, gate = h.flatten(1, 2).chunk(2, dim=-1)
        return self.project(value * F.silu(gate, inplace=fresh))
