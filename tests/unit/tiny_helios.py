"""A Helios of 0.1 M parameters, random in every weight, as diffusers' class and as ours, and inputs for both."""

import torch

from vgr.models.helios import Helios
from vgr.types import Conditioning, Layout, TextStates

SIZES = {"in_channels": 16, "text_width": 32, "heads": 2, "head_dim": 12, "layers": 2, "text_length": 6}
OPTIONS = {"ffn_dim": 32, "rope_dim": [4, 4, 4]}


def helios(seed=0, **settings):
    torch.manual_seed(seed)
    model = Helios(**{**SIZES, **settings}, options=OPTIONS)
    for p in model.parameters():  # every one: zeros would hide errors
        torch.nn.init.normal_(p, mean=0.0 if p.dim() > 1 else 0.5, std=0.2)
    return model.eval()


def conditioning(batch=2, frames=9, first=40, stage=0, seed=1, **fields):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[6], [3]])[:batch]
    text = TextStates(torch.randn(batch, 1, 6, 32, generator=g), mask[:, None])
    layout = Layout.whole(batch, first + frames).frames(first, first + frames)
    return Conditioning(layout, text, stage=stage, **fields)


def release(folder, umt5, scheduler="HeliosDMDScheduler", **settings):
    """A folder as Helios is released, transformer/, vae/, scheduler/, text_encoder/ and tokenizer/, small and random.

    umt5: a folder with the last two, 16 wide.
    """
    import shutil

    import diffusers

    model = helios(text_width=16)
    model.transformer.save_pretrained(folder / "transformer")
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    getattr(diffusers, scheduler)(**settings).save_pretrained(folder / "scheduler")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(umt5 / name, folder / name)
    return folder
