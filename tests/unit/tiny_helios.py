"""A Helios of 0.1 M parameters, random in every weight, as diffusers' class and as ours, and inputs for both."""

import torch

from vgr.models.helios import Helios
from vgr.types import Conditioning, Layout, TextStates

SIZES = {"in_channels": 16, "text_width": 32, "heads": 2, "head_dim": 12, "layers": 2, "text_length": 6}
OPTIONS = {"ffn_dim": 32, "rope_dim": [4, 4, 4]}


def helios(seed=0, **settings):
    torch.manual_seed(seed)
    model = Helios(**SIZES, options=OPTIONS, **settings)
    for p in model.parameters():  # every one: zeros would hide errors
        torch.nn.init.normal_(p, mean=0.0 if p.dim() > 1 else 0.5, std=0.2)
    return model.eval()


def conditioning(batch=2, frames=9, first=40, stage=0, seed=1, **fields):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[6], [3]])[:batch]
    text = TextStates(torch.randn(batch, 1, 6, 32, generator=g), mask[:, None])
    layout = Layout.whole(batch, first + frames).frames(first, first + frames)
    return Conditioning(layout, text, stage=stage, **fields)
