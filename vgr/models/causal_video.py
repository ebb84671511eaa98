"""The causal video model: Wan 2.1's transformer, made causal between chunks of frames (CausalCine, arXiv 2605.12496).

Sections are those of the specification. Tokens are (B,T,S,D), S = H/2 * W/2 patches of a latent frame, one time per
latent frame. One set of weights has four forms: bidirectional (one chunk), chunk-causal, packed teacher forcing
(every frame twice, as context and as target, 3.2), and streaming from a state (3.7 says which equals which).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgr.models import causal_video_weights, weights
from vgr.nn.causal_attention import Call, CausalAttention, PaddedCrossAttention, plan_call, plan_evidence, text_runs
from vgr.nn.embed import patches, pixels, sinusoid
from vgr.nn.memory import CausalVideoState, Frame, Gathered, KeyValues, Made, MemoryPolicy, Told, committed
from vgr.nn.norm import modulated_norm
from vgr.nn.precision import Linear32, in_own_precision
from vgr.types import Conditioning, Layout, Shard

PATCH = 2
# Of a block: tokens, keys and values, what was read, evidence's tokens and modulation, evidence's keys and values.
Through = tuple[Tensor, KeyValues, Gathered | None, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]


class Block(nn.Module):
    """Self-attention, text, feed-forward (spec 2.2); the table modulates per frame, text is not gated."""

    def __init__(self, width: int, heads: int, ffn_width: int, text_length: int, attn: CausalAttention) -> None:
        super().__init__()
        self.attn = attn
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.cross = PaddedCrossAttention(width, heads, text_length)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU("tanh"), nn.Linear(ffn_width, width))
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, runs: list[tuple[int, int, list[int]]], call: Call,
        past: list[KeyValues], gathered: Gathered | None, shard: Shard | None,
        shown: tuple[Tensor, Tensor] | None = None, told: tuple[Tensor, Tensor] | None = None,
    ) -> Through:  # fmt: skip
        """See `CausalAttention`; shown: evidence's tokens (1,1,M,D) and modulation (1,1,6,D), which read no text."""
        m = (modulation + self.table).unsqueeze(3)  # (B,T,6,1,D)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = m.unbind(2)
        n = None if shown is None else (shown[1] + self.table).unsqueeze(3).unbind(2)
        e = None if n is None else modulated_norm(shown[0], n[0], n[1])
        mixed, own, gathered, e, told = self.attn(
            modulated_norm(x, shift_a, scale_a), call, past, gathered, shard, e, told
        )
        if n is not None:
            shown = self._feed(torch.addcmul(shown[0], n[2], e.float()), *n[3:]), shown[1]
        x = torch.addcmul(x, gate_a, mixed.float())
        norm = self.cross_norm
        asked = F.layer_norm(x, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        x = x + self.cross(asked, text, runs)
        return self._feed(x, shift_f, scale_f, gate_f), own, gathered, shown, told

    def _feed(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, gate, self.ffn(modulated_norm(x, shift, scale)).float())


class CausalVideo(nn.Module):
    """Noisy latents, per-frame times and one text a shot to velocity; causal between chunks of `cond.layout`.

    in_channels: latent channels; width, heads, layers, ffn_width: the transformer, width/heads even; text_width: of
    the text encoder's states; text_length: places a text has, those beyond its tokens being zero vectors (2.2);
    window, sink, shot_sink, routed, relative, per_step, route_layer, place: what a chunk remembers, see
    `vgr.nn.memory.MemoryPolicy` (CausalCine: window 3, routed 5); attention_backend: how calls of several chunks, which
    are training's, attend: "torch", chunk by chunk, or "flex", all at once (`vgr.nn.flex`), for training on a GPU;
    activation_checkpointing: recompute blocks in the backward pass. Cameras in cond are not read: the model has none.
    Evidence in cond.history is read by the chunk whose frames it shows, at clean time and their positions (spec
    warp-adapter 8.3), where a call is packed, has a state or one chunk. What is committed, and which frames are chosen,
    does not depend on it.
    """

    takes_cameras, takes_history, patch = False, True, PATCH
    shards_frames = False  # ranks of a shard hold heads

    def __init__(
        self,
        in_channels: int = 16,
        width: int = 1536,
        heads: int = 12,
        layers: int = 30,
        ffn_width: int = 8960,
        text_width: int = 4096,
        text_length: int = 512,
        window: int | None = None,
        sink: int = 0,
        shot_sink: int = 0,
        routed: int = 0,
        relative: bool = True,
        per_step: bool = False,
        route_layer: int | None = None,
        place: str = "device",
        attention_backend: str = "torch",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            k: v for k, v in locals().items() if k not in ("self", "__class__", "activation_checkpointing")
        }
        if width % heads or (width // heads) % 2:
            raise ValueError(f"model.width / model.heads must be an even number, got {width} / {heads}")
        if attention_backend not in ("torch", "flex"):
            raise ValueError(f"model.attention_backend={attention_backend}: choose torch or flex")
        self.attention_backend = attention_backend
        self.policy = MemoryPolicy(window, sink, shot_sink, routed, relative, per_step, route_layer, place)
        self.in_channels, self.heads, self.head_dim, self.text_length = in_channels, heads, width // heads, text_length
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = nn.Linear(in_channels * PATCH**2, width)
        self.text_proj = nn.Sequential(nn.Linear(text_width, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.time_embed = nn.Sequential(Linear32(256, width), nn.SiLU(), Linear32(width, width))
        self.time_proj = Linear32(width, 6 * width)
        attentions = (CausalAttention(width, heads, self.policy, layer) for layer in range(layers))
        self.blocks = nn.ModuleList(Block(width, heads, ffn_width, text_length, a) for a in attentions)
        self.final_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final = nn.Linear(width, in_channels * PATCH**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linear layers, small normal ones for text and time; the output starts at zero (spec 2.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (*self.text_proj, *self.time_embed):
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.final.weight)

    def new_state(self, detach: bool = True) -> CausalVideoState:
        """The state before a video's first chunk; with detach=False gradients flow through what commits store."""
        return CausalVideoState((), 0, 0, detach)

    def memory_plan(
        self, frames: int, grid: tuple[int, int], chunk: int, bytes_per_number: int = 2, ranks: int = 1
    ) -> dict[str, float]:
        """GB a rollout of latent frames on a grid of cells holds on the fullest rank, weights and activations apart.

        read: keys and values that the chunk at work attends to, rotated and together (of one layer at a time where all
        history is recomputed); history: what is kept of committed frames; host: the part of it in host memory; means:
        what routing scores (spec 4.4). Where the place is "recomputed": again, GB while old commits run again, their
        tokens and one layer's keys and values; again_chunks and again_pflop, how many run again, and their arithmetic,
        for one reading at the end of the video. A chunk reads once, under full history or per_step in every call.
        ValueError for more ranks than heads.
        """
        cells = self._cells(grid[0] * grid[1], ranks)
        policy, layers, width = self.policy, len(self.blocks), -(-self.heads // ranks) * self.head_dim
        layer = 2 * cells * width * bytes_per_number / 1e9
        full = policy.window is None
        near = frames if full else min(frames, policy.window * chunk + (policy.window > 0))
        sinks = sum(1 + -(-n // chunk) * chunk for n in (policy.sink, policy.shot_sink) if n)  # whole chunks are kept
        reach = min(frames, near + sinks + policy.routed + chunk)
        kept, inside = frames if full or policy.routed else min(frames, near + sinks), 0 if full else near
        plan = {"read": reach * layer * layers, "history": kept * layer * layers, "host": 0.0}
        plan["means"] = frames * width * 4 * layers / 1e9 if policy.routed else 0.0
        if policy.place == "pinned":
            plan["host"] = (kept - inside) * layer * layers
        if policy.place == "recomputed" and kept > inside:
            away = (frames if policy.shot_sink else kept) - inside
            plan["means"] *= inside / frames
            plan["history"] = inside * layer * layers + away * cells * PATCH**2 * self.in_channels * 4e-9
            plan["read"] /= layers if full else 1
            plan["again"] = away * (layer + cells * width * 4e-9)
            weights = sum(p.numel() for name, p in self.blocks.named_parameters() if ".cross.kv." not in name) / ranks
            attended = cells * (frames / 2 if full else reach)
            flop = 2 * chunk * cells * (weights + 2 * attended * width * layers)
            plan |= {"again_chunks": away / chunk, "again_pflop": away / chunk * flop / 1e15}
        return plan

    def lean(self, state: CausalVideoState) -> CausalVideoState:
        """The state without what a call reads again from its blocks and choices."""
        return dataclasses.replace(state, gathered=None, told=None)

    @in_own_precision
    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, state: CausalVideoState | None = None, *,
        commit: bool = False, shard: Shard | None = None,
    ) -> tuple[Tensor, CausalVideoState | None]:  # fmt: skip
        """Velocity (B,C,T,H,W) for latents x (B,C,T,H,W) at times t (B,T) in [0, 1].

        With a state the frames follow those committed; commit=True, the clean pass, adds them to what is returned,
        without it the state has this chunk's choices. Without one: one chunk, several, or a packed layout.
        With a shard every rank gives and gets the whole call; inside, each computes its share of the cells and, in
        attention, of the heads, and its state holds those heads (Ulysses, spec 4.4).
        """
        grid = x.shape[3] // PATCH, x.shape[4] // PATCH
        frames = self._check(x, t, cond, state, commit)
        own = None if shard is None else slice(*shard.frames(self._cells(grid[0] * grid[1], shard.size)))
        call = self._call(frames, cond.layout, grid, state, commit, x.device)
        tokens, t_emb, modulation = self._tokens(x, t, own)
        args = (modulation, self._text(cond), text_runs(frames))
        reuse = state is not None and state.gathered is not None and (commit or not self._rechoose)
        again = [] if state is None or (reuse and len(call.queries) == 1) else self._again(state, grid, own)
        # A graph's tensors serve one call, and all of a history made again is what was not to be kept.
        keep = state is not None and state.detach and not (commit or self.policy.makes_all_again)
        read, given, told = state.gathered if reuse else None, None, None
        if cond.history and not commit:
            call, given, told = self._evidence(x, cond, frames, call, state, shard)
        if given is not None and any(q.choices is not None and (0, q.chunk) not in call.choices for q in call.queries):
            # Chosen as without evidence, on which nothing that is committed may depend.
            with torch.no_grad():
                without = (*args, dataclasses.replace(call, shown=None))
                read, again = self._layers(tokens, without, state, None, again, shard, keep=keep)[2], []
        tokens, kept, gathered, layers = self._layers(
            tokens, (*args, call), state, read, again, shard, given, told, keep=keep, commit=commit
        )
        shift, scale = (t_emb.unsqueeze(2) + self.final_table).unsqueeze(3).unbind(2)
        out = self.final(modulated_norm(tokens, shift, scale)).float()
        out = pixels(out if shard is None else shard.all_gather(out, 2, grid[0] * grid[1]), grid, PATCH)
        if state is None:
            return out, None
        if commit:
            made = Made(x, t, cond, call.choices)
            return out, committed(state, self.policy, [f for f, _ in frames], kept, made)
        last = Told(cond.history, call.shown, layers) if layers else state.told
        return out, dataclasses.replace(state, choices=dict(call.choices), gathered=gathered or None, told=last)

    def _layers(
        self, tokens: Tensor, args: tuple[Any, ...], state: CausalVideoState | None, read: tuple[Gathered, ...] | None,
        again: list[tuple[Tensor, tuple[Any, ...]]], shard: Shard | None, shown: tuple[Tensor, Tensor] | None = None,
        told: tuple[tuple[Tensor, Tensor], ...] | None = None, *, keep: bool, commit: bool = False,
    ) -> tuple[Tensor, list[KeyValues], tuple[Gathered, ...] | None, tuple[tuple[Tensor, Tensor], ...]]:  # fmt: skip
        """Tokens after all blocks; by layer, keys and values to commit, what to keep of what was read and shown."""
        kept, gathered, layers = [], [], []
        new = shown is not None and state is not None and not (torch.is_grad_enabled() or self._rechoose)
        for i, block in enumerate(self.blocks):
            past = [] if state is None else self._past(state, i, again, shard)
            given = (tokens, *args, past, read and read[i], shard, shown, told and told[i])
            if self.activation_checkpointing and self.training:
                tokens, kv, own, shown, said = checkpoint(block, *given, use_reentrant=False)
            else:
                tokens, kv, own, shown, said = block(*given)
            for wanted, held, value in ((commit, kept, kv), (keep, gathered, own), (new, layers, said)):
                if wanted:
                    held.append(value)
            del past, given, kv, own, said, value
        return tokens, kept, tuple(gathered) or None, tuple(layers)

    def _evidence(
        self, x: Tensor, cond: Conditioning, frames: list[tuple[Frame, int]], call: Call,
        state: CausalVideoState | None, shard: Shard | None,
    ) -> tuple[Call, tuple[Tensor, Tensor] | None, tuple[tuple[Tensor, Tensor], ...] | None]:  # fmt: skip
        """The call with its evidence's places; tokens and modulation, or else what an earlier step has made of them."""
        if shard is not None or call.mask is not None:
            setting = "model.attention_backend=torch" if shard is None else "one context rank"
            raise ValueError(f"evidence (cond.history) is of single tokens, not whole frames: use {setting} with it")
        before = None if state is None or torch.is_grad_enabled() or self._rechoose else state.told
        if before is not None and list(map(id, before.history)) == list(map(id, cond.history)):
            return dataclasses.replace(call, shown=before.shown), None, before.layers
        planned = plan_evidence(cond.history, frames, call, self.policy, x.shape, PATCH)
        if planned is None:
            return call, None, None
        tokens = self.patch_embed(planned[1])[None, None].float()
        return dataclasses.replace(call, shown=planned[0]), (tokens, self._times(x.new_zeros(1, 1))[1]), None

    def _tokens(self, x: Tensor, t: Tensor, own: slice | None) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's tokens (B,T,S,D) and, per frame, the time embedding (B,T,D) and the modulation (B,T,6,D)."""
        cells = patches(x.float(), PATCH)
        tokens = self.patch_embed(cells if own is None else cells[:, :, own]).float()
        return tokens, *self._times(t)

    def _times(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t_emb = self.time_embed(sinusoid(1000.0 * t.float()))
        return t_emb, self.time_proj(F.silu(t_emb)).unflatten(-1, (6, -1))

    @torch.no_grad()
    def _again(
        self, state: CausalVideoState, grid: tuple[int, int], own: slice | None
    ) -> list[tuple[Tensor, tuple[Any, ...]]]:
        """Tokens and blocks' arguments of the chunks, the oldest, whose keys and values are not kept."""
        found, texts, table = [], {}, None
        for n, made in enumerate(block.made for block in state.blocks if not block.layers):
            before = dataclasses.replace(state, blocks=state.blocks[:n], choices=made.choices)
            frames = [(f, 0) for f in state.blocks[n].frames]
            call = self._call(frames, made.cond.layout, grid, before, True, made.x.device)
            if not self.policy.rotates_once:  # positions 0, 1, ... of all chunks: one table serves
                table = call.table if table is None or len(call.table) > len(table) else table
                call = dataclasses.replace(call, table=table)
            tokens, _, modulation = self._tokens(made.x, made.t, own)
            if id(made.cond.text) not in texts:  # chunks of a shot share theirs
                texts[id(made.cond.text)] = self._text(made.cond)
            found.append((tokens, (modulation, texts[id(made.cond.text)], text_runs(frames), call)))
        return found

    @torch.no_grad()
    def _past(
        self, state: CausalVideoState, layer: int, again: list[tuple[Tensor, tuple[Any, ...]]], shard: Shard | None
    ) -> list[KeyValues]:
        """Keys and values of the memory for a layer; those of chunks in `again`, which go on to the next, made anew."""
        past: list[KeyValues] = []
        for n, (tokens, args) in enumerate(again):
            tokens, kv, *_ = self.blocks[layer](tokens, *args, past, None, shard)
            again[n] = tokens, args
            past.append(kv)
        return past + [block.layers[layer] for block in state.blocks if block.layers]

    def _cells(self, cells: int, ranks: int) -> int:
        """Cells of a frame. ValueError for more ranks than heads or cells."""
        if ranks > (most := min(self.heads, cells)):
            raise ValueError(
                f"{self.heads} heads and {cells} cells a frame cannot be split over {ranks} context ranks, "
                f"{most} at most"
            )
        return cells

    @property
    def _rechoose(self) -> bool:
        return self.policy.per_step and self.policy.routed > 0

    def _check(
        self, x: Tensor, t: Tensor, cond: Conditioning, state: CausalVideoState | None, commit: bool
    ) -> list[tuple[Frame, int]]:
        """The call's frames and roles on the host (the one synchronisation of a call). Raises ValueError."""
        if x.shape[1] != self.in_channels or t.shape != (x.shape[0], x.shape[2]) or x.shape[3] % 2 or x.shape[4] % 2:
            raise ValueError(
                f"the causal video model takes x (B,{self.in_channels},T,H,W), H and W even, and t (B,T), "
                f"got {tuple(x.shape)} and {tuple(t.shape)}"
            )
        layout = cond.layout
        prompt = layout.shot if cond.prompt is None else cond.prompt
        numbers = torch.cat([torch.stack([layout.position, layout.chunk, layout.role]), layout.shot, prompt]).tolist()
        (position, chunk, role), shots, prompts = numbers[:3], numbers[3 : 3 + len(prompt)], numbers[-len(prompt) :]
        if len(position) != x.shape[2]:
            raise ValueError(f"cond.layout must hold the {x.shape[2]} latent frames of x, got {len(position)}")
        frames = [(Frame(*f), r) for r, *f in zip(role, position, chunk, zip(*shots), zip(*prompts))]
        most = cond.text.mask.shape[1]
        if 1 < most <= max(map(max, prompts)):  # one text serves every shot
            raise ValueError(
                f"cond.layout names shot {max(map(max, prompts))} (from 0), but cond.text has {most}: give one text "
                "for all shots, or one a shot"
            )
        if cond.text.states.shape[2] > self.text_length:
            raise ValueError(f"texts have {self.text_length} places, got {cond.text.states.shape[2]}: cut them")
        for wanted in sorted(set(role)):
            own = [f for f, r in frames if r == wanted]
            steps = [f.position for f in own]
            if steps != list(range(steps[0], steps[0] + len(steps))) or [f.chunk for f in own] != sorted(
                f.chunk for f in own
            ):
                raise ValueError("frames of one role must be successive, in chunks of non-decreasing index")
        if 1 in role and state is not None:
            raise ValueError("a packed call holds its own context: it takes no state")
        if commit and state is None:
            raise ValueError("commit=True needs a state: start with state=model.new_state()")
        if state is not None and (position[0] != state.frames or chunk[0] != state.chunk):
            raise ValueError(
                f"the state has committed {state.frames} frames in {state.chunk} chunks; "
                f"this call starts at frame {position[0]}, chunk {chunk[0]}"
            )
        if state is not None and not commit and chunk[0] != chunk[-1]:
            raise ValueError(f"a call with a state holds one whole chunk unless it commits, got {chunk[0]}-{chunk[-1]}")
        return frames

    def _call(
        self, frames: list[tuple[Frame, int]], layout: Layout, grid: tuple[int, int], state: CausalVideoState | None,
        commit: bool, device: torch.device,
    ) -> Call:  # fmt: skip
        again = state is None or state.choices is None or (self._rechoose and not commit)
        past = [] if state is None else [f for b in state.blocks for f in b.frames]
        choices = {} if again else dict(state.choices)
        fused = self.attention_backend == "flex" and state is None
        return plan_call(frames, past, self.policy, layout, grid, self.head_dim, choices, device, fused)

    def _text(self, cond: Conditioning) -> Tensor:
        """Projected texts (B,S,J+1,D), the last one being what a padded place is projected to."""
        states = cond.text.states * cond.text.mask.unsqueeze(-1)
        return self.text_proj(F.pad(states, (0, 0, 0, 1)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a new or empty folder; it appears whole or not at all."""
        weights.save_folder(folder, "CausalVideo", self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        partial: bool = False,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> CausalVideo:
        """Load our own export, a diffusers `WanTransformer3DModel` folder or Wan 2.1's original files.

        source: a folder, a .safetensors or .pt file, or a hub id, which needs a revision. partial: load what fits
        and start the rest anew, instead of refusing. settings: constructor arguments that differ from what the
        source says, for example window=3, routed=5.
        ValueError or FileNotFoundError name what is missing, unknown, of another shape, damaged or not finite.
        """
        return weights.load(cls, causal_video_weights, source, revision, partial, dtype, settings)
