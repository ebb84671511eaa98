"""A byte-level text encoder without downloads, trained jointly with the denoiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vgr.types import TextStates

_PAD = 256
_NULL = 257


class ByteTextEncoder(nn.Module):
    """UTF-8 bytes to states (B,S,J,width): embeddings, positions, pre-norm transformer blocks.

    width: width of the states. length: J, bytes beyond it are cut. An empty caption is one learned null token,
    the unconditional text of classifier-free guidance.
    """

    def __init__(self, width: int = 128, length: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"text.width must be a multiple of text.heads, got {width} and {heads}")
        self.config: dict[str, Any] = {"width": width, "length": length, "layers": layers, "heads": heads}
        self.width = width
        self.length = length
        self.embed = nn.Embedding(258, width, padding_idx=_PAD)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def tokenize(self, captions: tuple[tuple[str, ...], ...]) -> Tensor:
        """B tuples of captions to byte tokens (B,S,J) int64; fewer than S shots are padded with masked rows."""
        shots = max(len(row) for row in captions)
        tokens = torch.full((len(captions), shots, self.length), _PAD, dtype=torch.int64)
        for b, row in enumerate(captions):
            for s, caption in enumerate(row):
                data = list(caption.encode("utf-8")[: self.length]) or [_NULL]
                tokens[b, s, : len(data)] = torch.tensor(data)
        return tokens

    def forward(self, captions: tuple[tuple[str, ...], ...]) -> TextStates:
        """Captions to states on this module's device; the mask is true at real tokens."""
        tokens = self.tokenize(captions).to(self.position.device)
        batch, shots, _ = tokens.shape
        mask = tokens != _PAD
        used = int(mask.any(0).any(0).sum())
        tokens, mask = tokens[..., :used], mask[..., :used]
        flat, flat_mask = tokens.flatten(0, 1), mask.flatten(0, 1).clone()
        flat_mask[:, 0] = True  # a fully padded row would make softmax undefined; it stays masked outside
        x = self.embed(flat) + self.position[:used]
        x = self.norm(self.blocks(x, src_key_padding_mask=~flat_mask))
        return TextStates(x.unflatten(0, (batch, shots)), mask)
