"""Gated convolutional feed-forward with temporal mixing (GLUMBConvTemp, spec 2.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, frames, tokens, _ = x.shape
        h = F.silu(self.expand(x)).view(batch * frames, height, width, -1)
        h = self.depthwise(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        value, gate = h.chunk(2, dim=-1)
        z = self.project(value * F.silu(gate)).view(batch, frames, tokens, -1)
        return z + self.temporal(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
