"""SANA-WM's stage-2 refiner: LTX-2's video transformer, run without its audio half (spec 7).

diffusers' `LTX2VideoTransformer3DModel` by composition: its layers and its rotary tables are called, its audio layers
(a third of the weights) are never loaded, and self-attention reads what the refiner's memory allows. A video's first
latent frame is the sink, which reads itself. A chunk reads the sink, whose keys are kept before RoPE and set anew just
in front of the oldest frame still remembered, the latest refined frames, and itself (spec 7, `kv_max_frames`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgr.models import ltx2_weights, weights
from vgr.nn.frozen import dtype_of
from vgr.types import Conditioning

Table = tuple[Tensor, Tensor]  # cosine and sine of rotary angles, tokens next to last


@dataclass(frozen=True)
class BlockMemory:
    """One block's keys and values (B,L,D): the sink's keys before RoPE, those of recent refined frames after it."""

    sink_k: Tensor
    sink_v: Tensor
    k: Tensor
    v: Tensor

    def detached(self) -> BlockMemory:
        # Copies: a slice would keep all the keys of its call alive.
        return BlockMemory(*(x.detach().clone() for x in (self.sink_k, self.sink_v, self.k, self.v)))


@dataclass(frozen=True)
class RefinerState:
    """What the refiner remembers of the chunks committed so far; opaque to callers."""

    blocks: tuple[BlockMemory | None, ...]
    grid: tuple[int, int] | None
    frames: int
    chunk: int
    detach: bool


@dataclass(frozen=True)
class _Chunk:
    """Frames a to b of a call, how many before them they read, and where for them the sink stands (None: no sink)."""

    a: int
    b: int
    history: int
    sink_table: Table | None


class Refiner(nn.Module):
    """Noised stage-1 latents, per-frame sigmas and text to LTX-2's velocity, by the house's calling contract.

    Bidirectional inside a chunk of `cond.layout`, causal between chunks, behind the sink: with one chunk the released
    bidirectional refiner, with several masked chunk-causal, with a state it streams; LTX-2 itself with sink=0.

    in_channels to layers: LTX-2's (not 2.3's) sizes; options: what else of `LTX2VideoTransformer3DModel` is not as in
    LTX-2. Its audio layers are removed. fps: raw frames a second, which the temporal RoPE is told; sink: first frames
    of a video that read themselves alone and that all others read; window: frames of keys and values kept, the sink
    among them (None: all); activation_checkpointing: recompute blocks in the backward; dtype: of the weights.
    """

    takes_cameras, patch = False, 1

    def __init__(
        self,
        in_channels: int = 128,
        text_width: int = 3840,
        heads: int = 32,
        head_dim: int = 128,
        layers: int = 48,
        options: Mapping[str, Any] | None = None,
        fps: float = 16.0,
        sink: int = 1,
        window: int | None = 11,
        activation_checkpointing: bool = False,
        dtype: str = "float32",
    ) -> None:
        from diffusers import LTX2VideoTransformer3DModel

        super().__init__()
        if sink < 0 or (window is not None and window < sink):
            raise ValueError(f"sink={sink}, window={window}: the window holds the sink, so use 0 <= sink <= window")
        sizes = {"in_channels": in_channels, "text_width": text_width, "heads": heads, "head_dim": head_dim}
        self.config: dict[str, Any] = {
            **sizes, "layers": layers, "options": dict(options or {}), "fps": fps, "sink": sink, "window": window,
            "activation_checkpointing": activation_checkpointing, "dtype": dtype,
        }  # fmt: skip
        settings, _ = ltx2_weights.to_diffusers(self.config, {})
        self.transformer = weights.build(LTX2VideoTransformer3DModel, settings, meta=False)
        for module in (self.transformer, *self.transformer.transformer_blocks):
            for name in filter(ltx2_weights.is_audio, [*module._modules, *module._parameters]):
                delattr(module, name)
        self.to(dtype_of("model", dtype))
        self.in_channels, self.text_width = in_channels, text_width
        self.fps, self.sink, self.window, self.activation_checkpointing = fps, sink, window, activation_checkpointing

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.bfloat16, **settings: Any
    ) -> Refiner:
        """The refiner of a local folder (transformer/ inside, or itself one) or a hub id, which needs a revision.

        settings: constructor arguments. ValueError or FileNotFoundError name what is missing or does not fit.
        """
        path = ltx2_weights.find(source, revision, "transformer")
        config, tensors = weights.load_folder(path, ltx2_weights.ADAPTERS)
        model = weights.build(cls, {**config, **settings})
        weights.assign(model, tensors, source, dtype=dtype)
        return model

    def new_state(self, detach: bool = True) -> RefinerState:
        """The state before a video's first chunk; with detach=False gradients flow through what commits store."""
        return RefinerState((None,) * len(self.transformer.transformer_blocks), None, 0, 0, detach)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        state: RefinerState | None = None,
        *,
        commit: bool = False,
    ) -> tuple[Tensor, RefinerState | None]:
        """Velocity (B,C,T,H,W) fp32 for latents x (B,C,T,H,W) at sigmas t (B,T); x - t v is the refined latent.

        With a state the frames follow those committed; commit=True (the pass at t = 0) adds this call's chunks.
        Without one x holds the video from its first frame on. ValueError for shapes and layouts that do not fit.
        """
        position, sizes, last = self._check(x, t, cond, state, commit)
        net, (batch, _, frames, height, width) = self.transformer, x.shape
        before = self.new_state() if state is None else state
        chunks = self._chunks(batch, position[0], sizes, (height, width), x.device)
        table = self._table(batch, position, (height, width), x.device)
        dtype = net.proj_in.weight.dtype
        h = net.proj_in(x.permute(0, 2, 3, 4, 1).flatten(2, 3).to(dtype))  # (B,T,S,D)
        times = (net.config.timestep_scale_multiplier * t.float()).flatten()
        temb, embedded = net.time_embed(times, batch_size=batch, hidden_dtype=h.dtype)
        temb = temb.view(batch, frames, 1, 6, -1)
        text = net.caption_projection(cond.text.states.squeeze(1).to(dtype))
        bias = ((1 - cond.text.mask.to(dtype)) * -10000.0).view(batch, 1, -1)
        memories: list[BlockMemory] = []
        for block, past in zip(net.transformer_blocks, before.blocks):
            args = (block, h, temb, text, bias, table, chunks, past, self.sink, self.window)
            if self.activation_checkpointing and self.training:
                h, memory = checkpoint(_block, *args, use_reentrant=False)
            else:
                h, memory = _block(*args)
            if commit:
                memories.append(memory.detached() if before.detach else memory)
        shift, scale = (net.scale_shift_table + embedded.view(batch, frames, 1, 1, -1)).unbind(3)
        out = net.proj_out(net.norm_out(h) * (1 + scale) + shift).float()
        if commit:
            state = RefinerState(tuple(memories), (height, width), before.frames + frames, last + 1, before.detach)
        return out.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3), state

    def _check(
        self, x: Tensor, t: Tensor, cond: Conditioning, state: RefinerState | None, commit: bool
    ) -> tuple[list[int], list[int], int]:
        """Positions of the frames, sizes of the chunks, and the last chunk's index. Raises ValueError."""
        if x.ndim != 5 or x.shape[1] != self.in_channels or t.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"the refiner takes x (B,{self.in_channels},T,H,W) and t (B,T), got {tuple(x.shape)} and "
                f"{tuple(t.shape)}; stage-1 latents must come from the same VAE"
            )
        if state is not None and state.grid not in (None, tuple(x.shape[3:])):
            raise ValueError(f"the state remembers frames of {state.grid} cells, this call has {tuple(x.shape[3:])}")
        text = cond.text.states
        if text.ndim != 4 or text.shape[:2] != (x.shape[0], 1) or text.shape[3] != self.text_width:
            raise ValueError(
                f"the refiner reads one prompt a video, text states ({x.shape[0]},1,J,{self.text_width}) from "
                f"LTX2Text, got {tuple(text.shape)}"
            )
        position, chunk, role = torch.stack([cond.layout.position, cond.layout.chunk, cond.layout.role]).tolist()
        start = (0, 0) if state is None else (state.frames, state.chunk)
        index = sorted(set(chunk))
        successive = position == list(range(start[0], start[0] + x.shape[2])) and chunk == sorted(chunk)
        if start[0] == 0 and chunk.count(0) < self.sink:
            raise ValueError(f"the first chunk holds the sink of {self.sink} frames, got {chunk.count(0)} in it")
        if any(role) or not successive or index != list(range(start[1], start[1] + len(index))):
            raise ValueError(
                f"{start[0]} frames in {start[1]} chunks came before this call; it must hold the target frames and "
                f"chunks that follow, got positions {position} in chunks {chunk}"
            )
        if commit and state is None:
            raise ValueError("commit=True needs a state: start with state=refiner.new_state()")
        if state is not None and len(index) > 1 and not commit:
            raise ValueError(f"a call with a state holds one whole chunk unless it commits, got chunks {index}")
        return position, [chunk.count(i) for i in index], index[-1]

    def _chunks(
        self, batch: int, start: int, sizes: Sequence[int], grid: tuple[int, int], device: torch.device
    ) -> list[_Chunk]:
        sink = self.sink
        if start == 0:
            sizes = [sink, sizes[0] - sink, *sizes[1:]]
        chunks, a = [], 0
        for size in filter(None, sizes):
            first = start + a  # absolute
            history = first - sink if self.window is None else min(first - sink, self.window - sink)
            place = range(first - history - sink, first - history)
            table = self._table(batch, place, grid, device) if sink and first >= sink else None
            chunks.append(_Chunk(a, a + size, max(history, 0), table))
            a += size
        return chunks

    def _table(self, batch: int, position: Sequence[int], grid: tuple[int, int], device: torch.device) -> Table:
        """Rotary table of whole frames at these latent positions: time in seconds, cells in pixels."""
        rope = self.transformer.rope
        time = rope.prepare_video_coords(1, position[-1] + 1, 1, 1, device, fps=self.fps)[:, :1, list(position)]
        space = rope.prepare_video_coords(1, 1, *grid, device, fps=self.fps)[:, 1:]
        cells = space.shape[2]
        coords = torch.cat([time.repeat_interleave(cells, 2), space.repeat(1, 1, len(position), 1)], dim=1)
        cos, sin = rope(coords, device=device)
        return cos.expand(batch, *cos.shape[1:]), sin.expand(batch, *sin.shape[1:])

    def load_lora(self, file: str | Path) -> None:
        """Add an adapter in PEFT's or diffusers' keys; what belongs to audio is left out. `merge_lora` folds it in.

        ValueError listing keys that do not fit, before anything is changed; an adapter trained on the base model fits
        the distilled one, whose layers are the same. Without metadata alpha is the rank, as diffusers takes it.
        """
        tensors, metadata = ltx2_weights.read_lora(file, self.transformer)
        self.transformer.load_lora_adapter(tensors, prefix=None, metadata=metadata)

    def merge_lora(self) -> None:
        """Fold the adapters into the weights and remove them: the same function without their cost."""
        self.transformer.fuse_lora()
        self.transformer.unload_lora()


def _block(
    block: nn.Module,
    x: Tensor,
    temb: Tensor,
    text: Tensor,
    bias: Tensor,
    table: Table,
    chunks: list[_Chunk],
    past: BlockMemory | None,
    sink: int,
    window: int | None,
) -> tuple[Tensor, BlockMemory]:
    """The video half of LTX-2's block on x (B,T,S,D); temb (B,T,1,6,D) modulates frame by frame."""
    frames = x.shape[1:3]
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (block.scale_shift_table + temb).unbind(3)
    mixed, memory = _attend(block.attn1, block.norm1(x) * (1 + scale_a) + shift_a, table, chunks, past, sink, window)
    x = x + mixed * gate_a
    told = block.attn2(block.norm2(x).flatten(1, 2), encoder_hidden_states=text, attention_mask=bias)
    x = x + told.unflatten(1, frames)
    return x + block.ff(block.norm3(x) * (1 + scale_f) + shift_f) * gate_f, memory


def _attend(
    attn: nn.Module,
    x: Tensor,
    table: Table,
    chunks: list[_Chunk],
    past: BlockMemory | None,
    sink: int,
    window: int | None,
) -> tuple[Tensor, BlockMemory]:
    """Self-attention of x (B,T,S,D), chunk by chunk over sink, recent frames and the chunk itself."""
    frames = x.shape[1:3]
    cells, x = x.shape[2], x.flatten(1, 2)
    q, k_plain, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
    q, k = _rotated(attn, q, table), _rotated(attn, k_plain, table)
    own = 0  # token of this call where frames that are no sink begin
    if past is None:
        own = sink * cells
        past = BlockMemory(k_plain[:, :own], v[:, :own], k[:, :0], v[:, :0])
    known = past.k.shape[1] - own
    all_k, all_v = torch.cat([past.k, k[:, own:]], dim=1), torch.cat([past.v, v[:, own:]], dim=1)
    out = []
    for c in chunks:
        if c.b * cells <= own:
            keys, values = k[:, :own], v[:, :own]
        else:
            a, b = (known + n * cells for n in (c.a - c.history, c.b))
            keys, values = all_k[:, a:b], all_v[:, a:b]
            if c.sink_table is not None:
                keys = torch.cat([_rotated(attn, past.sink_k, c.sink_table), keys], dim=1)
                values = torch.cat([past.sink_v, values], dim=1)
        asked = q[:, c.a * cells : c.b * cells]
        heads = (z.unflatten(2, (attn.heads, -1)).transpose(1, 2) for z in (asked, keys, values))
        out.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
    kept = all_k.shape[1] if window is None else (window - sink) * cells
    first = max(0, all_k.shape[1] - kept)
    memory = replace(past, k=all_k[:, first:], v=all_v[:, first:])
    return attn.to_out[1](attn.to_out[0](torch.cat(out, dim=1))).unflatten(1, frames), memory


def _rotated(attn: nn.Module, x: Tensor, table: Table) -> Tensor:
    from diffusers.models.transformers import transformer_ltx2 as ltx2

    rotate = ltx2.apply_split_rotary_emb if attn.rope_type == "split" else ltx2.apply_interleaved_rotary_emb
    return rotate(x, table)
