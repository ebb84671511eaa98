"""Tiny random LTX-2 transformers in the real file format, and calls that fit them."""

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import LTX2VideoTransformer3DModel

from vgr.models.refiner import Refiner
from vgr.types import Conditioning, Layout, TextStates

CHANNELS, GRID, TOKENS, FPS = 4, (2, 3), 5, 16.0
CELLS = GRID[0] * GRID[1]
TINY = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
    audio_in_channels=3, audio_out_channels=3, audio_num_attention_heads=2, audio_attention_head_dim=8,
    audio_cross_attention_dim=16, num_layers=2, caption_channels=10, rope_type="split",
)  # fmt: skip
SIZES = dict(in_channels=CHANNELS, text_width=10, heads=2, head_dim=12, layers=2)
# What conf/model/refiner.yaml trains: attention's Q, K, V, O and the feed-forward layers.
TARGETS = [f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]


def save_transformer(folder):
    """transformer/ as diffusers writes it, every weight random, norms and tables too."""
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(**TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.4 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder / "transformer")


def refiner(folder, **settings):
    return Refiner.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def inputs(frames, batch=2, seed=1, grid=GRID):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, CHANNELS, frames, *grid, generator=g)
    t = torch.rand(batch, frames, generator=g)
    mask = torch.ones(batch, 1, TOKENS, dtype=torch.bool)
    mask[-1, :, :2] = False
    text = TextStates(torch.randn(batch, 1, TOKENS, TINY["caption_channels"], generator=g), mask)
    return x, t, Conditioning(Layout.whole(batch, frames), text)
