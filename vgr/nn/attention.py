"""The world model's dual-branch self-attention (gated delta rule, linear or softmax) and its text cross-attention.

Tokens are (B,T,S,D), frame-major and row-major inside a frame. All kinds share one output gate and projection,
applied after the camera branch has been added (spec 3.6). A call holds one chunk of frames or several; what stood
before it is read from a memory, so that a clip in one call and the same clip chunk by chunk give equal outputs.
With a shard tokens are this rank's frames, the chunks are the whole call's, and there is no memory (spec 5.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgr.nn.camera import limit_rms, transform_groups
from vgr.nn.gated_delta import frame_states, frame_summaries
from vgr.nn.norm import RMSNorm
from vgr.nn.precision import Linear32, writes_in_place
from vgr.nn.rope import rotate
from vgr.nn.temporal import part, symmetric_filter
from vgr.types import Shard

OPEN_GATE = 1.2784645  # SiLU of it is 1
# What squares of keys are divided by; only K S makes a contraction of a gated delta frame of S tokens (spec 3.3).
KEY_SCALES = {"frame": lambda k, s: k * s, "head": lambda k, s: k, "none": lambda k, s: 1}


@dataclass(frozen=True)
class CameraFrames:
    """What the camera branch needs of every token: P and its inverse (B,T,S,4,4), rotary table (T,S,K/4)."""

    matrix: Tensor
    inverse: Tensor
    table: Tensor


@dataclass(frozen=True)
class Chunks:
    """The chunks of a call, known on the host: index in the video and frames of each, in order."""

    index: tuple[int, ...]
    sizes: tuple[int, ...]

    def frames(self, a: int, b: int) -> Chunks:
        """What the call's frames a (included) to b (excluded) have of them."""
        kept = (i for i, end, n in zip(self.index, accumulate(self.sizes), self.sizes) if end > a and end - n < b)
        return Chunks(tuple(kept), tuple(part(self.sizes, a, b)))


@dataclass(frozen=True)
class DeltaMemory:
    """What a gated delta block keeps of the past, constant in size.

    state, norm, state_cam: (X,K,K), (X,K,1), (X,K,K) after the last frame; tail, tail_cam (B,R,S,D): the last
    frames of keys before their temporal filter. The camera's are None without a camera.
    """

    state: Tensor
    norm: Tensor
    state_cam: Tensor | None
    tail: Tensor | None
    tail_cam: Tensor | None


@dataclass(frozen=True)
class SoftmaxMemory:
    """Keys and values (B,N,L,K) of past chunks that later chunks may still read: main k, v and the camera's k, v."""

    index: tuple[int, ...]
    blocks: tuple[tuple[Tensor, ...], ...]


Memory = DeltaMemory | SoftmaxMemory


def _per_frame(x: Tensor) -> Tensor:
    """(B,T,S,N,K) to (T,B*N,S,K), the layout of the scan."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)


def _per_frame_rotated(x: Tensor, table: Tensor) -> Tensor:
    """`_per_frame` of x rotated; written straight to its place where no gradient asks for the way back."""
    if not writes_in_place():
        return _per_frame(rotate(x, table))
    out = x.new_empty([x.shape[i] for i in (1, 0, 3, 2, 4)])
    rotate(x, table, out.permute(1, 0, 3, 2, 4))
    return out.flatten(1, 2)


def _per_token(x: Tensor, heads: int) -> Tensor:
    """(T,B*N,S,K) back to (B,T,S,N*K)."""
    return x.unflatten(1, (-1, heads)).permute(1, 0, 3, 2, 4).flatten(3)


def padded_head_dim(head_dim: int) -> int:
    """The head size of the released softmax camera branch, whose scale is that of the zero-padded heads (spec 3.7)."""
    if head_dim in (32, 64, 128, 256):
        return head_dim
    return 128 if head_dim < 128 else 256


class DualAttention(nn.Module):
    """Self-attention with a camera branch in ray-local frames (spec 3 and 4.2).

    kind: "gdn", "linear" (cumulative linear attention, the ancestor of gdn without gates and filter) or "softmax".
    cam_renorm: shrink transformed camera features to their former RMS (spec 4.2).
    softmax_bf16: cast q, k, v of softmax blocks to bf16 as the released model does, whatever the precision.
    softmax_scale, cam_softmax_scale: None for 1/sqrt(K), and 1/sqrt(padded K) in the camera branch.
    sink, window: chunks a softmax block reads beside its own: the video's first `sink` and the last `window`
    before it (None: all). cam_filter_isolated: the camera keys' filter sees its own chunk only (spec 12.9).
    scan_backend: "torch", or "triton" on a GPU. key_scale: of KEY_SCALES.
    """

    def __init__(
        self, width: int, heads: int, kind: str, conv_kernel: int = 4, cam_renorm: bool = False,
        softmax_bf16: bool = False, softmax_scale: float | None = None, cam_softmax_scale: float | None = None,
        sink: int = 0, window: int | None = None, cam_filter_isolated: bool = False, scan_backend: str = "torch",
        key_scale: str = "frame",
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.head_dim, self.kind = heads, width // heads, kind
        self.cam_renorm, self.softmax_bf16 = cam_renorm, softmax_bf16
        self.softmax_scale = softmax_scale or self.head_dim**-0.5
        self.cam_softmax_scale = cam_softmax_scale or padded_head_dim(self.head_dim) ** -0.5
        self.sink, self.window, self.cam_filter_isolated = sink, window, cam_filter_isolated
        self.scan_backend, self.key_scale = scan_backend, key_scale
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qkv_cam = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = RMSNorm(width, 1e-5), RMSNorm(width, 1e-5)
        self.q_norm_cam, self.k_norm_cam = RMSNorm(width, 1e-5), RMSNorm(width, 1e-5)
        self.output_gate = nn.Linear(width, width)
        self.out_proj_cam = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        if kind == "gdn":
            self.beta_proj, self.gate_proj = Linear32(width, heads), Linear32(width, heads)
            self.A_log = nn.Parameter(torch.zeros(heads))
            self.dt_bias = nn.Parameter(torch.full((heads,), -5.0))
            # Causal taps as released, the last one is the current frame; used symmetrically (spec 3.1).
            self.conv_k = nn.Parameter(torch.zeros(width, 1, conv_kernel))
            self.conv_k_cam = nn.Parameter(torch.zeros(width, 1, conv_kernel))

    def reset_special(self) -> None:
        """The inits that make a new block start as plain linear attention without a camera (spec 3.2, 4.2)."""
        nn.init.zeros_(self.output_gate.weight)
        nn.init.constant_(self.output_gate.bias, OPEN_GATE)
        nn.init.zeros_(self.out_proj_cam.weight)
        nn.init.zeros_(self.out_proj_cam.bias)
        with torch.no_grad():
            self.qkv_cam.weight.copy_(self.qkv.weight)
        if self.kind == "gdn":
            for linear, bias in ((self.beta_proj, 5.0), (self.gate_proj, 0.0)):
                nn.init.zeros_(linear.weight)
                nn.init.constant_(linear.bias, bias)
            for taps in (self.conv_k, self.conv_k_cam):
                nn.init.zeros_(taps)
                nn.init.ones_(taps[..., -1])

    @torch.no_grad()
    def look_along_rays(self) -> None:
        """A softmax block's camera branch starts as a look-up: a token reads clean frames where they saw its direction.

        In the geometric half of each head only z is not zero: constant in queries, in keys the input's channel 0,
        in which the model tells clean frames. The logit is the cosine between two rays, whatever the content.
        """
        width = self.qkv_cam.in_features
        for x in (self.qkv_cam.weight[: 2 * width], self.qkv_cam.bias[: 2 * width]):
            x.unflatten(0, (2 * self.heads, self.head_dim))[:, : self.head_dim // 2] = 0.0
        z = torch.arange(width).view(self.heads, self.head_dim)[:, 2 : self.head_dim // 2 : 4].flatten()
        self.qkv_cam.bias[z] = 4.0
        self.qkv_cam.weight[width + z, 0] = 1.0

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        camera: CameraFrames | None,
        chunks: Chunks,
        memory: Memory | None = None,
        shard: Shard | None = None,
    ) -> tuple[Tensor, Memory]:
        """x (B,T,S,D), rotary table (T,S,K/2) to (B,T,S,D), and the memory that the next call continues from."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        cam = None if camera is None else self.qkv_cam(x).chunk(3, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            branch = self._softmax if self.kind == "softmax" else self._states
            main, extra, memory = branch(x.float(), (q, k, v), cam, table, camera, chunks, memory, shard)
        if extra is not None:
            main = main + self.out_proj_cam(extra)
        gate = F.silu(self.output_gate(x).float(), inplace=writes_in_place())
        return self.proj(main * gate), memory

    def _heads(self, x: Tensor) -> Tensor:
        return x.float().unflatten(-1, (self.heads, self.head_dim))

    def _to_rays(self, x: Tensor, matrix: Tensor, table: Tensor) -> Tensor:
        """First half of each head by 4x4 groups, second half rotary (spec 4.2); x (B,T,S,N,K)."""
        geometric, rotary = x.chunk(2, dim=-1)  # not slices: the backward of a chunk is one concatenation
        geometric = transform_groups(geometric, matrix)
        if not writes_in_place():
            return torch.cat([geometric, rotate(rotary, table)], dim=-1)
        out = x.new_empty(x.shape)  # each half straight to its place
        out[..., : x.shape[-1] // 2] = geometric
        rotate(rotary, table, out[..., x.shape[-1] // 2 :])
        return out

    def _camera_qkv(self, q: Tensor, k: Tensor, v: Tensor, camera: CameraFrames) -> tuple[Tensor, Tensor, Tensor]:
        pairs = (q, camera.matrix.mT), (k, camera.inverse), (v, camera.inverse)
        moved = [self._to_rays(x, matrix, camera.table) for x, matrix in pairs]
        if self.cam_renorm:
            moved = [limit_rms(new, old) for new, old in zip(moved, (q, k, v))]
        return moved[0], moved[1], moved[2]

    def _keys(
        self,
        k: Tensor,
        norm: RMSNorm,
        taps: str,
        chunks: Chunks,
        tail: Tensor | None,
        shard: Shard | None,
        isolated: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Scaled key features (B,T,S,N,K), and the frames (B,R,S,D) that the filter wants before the next call."""
        last = None
        if self.kind == "gdn":
            taps = getattr(self, taps)
            reach = taps.shape[-1] - 1
            if not isolated:
                past = [k.new_zeros(k.shape[0], reach, *k.shape[2:]) if tail is None else tail.to(k.dtype), k]
                last = k[:, -reach:] if k.shape[1] >= reach else torch.cat(past, dim=1)[:, -reach:]
            k = symmetric_filter(k, taps, chunks.sizes, tail, isolated, shard)
        key_scale = KEY_SCALES[self.key_scale](self.head_dim, k.shape[2]) ** -0.5
        return self._heads(F.relu(norm(k, key_scale), inplace=True)), last

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Update gate (B,T,S,N,1) per token and decay (T,B*N) per frame (spec 3.2)."""
        beta = torch.sigmoid(self.beta_proj(x)).unsqueeze(-1)
        rate = F.softplus(self.gate_proj(x.mean(2)) + self.dt_bias.float())
        decay = torch.exp(-self.A_log.float().exp() * rate)
        return beta, decay.permute(1, 0, 2).flatten(1)

    def _states(
        self,
        x: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        cam: tuple[Tensor, Tensor, Tensor] | None,
        table: Tensor,
        camera: CameraFrames | None,
        chunks: Chunks,
        memory: DeltaMemory | None,
        shard: Shard | None,
    ) -> tuple[Tensor, Tensor | None, DeltaMemory]:
        """The gated delta rule or linear attention: every frame reads a state (spec 3.3, 3.4, 4.2)."""
        beta, decay = self._gates(x) if self.kind == "gdn" else (None, None)
        old = memory or DeltaMemory(*[None] * 5)
        q, k, v = qkv
        q = self._heads(F.relu(self.q_norm(q), inplace=True))
        k, tail = self._keys(k, self.k_norm, "conv_k", chunks, old.tail, shard)
        q_rot, k_rot, v = _per_frame_rotated(q, table), _per_frame_rotated(k, table), _per_frame(self._heads(v))
        q, k = _per_frame(q), _per_frame(k)
        beta_main = None if beta is None else _per_frame(beta).squeeze(-1)
        maps = frame_summaries(k, None, beta_main, decay, self.scan_backend)
        norm_read, norm = frame_states(*maps, chunks.sizes, old.norm, shard, self.scan_backend)
        weight = (q @ norm_read + 1e-8).reciprocal()
        g, a = frame_summaries(k_rot, v, beta_main, decay, self.scan_backend)
        if cam is None or camera is None:
            read, state = frame_states(g, a, chunks.sizes, old.state, shard, self.scan_backend)
            return _per_token(q_rot @ read * weight, self.heads), None, DeltaMemory(state, norm, None, tail, None)
        q_cam, k_cam, v_cam = cam
        q_cam = self._heads(F.relu(self.q_norm_cam(q_cam), inplace=True))
        isolated = self.cam_filter_isolated
        k_cam, tail_cam = self._keys(k_cam, self.k_norm_cam, "conv_k_cam", chunks, old.tail_cam, shard, isolated)
        q_ray, k_ray, v_ray = self._camera_qkv(q_cam, k_cam, self._heads(v_cam), camera)
        if beta is not None:
            # Translations may lengthen keys; beta is discounted so that the update stays a contraction.
            new, was = (torch.linalg.vector_norm(y, dim=-1).square().clamp_min(1e-12) for y in (k_ray, k_cam))
            beta = _per_frame(beta / (new / was).mean(2, keepdim=True).clamp_min(1.0).unsqueeze(-1)).squeeze(-1)
        g_cam, a_cam = frame_summaries(_per_frame(k_ray), _per_frame(v_ray), beta, decay, self.scan_backend)
        # Main and camera states have one shape, so one scan carries both.
        g = None if g is None else torch.cat([g, g_cam], dim=1)
        before = None if old.state is None else torch.cat([old.state, old.state_cam])
        read, last = frame_states(g, torch.cat([a, a_cam], dim=1), chunks.sizes, before, shard, self.scan_backend)
        (read, read_cam), (state, state_cam) = read.chunk(2, dim=1), last.chunk(2)
        extra = _per_token(_per_frame(q_ray) @ read_cam, self.heads)
        extra = self._to_rays(self._heads(extra), camera.matrix, camera.table.conj()).flatten(3)
        memory = DeltaMemory(state, norm, state_cam, tail, tail_cam)
        return _per_token(q_rot @ read * weight, self.heads), extra, memory

    def _softmax(
        self,
        x: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        cam: tuple[Tensor, Tensor, Tensor] | None,
        table: Tensor,
        camera: CameraFrames | None,
        chunks: Chunks,
        memory: SoftmaxMemory | None,
        shard: Shard | None,
    ) -> tuple[Tensor, Tensor | None, SoftmaxMemory]:
        """Softmax attention over the own chunk and the past ones in reach (spec 3.7, 3.8, 6.3)."""
        old = memory or SoftmaxMemory((), ())
        q, k, v = qkv
        q = rotate(self._heads(self.q_norm(q)), table)
        k = rotate(self._heads(self.k_norm(k)), table)
        cells, total = x.shape[2], sum(chunks.sizes)
        k, v = self._stored(k, total, shard), self._stored(self._heads(v), total, shard)
        main = self._attend(q, k, v, self.softmax_scale, chunks, old.index, [b[:2] for b in old.blocks], shard)
        if cam is None or camera is None:
            return main, None, self._remember(old, chunks, (k, v), cells)
        q_cam, k_cam, v_cam = cam
        q_cam, k_cam = self._heads(self.q_norm_cam(q_cam)), self._heads(self.k_norm_cam(k_cam))
        q_ray, k_ray, v_ray = self._camera_qkv(q_cam, k_cam, self._heads(v_cam), camera)
        k_ray, v_ray = self._stored(k_ray, total, shard), self._stored(v_ray, total, shard)
        past = [b[2:] for b in old.blocks]
        extra = self._attend(q_ray, k_ray, v_ray, self.cam_softmax_scale, chunks, old.index, past, shard)
        extra = self._to_rays(self._heads(extra), camera.matrix, camera.table.conj()).flatten(3)
        return main, extra, self._remember(old, chunks, (k, v, k_ray, v_ray), cells)

    def _stored(self, x: Tensor, total: int = 0, shard: Shard | None = None) -> Tensor:
        """(B,T,S,N,K) to (B,N,T*S,K) in the precision attention reads, of all `total` frames of the shard's ranks."""
        x = x.to(torch.bfloat16 if self.softmax_bf16 else x.dtype)
        x = x if shard is None else shard.all_gather(x, 1, total)
        return x.flatten(1, 2).transpose(1, 2)

    def _reads(self, query: int, key: int) -> bool:
        """Whether a chunk reads another, by their indices in the video."""
        return key <= query and (key < self.sink or self.window is None or key >= query - self.window)

    def _remember(
        self, old: SoftmaxMemory, chunks: Chunks, tensors: tuple[Tensor, ...], cells: int
    ) -> SoftmaxMemory:
        """Old and new blocks that the next chunk may read."""
        pieces = zip(*(x.split([n * cells for n in chunks.sizes], dim=2) for x in tensors))
        blocks = [*zip(old.index, old.blocks), *zip(chunks.index, pieces)]
        kept = [(i, b) for i, b in blocks if self._reads(chunks.index[-1] + 1, i)]
        return SoftmaxMemory(tuple(i for i, _ in kept), tuple(b for _, b in kept))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        chunks: Chunks,
        past_index: tuple[int, ...],
        past: Sequence[tuple[Tensor, ...]],
        shard: Shard | None = None,
    ) -> Tensor:
        """q (B,T,S,N,K), k and v (B,N,L,K), past blocks of k, v: (B,T,S,D). One product a chunk, no mask is built."""
        cells = q.shape[2]
        q = self._stored(q)
        if past:
            k, v = (torch.cat([*(b[i] for b in past), x], dim=2) for i, x in enumerate((k, v)))
        index = past_index + chunks.index
        ends = list(accumulate([*(b[0].shape[2] for b in past), *(n * cells for n in chunks.sizes)]))
        starts = [0, *ends[:-1]]
        asking = chunks if shard is None else chunks.frames(*shard.frames(sum(chunks.sizes)))
        parts = []
        for query, own in zip(asking.index, q.split([n * cells for n in asking.sizes], dim=2)):
            read = [i for i, key in enumerate(index) if self._reads(query, key)]
            if read[-1] - read[0] + 1 == len(read):
                keys, values = (x[:, :, starts[read[0]] : ends[read[-1]]] for x in (k, v))
            else:
                keys, values = (torch.cat([x[:, :, starts[i] : ends[i]] for i in read], dim=2) for x in (k, v))
            parts.append(F.scaled_dot_product_attention(own, keys, values, scale=scale))
        out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return out.transpose(1, 2).flatten(2).unflatten(1, (-1, cells)).float()


class CrossAttention(nn.Module):
    """Text cross-attention (spec 2.3): the raw residual stream asks, no pre-norm, no modulation, no gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x (B,T,S,D), text (B,L,D), mask (B,1,1 or T*S,L) bool, true where a token may be read."""
        batch, frames, tokens, width = x.shape
        k, v = self.kv_linear(text).chunk(2, dim=-1)
        q = self.q_norm(self.q_linear(x)).to(v.dtype).flatten(1, 2)
        k = self.k_norm(k).to(v.dtype)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(batch, frames, tokens, width))
