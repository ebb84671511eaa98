"""Telling a student's videos from true ones by what the critic sees in them (causal video, spec 6.1 eq. 11)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Judge(nn.Module):
    """A light head on a denoiser's middle layers: registers read each layer's tokens, an MLP gives one logit a video.

    width: of the denoiser's tokens; layers: indices into its `blocks`; inner, heads: width and heads of the head's own
    attention; registers: learned queries a layer. The denoiser is only watched, so its contract, its weights' names
    and its sharding stay as they are: `with judge.watch(denoiser) as seen: denoiser(...)`, then `judge(seen, frames)`.
    """

    def __init__(self, width: int, layers: Sequence[int], inner: int = 256, heads: int = 4, registers: int = 1) -> None:
        super().__init__()
        if not layers or inner % heads:
            raise ValueError(
                f"judge.inner={inner} must be a multiple of judge.heads={heads}, judge.layers={list(layers)} not empty"
            )
        self.layers, self.heads = sorted(layers), heads
        self.registers = nn.Parameter(torch.randn(len(self.layers), registers, inner) / inner**0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.layers)
        self.keys_values = nn.ModuleList(nn.Linear(width, 2 * inner) for _ in self.layers)
        taken = len(self.layers) * registers * inner
        self.mlp = nn.Sequential(nn.LayerNorm(taken), nn.Linear(taken, inner), nn.SiLU(), nn.Linear(inner, 1))

    @contextmanager
    def watch(self, denoiser: nn.Module) -> Iterator[list[Tensor]]:
        """Collects the output of the denoiser's blocks `layers` while it is called. ValueError for layers it lacks."""
        if max(self.layers) >= len(denoiser.blocks):
            raise ValueError(f"judge.layers={self.layers}, but the critic has {len(denoiser.blocks)} blocks")
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hooks = [denoiser.blocks[i].register_forward_hook(keep) for i in self.layers]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, seen: Sequence[Tensor], share: float = 1.0) -> Tensor:
        """Logits (B,), above 0 for true, from what was seen: tokens (B,T,S,D) or (B,L,D) of each layer, in fp32.

        share: the last part of the tokens that is judged; 0.5 in a packed call, whose first half is context.
        """
        read = []
        with torch.autocast(seen[0].device.type, enabled=False):
            for tokens, norm, linear, register in zip(seen, self.norms, self.keys_values, self.registers, strict=True):
                tokens = tokens.float().flatten(1, -2)
                tokens = tokens[:, round((1 - share) * tokens.shape[1]) :]
                k, v = linear(norm(tokens)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
                q = register.expand(len(k), -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                read.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
            return self.mlp(torch.cat(read, dim=1)).squeeze(1)
