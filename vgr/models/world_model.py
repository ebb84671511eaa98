"""SANA-WM's stage-1 generator: a hybrid linear diffusion transformer with dual-branch camera control.

Section numbers are those of arXiv 2605.15178; equations follow the released code where the two differ.
Notation: tokens (B,T,S,D), S = H*W cells of a latent frame, one time per latent frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgr.models import weights, world_model_weights
from vgr.nn.attention import CameraFrames, CrossAttention, DualAttention
from vgr.nn.camera import pluecker_tokens, ray_transforms
from vgr.nn.embed import sinusoid
from vgr.nn.ffn import ConvFeedForward
from vgr.nn.norm import RMSNorm, modulated_norm
from vgr.nn.rope import axis_pairs, rope_table
from vgr.types import Conditioning


class Block(nn.Module):
    """Self-attention, Pluecker mixing, text, feed-forward (spec 2.3); the table modulates per frame."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, attention: DualAttention) -> None:
        super().__init__()
        self.attn = attention
        self.plucker_proj = nn.Linear(width, width)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = ConvFeedForward(width, mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        grid: tuple[int, int],
        table: Tensor,
        camera: CameraFrames | None,
        pluecker: Tensor | None,
        text: Tensor,
        text_mask: Tensor,
    ) -> Tensor:
        m = (modulation + self.scale_shift_table).unsqueeze(3)  # (B,T,6,1,D)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = m.unbind(2)
        x = torch.addcmul(x, gate_a, self.attn(modulated_norm(x, shift_a, scale_a), table, camera).float())
        if pluecker is not None:
            x = x + self.plucker_proj(pluecker)
        x = x + self.cross_attn(x, text, text_mask)
        return torch.addcmul(x, gate_f, self.mlp(modulated_norm(x, shift_f, scale_f), *grid).float())


class WorldModel(nn.Module):
    """The bidirectional world model: noisy latents, per-frame times, text and cameras to velocity.

    in_channels: latent channels; width, heads, layers: the transformer, width/heads a multiple of 8;
    softmax_every: block i is softmax when (i+1) % softmax_every == 0, gated delta otherwise;
    text_width: width of the text encoder's states; raw_frames: raw frames of a latent frame (codec stride);
    cam_renorm_softmax, cam_renorm_gdn, softmax_bf16, *_scale: the released model's doubtful points, see
    `vgr.nn.attention.DualAttention`; truncate_times: the model sees floor(1000 t), as its weights were trained;
    activation_checkpointing: recompute blocks in the backward pass.
    """

    def __init__(
        self,
        in_channels: int = 128,
        width: int = 2240,
        heads: int = 20,
        layers: int = 20,
        softmax_every: int = 4,
        mlp_ratio: float = 3.0,
        text_width: int = 2304,
        raw_frames: int = 8,
        conv_kernel: int = 4,
        cam_renorm_softmax: bool = True,
        cam_renorm_gdn: bool = False,
        softmax_bf16: bool = False,
        softmax_scale: float | None = None,
        cam_softmax_scale: float | None = None,
        truncate_times: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            k: v for k, v in locals().items() if k not in ("self", "__class__", "activation_checkpointing")
        }
        if width % heads or (width // heads) % 8:
            raise ValueError(
                f"model.width / model.heads must be a multiple of 8 (4x4 camera groups fill half a head), "
                f"got {width} / {heads}"
            )
        self.heads, self.head_dim, self.truncate_times = heads, width // heads, truncate_times
        self.raw_frames, self.in_channels = raw_frames, in_channels
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = nn.Linear(in_channels, width)
        self.plucker_embedder = nn.Linear(6 * raw_frames, width)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Linear(width, 6 * width)
        self.y_proj = nn.Sequential(nn.Linear(text_width, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.attention_y_norm = RMSNorm(width, 1e-5, scale=0.01)
        kinds = ["softmax" if (i + 1) % softmax_every == 0 else "gdn" for i in range(layers)]
        renorm = {"softmax": cam_renorm_softmax, "gdn": cam_renorm_gdn}
        scales = (softmax_scale, cam_softmax_scale)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio,
                DualAttention(width, heads, kind, conv_kernel, renorm[kind], softmax_bf16, *scales),
            )
            for kind in kinds
        )
        self.final_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final_linear = nn.Linear(width, in_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linear layers, then the special starts of sections 3.2 and 4.2; the output starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.t_embedder[0], self.t_embedder[2], self.t_block):
            nn.init.normal_(linear.weight, std=0.02)
        with torch.no_grad():
            # Channel 0 of attention inputs starts as "this frame is clean": only at t = 0 do all cosines agree.
            for linear in (self.t_embedder[0], self.t_embedder[2]):
                linear.weight[0] = 0.0
            self.t_embedder[0].weight[0, :128] = 8.0 / 128
            self.t_embedder[0].bias[0] = -4.8
            self.t_embedder[2].weight[0, 0] = 1.0
            self.t_block.weight[0, 0] = 3.0
        for block in self.blocks:
            block.attn.reset_special()
            nn.init.zeros_(block.cross_attn.proj.weight)
        # With both Pluecker layers at zero the branch would have no gradient: zero embedder, Xavier projections.
        nn.init.zeros_(self.plucker_embedder.weight)
        nn.init.zeros_(self.final_linear.weight)

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, state: None = None, *, commit: bool = False
    ) -> tuple[Tensor, None]:
        """Velocity (B,C,T,H,W) for latents x (B,C,T,H,W) at times t (B,T) in [0, 1]; it keeps no state."""
        if state is not None or commit:
            raise ValueError("this world model is bidirectional and keeps no state; call it with the whole clip")
        batch, _, frames, height, width = x.shape
        self._check(x, t, cond)
        tokens = self.x_embedder(x.permute(0, 2, 3, 4, 1).flatten(2, 3).float()).float()
        # fp32 times may stand an ulp below an integer multiple of 1/1000; the slack keeps 29 from becoming 28.
        time = torch.floor(1000.0 * t.double() + 1e-4).float() if self.truncate_times else 1000.0 * t.float()
        with torch.autocast(x.device.type, enabled=False):
            t_emb = self.t_embedder(sinusoid(time))
            modulation = self.t_block(F.silu(t_emb)).unflatten(-1, (6, -1))
        text, text_mask = self._text(cond, height * width)
        table = rope_table(cond.layout.position, height, width, self.head_dim)
        camera, pluecker = self._cameras(cond, height, width)
        args = (modulation, (height, width), table, camera, pluecker, text, text_mask)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, *args, use_reentrant=False)
            else:
                tokens = block(tokens, *args)
        shift, scale = (t_emb.unsqueeze(2) + self.final_table).unsqueeze(3).unbind(2)
        out = self.final_linear(modulated_norm(tokens, shift, scale)).float()
        return out.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3), None

    def _check(self, x: Tensor, t: Tensor, cond: Conditioning) -> None:
        if x.shape[1] != self.in_channels or t.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"the world model takes x (B,{self.in_channels},T,H,W) and t (B,T), "
                f"got {tuple(x.shape)} and {tuple(t.shape)}"
            )
        if cond.cameras is not None and cond.cameras.raw_c2w.shape[1:3] != (x.shape[2], self.raw_frames):
            raise ValueError(
                f"cameras must hold {x.shape[2]} latent frames of {self.raw_frames} raw frames, "
                f"got {tuple(cond.cameras.raw_c2w.shape[1:3])}"
            )

    def _text(self, cond: Conditioning, cells: int) -> tuple[Tensor, Tensor]:
        """Normalised text (B,S*J,D) and who may read it: each frame reads its own shot's prompt."""
        states, mask = cond.text.states, cond.text.mask
        batch, shots, length = mask.shape
        text = self.attention_y_norm(self.y_proj(states.flatten(1, 2)))
        if shots == 1:
            return text, mask.view(batch, 1, 1, length)
        own = cond.layout.shot.unsqueeze(-1) == torch.arange(shots, device=mask.device)
        readable = (own.unsqueeze(-1) & mask.unsqueeze(1)).flatten(2)
        return text, readable.repeat_interleave(cells, dim=1).unsqueeze(1)

    def _cameras(self, cond: Conditioning, height: int, width: int) -> tuple[CameraFrames | None, Tensor | None]:
        if cond.cameras is None:
            return None, None
        cameras = cond.cameras
        main = axis_pairs(self.head_dim)
        keep = axis_pairs(self.head_dim // 2)
        table = rope_table(cond.layout.position, height, width, self.head_dim, keep=tuple(map(min, keep, main)))
        matrix, inverse = ray_transforms(cameras.c2w.float(), cameras.intrinsics.float(), height, width)
        rays = pluecker_tokens(cameras.raw_c2w.float(), cameras.raw_intrinsics.float(), height, width)
        return CameraFrames(matrix, inverse, table), self.plucker_embedder(rays)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, made if missing."""
        weights.save_folder(folder, "WorldModel", self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WorldModel:
        """Load our own export or a diffusers `SanaWMTransformer3DModel` folder; every tensor must match."""
        config, tensors = weights.load_folder(folder, world_model_weights.ADAPTERS)
        model = cls(**config)
        weights.assign(model, tensors, folder)
        return model
