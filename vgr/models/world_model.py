"""SANA-WM's stage-1 generator: a hybrid linear diffusion transformer with dual-branch camera control.

Section numbers are those of arXiv 2605.15178; equations follow the released code where the two differ.
Notation: tokens (B,T,S,D), S = H*W cells of a latent frame, one time per latent frame.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgr.models import weights, world_model_weights
from vgr.nn.attention import KEY_SCALES, CameraFrames, Chunks, CrossAttention, DualAttention, Memory
from vgr.nn.camera import pluecker_tokens, ray_transforms
from vgr.nn.embed import sinusoid
from vgr.nn.ffn import ConvFeedForward
from vgr.nn.norm import RMSNorm, modulated_norm
from vgr.nn.precision import Linear32, in_own_precision
from vgr.nn.rope import axis_pairs, rope_table
from vgr.types import Conditioning, Shard

_CHOICES = {
    "mixer": ("gdn", "linear"),
    "scan_backend": ("torch", "triton"),
    "camera_start": ("copy", "rays"),
    "cameras": ("both", "ucpe", "pluecker", "pluecker_input", "none"),
    "key_scale": tuple(KEY_SCALES),
}
# Of attention, and the feed-forward's last frame before its temporal mixing.
BlockMemory = tuple[Memory, Tensor]


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
        chunks: Chunks,
        shard: Shard | None,
        memory: BlockMemory | None,
    ) -> tuple[Tensor, BlockMemory]:
        past, before = (None, None) if memory is None else memory
        m = (modulation + self.scale_shift_table).unsqueeze(3)  # (B,T,6,1,D)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = m.unbind(2)
        mixed, past = self.attn(modulated_norm(x, shift_a, scale_a), table, camera, chunks, past, shard)
        x = torch.addcmul(x, gate_a, mixed.float())
        if pluecker is not None:
            x += self.plucker_proj(pluecker)
        x = x + self.cross_attn(x, text, text_mask)
        mixed, before = self.mlp(modulated_norm(x, shift_f, scale_f), *grid, chunks.sizes, before, shard)
        return torch.addcmul(x, gate_f, mixed.float()), (past, before)


@dataclasses.dataclass(frozen=True)
class WorldModelState:
    """What a world model remembers of the chunks committed so far; opaque to callers.

    blocks: one memory a block, None before the first commit; frames, chunk: latent frames and chunks committed;
    detach: commits store tensors without their graph.
    """

    blocks: tuple[BlockMemory | None, ...]
    frames: int
    chunk: int
    detach: bool


def _detached(memory: Any) -> Any:
    if isinstance(memory, Tensor):
        return memory.detach()
    if isinstance(memory, tuple):
        return tuple(_detached(m) for m in memory)
    if dataclasses.is_dataclass(memory):
        return type(memory)(*(_detached(getattr(memory, f.name)) for f in dataclasses.fields(memory)))
    return memory


class WorldModel(nn.Module):
    """The world model: noisy latents, per-frame times, text and cameras to velocity.

    Bidirectional inside a chunk of `cond.layout`, causal between chunks (spec 3.8): with one chunk it is the
    bidirectional model, with several in one call the masked chunk-causal one, and with a state it streams.

    in_channels: latent channels; width, heads, layers: the transformer, width/heads a multiple of 8;
    softmax_every: block i is softmax when (i+1) % softmax_every == 0 (0: none), `mixer` otherwise;
    mixer: "gdn", or "linear" for the linear attention that SANA-WM starts from (spec 5.3);
    sink, window: chunks softmax blocks read beside their own, the first `sink` and the last `window` (None: all);
    cam_filter_isolated: camera keys are filtered inside their chunk only (spec 12.9);
    scan_backend: "torch", or "triton" on a GPU;
    camera_start: "copy" of the main branch (spec 4.2), or "rays": softmax blocks look clean frames up along rays;
    cameras: how they are told (table 4): "ucpe" in attention, "pluecker" in every block or "pluecker_input" before the
    first one, "both" (ucpe and pluecker), or "none", which ignores them;
    key_scale: of gated delta keys, see `vgr.nn.attention.KEY_SCALES`;
    text_width: width of the text encoder's states; raw_frames: raw frames of a latent frame (codec stride);
    cam_renorm_softmax, cam_renorm_gdn, softmax_bf16, *_scale: the released model's doubtful points, see
    `vgr.nn.attention.DualAttention`; truncate_times: the model sees floor(1000 t), as its weights were trained;
    activation_checkpointing: recompute blocks in the backward pass.
    """

    takes_cameras, patch = True, 1
    shards_frames = True  # ranks of a shard hold frames of a call

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
        mixer: str = "gdn",
        sink: int = 0,
        window: int | None = None,
        cam_filter_isolated: bool = False,
        scan_backend: str = "torch",
        camera_start: str = "copy",
        cameras: str = "both",
        key_scale: str = "frame",
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
        for key, known in _CHOICES.items():
            if self.config[key] not in known:
                raise ValueError(f"model.{key}={self.config[key]}: choose {' or '.join(known)}")
        self.heads, self.head_dim, self.truncate_times = heads, width // heads, truncate_times
        self.raw_frames, self.in_channels = raw_frames, in_channels
        self.activation_checkpointing = activation_checkpointing
        self.x_embedder = nn.Linear(in_channels, width)
        self.plucker_embedder = nn.Linear(6 * raw_frames, width)
        self.t_embedder = nn.Sequential(Linear32(256, width), nn.SiLU(), Linear32(width, width))
        self.t_block = Linear32(width, 6 * width)
        self.y_proj = nn.Sequential(nn.Linear(text_width, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.attention_y_norm = RMSNorm(width, 1e-5, scale=0.01)
        kinds = ["softmax" if softmax_every and (i + 1) % softmax_every == 0 else mixer for i in range(layers)]
        renorm = {"softmax": cam_renorm_softmax, mixer: cam_renorm_gdn}
        rest = (softmax_bf16, softmax_scale, cam_softmax_scale, sink, window, cam_filter_isolated, scan_backend)
        attentions = (DualAttention(width, heads, kind, conv_kernel, renorm[kind], *rest, key_scale) for kind in kinds)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, attention) for attention in attentions)
        self.final_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final_linear = nn.Linear(width, in_channels)
        self.reset_parameters()
        self._leave_out(cameras)

    def _leave_out(self, cameras: str) -> None:
        """Drop what an encoding does not use; what it shares with the others was drawn, and so starts, as theirs."""
        self.takes_rays, self.takes_pluecker = cameras in ("both", "ucpe"), cameras not in ("ucpe", "none")
        if not self.takes_pluecker:
            del self.plucker_embedder
        branch = ("qkv_cam", "q_norm_cam", "k_norm_cam", "out_proj_cam", "conv_k_cam")
        for block in self.blocks:
            for name in branch if not self.takes_rays else ():
                if hasattr(block.attn, name):
                    delattr(block.attn, name)
            if cameras not in ("both", "pluecker"):
                del block.plucker_proj

    def reset_parameters(self) -> None:
        """Xavier for linear layers, then the special starts of sections 3.2 and 4.2; the output starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.t_embedder[0], self.t_embedder[2], self.t_block):
            nn.init.normal_(linear.weight, std=0.02)
        for block in self.blocks:
            block.attn.reset_special()
            nn.init.zeros_(block.cross_attn.proj.weight)
        # With both Pluecker layers at zero the branch would have no gradient: zero embedder, Xavier projections.
        nn.init.zeros_(self.plucker_embedder.weight)
        nn.init.zeros_(self.final_linear.weight)
        if self.config["camera_start"] == "rays":
            self._look_along_rays()

    @torch.no_grad()
    def _look_along_rays(self) -> None:
        """Softmax camera branches start as look-ups of clean frames; their output is zero until it is learnt."""
        # Channel 0 of attention inputs starts as "this frame is clean": only at t = 0 do all cosines agree.
        for linear in (self.t_embedder[0], self.t_embedder[2]):
            linear.weight[0] = 0.0
        self.t_embedder[0].weight[0, :128] = 8.0 / 128
        self.t_embedder[0].bias[0] = -4.8
        self.t_embedder[2].weight[0, 0] = 1.0
        self.t_block.weight[0, 0] = 3.0
        for block in self.blocks:
            if block.attn.kind == "softmax":
                block.attn.look_along_rays()

    def new_state(self, detach: bool = True) -> WorldModelState:
        """The state before a video's first chunk; with detach=False gradients flow through what commits store."""
        return WorldModelState((None,) * len(self.blocks), 0, 0, detach)

    @in_own_precision
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        state: WorldModelState | None = None,
        *,
        commit: bool = False,
        shard: Shard | None = None,
    ) -> tuple[Tensor, WorldModelState | None]:
        """Velocity (B,C,T,H,W) for latents x (B,C,T,H,W) at times t (B,T) in [0, 1].

        With a state the frames follow those committed; commit=True adds this call's chunks to what is returned.
        Without one x holds the video from its first frame on, in the chunks of cond.layout. With a shard x, t and
        cond hold this rank's frames of it, `shard.frames(total)`, and so does the velocity (spec 5.4).
        """
        height, width = x.shape[3:]
        chunks = self._check(x, t, cond, state, commit, shard)
        tokens = self.x_embedder(x.permute(0, 2, 3, 4, 1).flatten(2, 3).float()).float()
        # fp32 times may stand an ulp below an integer multiple of 1/1000; the slack keeps 29 from becoming 28.
        time = torch.floor(1000.0 * t.double() + 1e-4).float() if self.truncate_times else 1000.0 * t.float()
        t_emb = self.t_embedder(sinusoid(time))
        modulation = self.t_block(F.silu(t_emb)).unflatten(-1, (6, -1))
        text, text_mask = self._text(cond, height * width)
        table = rope_table(cond.layout.position, height, width, self.head_dim)
        camera, pluecker = self._cameras(cond, height, width)
        if pluecker is not None and self.config["cameras"] == "pluecker_input":
            tokens, pluecker = tokens + pluecker, None
        args = (modulation, (height, width), table, camera, pluecker, text, text_mask, chunks, shard)
        memories = []
        for i, block in enumerate(self.blocks):
            past = None if state is None else state.blocks[i]
            if self.activation_checkpointing and self.training:
                tokens, memory = checkpoint(block, tokens, *args, past, use_reentrant=False)
            else:
                tokens, memory = block(tokens, *args, past)
            if commit:
                memories.append(_detached(memory) if state.detach else memory)
        shift, scale = (t_emb.unsqueeze(2) + self.final_table).unsqueeze(3).unbind(2)
        out = self.final_linear(modulated_norm(tokens, shift, scale)).float()
        if commit:
            state = WorldModelState(tuple(memories), state.frames + x.shape[2], chunks.index[-1] + 1, state.detach)
        return out.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3), state

    def _check(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        state: WorldModelState | None,
        commit: bool,
        shard: Shard | None,
    ) -> Chunks:
        """The whole call's chunks on the host (the one synchronisation of a call). Raises ValueError."""
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
        layout = torch.stack([cond.layout.position, cond.layout.chunk, cond.layout.role])
        if layout.shape[1] != x.shape[2]:
            raise ValueError(f"cond.layout must hold the {x.shape[2]} latent frames of x, got {layout.shape[1]}")
        if shard is not None:
            if state is not None or commit:
                raise ValueError("a call split over ranks neither reads nor commits a state: give shard or state")
            layout = self._whole_layout(layout, shard)
        position, chunk, role = layout.tolist()
        if any(role) or position != list(range(position[0], position[0] + layout.shape[1])):
            raise ValueError("the world model takes successive target frames; it has no packed form with context")
        index = sorted(set(chunk))
        chunks = Chunks(tuple(index), tuple(chunk.count(i) for i in index))
        if commit and state is None:
            raise ValueError("commit=True needs a state: start with state=model.new_state()")
        if state is None:
            return chunks
        if position[0] != state.frames or index[0] != state.chunk:
            raise ValueError(
                f"the state has committed {state.frames} frames in {state.chunk} chunks; "
                f"this call starts at frame {position[0]}, chunk {index[0]}"
            )
        if len(index) > 1 and not commit:
            raise ValueError(f"a call with a state holds one whole chunk unless it commits, got chunks {index}")
        return chunks

    @staticmethod
    def _whole_layout(layout: Tensor, shard: Shard) -> Tensor:
        """Position, chunk and role (3,T) of all ranks' frames; every rank refuses what one of them holds wrongly."""
        held = shard.all_gather(torch.tensor(layout.shape[1:], device=layout.device)).tolist()
        spans = [shard.frames(sum(held), r) for r in range(shard.size)]
        if 0 in held or held != [b - a for a, b in spans]:
            raise ValueError(
                f"the ranks hold {held} latent frames; of {sum(held)} they must hold {spans}, at least one each: "
                f"slice x, t and cond by shard.frames(total)"
            )
        return shard.all_gather(layout, 1, sum(held))

    def _text(self, cond: Conditioning, cells: int) -> tuple[Tensor, Tensor]:
        """Normalised text (B,S*J,D) and who may read it: each frame reads its own shot's prompt, or `cond.prompt`."""
        states, mask = cond.text.states, cond.text.mask
        batch, shots, length = mask.shape
        text = self.attention_y_norm(self.y_proj(states.flatten(1, 2)))
        if shots == 1:
            return text, mask.view(batch, 1, 1, length)
        prompt = cond.layout.shot if cond.prompt is None else cond.prompt
        own = prompt.unsqueeze(-1) == torch.arange(shots, device=mask.device)
        readable = (own.unsqueeze(-1) & mask.unsqueeze(1)).flatten(2)
        return text, readable.repeat_interleave(cells, dim=1).unsqueeze(1)

    def _cameras(self, cond: Conditioning, height: int, width: int) -> tuple[CameraFrames | None, Tensor | None]:
        cameras = cond.cameras
        if cameras is None:
            return None, None
        main = axis_pairs(self.head_dim)
        keep = axis_pairs(self.head_dim // 2)
        table = rope_table(cond.layout.position, height, width, self.head_dim, keep=tuple(map(min, keep, main)))
        with torch.autocast(cameras.c2w.device.type, enabled=False):
            matrix, inverse = ray_transforms(cameras.c2w.float(), cameras.intrinsics.float(), height, width)
            rays = pluecker_tokens(cameras.raw_c2w.float(), cameras.raw_intrinsics.float(), height, width)
        frames = CameraFrames(matrix, inverse, table) if self.takes_rays else None
        return frames, self.plucker_embedder(rays) if self.takes_pluecker else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a new or empty folder; it appears whole or not at all."""
        weights.save_folder(folder, "WorldModel", self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        partial: bool = False,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> WorldModel:
        """Load our own export, a diffusers `SanaWMTransformer3DModel` folder or the original release.

        source: a folder, a .safetensors or .pt file, or a hub id, which needs a revision. partial: load what fits
        and start the rest anew, instead of refusing. settings: constructor arguments that differ from what the
        source says, for example softmax_bf16=False; the released ones stand in `world_model_weights.RELEASED`.
        ValueError or FileNotFoundError name what is missing, unknown, of another shape, damaged or not finite.
        """
        return weights.load(cls, world_model_weights, source, revision, partial, dtype, settings)
