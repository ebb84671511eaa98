"""diffusers' SanaWMTransformer3DModel with random weights and inputs for both models: for parity and timing."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vgr.geometry.cameras import group_by_latent, so3_exp
from vgr.models.world_model import WorldModel
from vgr.nn.camera import pluecker_tokens
from vgr.types import Cameras, Conditioning, LatentCameras, Layout, TextStates


@dataclass
class Inputs:
    """One call in vgr's contract: x (B,C,T,H,W), t (B,T) in [0,1], conditioning."""

    x: Tensor
    t: Tensor
    cond: Conditioning

    def port_arguments(self) -> dict[str, Tensor]:
        """The same call in the port's arguments: times x1000, cameras in latent cells, packed Pluecker rays."""
        height, width = self.x.shape[-2:]
        cameras, text = self.cond.cameras, self.cond.text
        cells = cameras.intrinsics * cameras.intrinsics.new_tensor([width, height, width, height])
        rays = pluecker_tokens(cameras.raw_c2w, cameras.raw_intrinsics, height, width)
        return {
            "hidden_states": self.x,
            "timestep": (1000.0 * self.t).unsqueeze(1),
            "encoder_hidden_states": text.states,
            "encoder_attention_mask": text.mask[:, 0],
            "camera_conditions": torch.cat([cameras.c2w.flatten(2), cells], dim=-1),
            "chunk_plucker": rays.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3),
        }


def make_port(
    width: int, heads: int, layers: int, softmax_every: int, channels: int, text_width: int, raw_frames: int, seed: int
) -> nn.Module:
    """A port whose every parameter is random (its own start leaves whole branches at zero), in eval mode."""
    from diffusers import SanaWMTransformer3DModel

    port = SanaWMTransformer3DModel(
        in_channels=channels,
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        linear_head_dim=width // heads,
        softmax_every_n=softmax_every,
        caption_channels=text_width,
        chunk_plucker_channels=6 * raw_frames,
        chunk_plucker_post_attn_blocks=layers,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in port.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight") or "_norm_cam" in name:
                p.copy_(1.0 + 0.1 * noise)
            elif p.dim() < 2:
                p.copy_(0.1 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)
    return port.eval()


def from_port(port: nn.Module, **settings: int) -> WorldModel:
    """Our model with the port's weights, through a saved folder; softmax in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        port.save_pretrained(folder)
        model = WorldModel.from_pretrained(folder, **settings)
    for block in model.blocks:
        block.attn.softmax_bf16 = False
    return model.eval()


def make_inputs(
    batch: int, channels: int, frames: int, grid: tuple[int, int], text_width: int, raw_frames: int, seed: int,
    translation: float = 1.0,
) -> Inputs:
    """Random latents, fractional per-frame times (frame 0 clean), differing cameras and text masks."""
    g = torch.Generator().manual_seed(seed)
    raw = 1 + (frames - 1) * raw_frames
    c2w = torch.eye(4).repeat(batch, raw, 1, 1)
    c2w[..., :3, :3] = so3_exp(0.1 * torch.randn(batch, raw, 3, generator=g).cumsum(1))
    c2w[..., :3, 3] = translation * 0.1 * torch.randn(batch, raw, 3, generator=g).cumsum(1)
    intrinsics = torch.tensor([0.5, 0.6, 0.5, 0.5]) + 0.05 * torch.rand(batch, raw, 4, generator=g)
    cameras: LatentCameras = group_by_latent(Cameras(c2w, intrinsics), raw_frames)
    t = torch.rand(batch, frames, generator=g)
    t[:, 0] = 0.0
    tokens = 7
    lengths = torch.randint(1, tokens + 1, (batch, 1, 1), generator=g)
    text = TextStates(
        torch.randn(batch, 1, tokens, text_width, generator=g), torch.arange(tokens).view(1, 1, -1) < lengths
    )
    x = torch.randn(batch, channels, frames, *grid, generator=g)
    return Inputs(x, t, Conditioning(Layout.whole(batch, frames), text, cameras))


@contextlib.contextmanager
def fp32_softmax() -> Iterator[None]:
    """Keep the port's softmax attention in fp32: it casts q, k, v by `Tensor.bfloat16()`."""
    original = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self, *a, **k: self
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = original
