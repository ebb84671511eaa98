"""The world model's dual-branch self-attention (gated delta rule or softmax) and its text cross-attention.

Tokens are (B,T,S,D), frame-major and row-major inside a frame. Both kinds share one output gate and projection,
applied after the camera branch has been added (spec 3.6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgr.nn.camera import limit_rms, transform_groups
from vgr.nn.gated_delta import bidirectional_states, frame_summaries
from vgr.nn.norm import RMSNorm
from vgr.nn.rope import rotate


@dataclass(frozen=True)
class CameraFrames:
    """What the camera branch needs of every token: P and its inverse (B,T,S,4,4), rotary table (T,S,K/4)."""

    matrix: Tensor
    inverse: Tensor
    table: Tensor


def _per_frame(x: Tensor) -> Tensor:
    """(B,T,S,N,K) to (T,B*N,S,K), the layout of the scan."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)


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

    kind: "gdn" or "softmax". cam_renorm: shrink transformed camera features to their former RMS (spec 4.2).
    softmax_bf16: cast q, k, v of softmax blocks to bf16 as the released model does, whatever the precision.
    softmax_scale, cam_softmax_scale: None for 1/sqrt(K), and 1/sqrt(padded K) in the camera branch.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kind: str,
        conv_kernel: int,
        cam_renorm: bool,
        softmax_bf16: bool,
        softmax_scale: float | None,
        cam_softmax_scale: float | None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.kind = heads, width // heads, kind
        self.cam_renorm, self.softmax_bf16 = cam_renorm, softmax_bf16
        self.softmax_scale = softmax_scale or self.head_dim**-0.5
        self.cam_softmax_scale = cam_softmax_scale or padded_head_dim(self.head_dim) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qkv_cam = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = RMSNorm(width, 1e-5), RMSNorm(width, 1e-5)
        self.q_norm_cam, self.k_norm_cam = RMSNorm(width, 1e-5), RMSNorm(width, 1e-5)
        self.output_gate = nn.Linear(width, width)
        self.out_proj_cam = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        if kind == "gdn":
            self.beta_proj = nn.Linear(width, heads)
            self.gate_proj = nn.Linear(width, heads)
            self.A_log = nn.Parameter(torch.zeros(heads))
            self.dt_bias = nn.Parameter(torch.full((heads,), -5.0))
            # Causal taps as released, the last one is the current frame; used symmetrically (spec 3.1).
            self.conv_k = nn.Parameter(torch.zeros(width, 1, conv_kernel))
            self.conv_k_cam = nn.Parameter(torch.zeros(width, 1, conv_kernel))

    def reset_special(self) -> None:
        """The inits that make a new block start as plain linear attention without a camera (spec 3.2, 4.2)."""
        nn.init.zeros_(self.output_gate.weight)
        nn.init.constant_(self.output_gate.bias, 1.27846)  # SiLU of it is 1
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
        if self.kind == "softmax":
            self._look_along_rays()

    @torch.no_grad()
    def _look_along_rays(self) -> None:
        """The camera branch starts as a look-up: a token reads the clean frames where they saw its direction.

        In the geometric half of each head only z is not zero: constant in queries, in keys the input's channel 0,
        in which the model tells clean frames. The logit is the cosine between two rays, whatever the content.
        """
        width = self.qkv_cam.in_features
        for x in (self.qkv_cam.weight[: 2 * width], self.qkv_cam.bias[: 2 * width]):
            x.unflatten(0, (2 * self.heads, self.head_dim))[:, : self.head_dim // 2] = 0.0
        z = torch.arange(width).view(self.heads, self.head_dim)[:, 2 : self.head_dim // 2 : 4].flatten()
        self.qkv_cam.bias[z] = 4.0
        self.qkv_cam.weight[width + z, 0] = 1.0

    def forward(self, x: Tensor, table: Tensor, camera: CameraFrames | None) -> Tensor:
        """x (B,T,S,D), rotary table (T,S,K/2) to (B,T,S,D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        cam = None if camera is None else self.qkv_cam(x).chunk(3, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            branch = self._gated_delta if self.kind == "gdn" else self._softmax
            main, extra = branch(x.float(), (q, k, v), cam, table, camera)
        if extra is not None:
            main = main + self.out_proj_cam(extra)
        gate = F.silu(self.output_gate(x).float())
        return self.proj(main * gate)

    def _heads(self, x: Tensor) -> Tensor:
        return x.float().unflatten(-1, (self.heads, self.head_dim))

    def _temporal(self, k: Tensor, taps: Tensor) -> Tensor:
        """The symmetric depthwise filter over frames: causal plus anti-causal, centre counted once. k (B,T,S,D)."""
        kernel = torch.cat([taps, taps.flip(-1)[..., 1:]], dim=-1).unsqueeze(-1).to(k.dtype)
        reach = taps.shape[-1] - 1
        k = F.conv2d(k.permute(0, 3, 1, 2), kernel, padding=(reach, 0), groups=k.shape[-1])
        return k.permute(0, 2, 3, 1)

    def _to_rays(self, x: Tensor, matrix: Tensor, table: Tensor) -> Tensor:
        """First half of each head by 4x4 groups, second half rotary (spec 4.2); x (B,T,S,N,K)."""
        geometric, rotary = x.chunk(2, dim=-1)  # not slices: the backward of a chunk is one concatenation
        return torch.cat([transform_groups(geometric, matrix), rotate(rotary, table)], dim=-1)

    def _camera_qkv(self, q: Tensor, k: Tensor, v: Tensor, camera: CameraFrames) -> tuple[Tensor, Tensor, Tensor]:
        moved = [
            self._to_rays(x, m, camera.table)
            for x, m in ((q, camera.matrix.mT), (k, camera.inverse), (v, camera.inverse))
        ]
        if self.cam_renorm:
            moved = [limit_rms(new, old) for new, old in zip(moved, (q, k, v))]
        return moved[0], moved[1], moved[2]

    def _gated_delta(
        self,
        x: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        cam: tuple[Tensor, Tensor, Tensor] | None,
        table: Tensor,
        camera: CameraFrames | None,
    ) -> tuple[Tensor, Tensor | None]:
        key_scale = (self.head_dim * x.shape[2]) ** -0.5
        beta = torch.sigmoid(self.beta_proj(x)).unsqueeze(-1)
        rate = F.softplus(self.gate_proj(x.mean(2)) + self.dt_bias)
        decay = torch.exp(-self.A_log.exp() * rate)
        decay = decay.permute(1, 0, 2).flatten(1)
        q, k, v = qkv
        q = self._heads(F.relu(self.q_norm(q)))
        k = self._heads(F.relu(self.k_norm(self._temporal(k, self.conv_k)) * key_scale))
        q_rot, k_rot, v = _per_frame(rotate(q, table)), _per_frame(rotate(k, table)), _per_frame(self._heads(v))
        q, k, beta_main = _per_frame(q), _per_frame(k), _per_frame(beta).squeeze(-1)
        g, a = frame_summaries(k_rot, v, beta_main, decay)
        norm_state = bidirectional_states(*frame_summaries(k, None, beta_main, decay))
        if cam is None or camera is None:
            main = q_rot @ bidirectional_states(g, a) * (q @ norm_state + 1e-8).reciprocal()
            return _per_token(main, self.heads), None
        q_cam, k_cam, v_cam = cam
        q_cam = self._heads(F.relu(self.q_norm_cam(q_cam)))
        k_cam = self._heads(F.relu(self.k_norm_cam(self._temporal(k_cam, self.conv_k_cam)) * key_scale))
        q_ray, k_ray, v_ray = self._camera_qkv(q_cam, k_cam, self._heads(v_cam), camera)
        # Translations may lengthen keys; beta is discounted so that the update stays a contraction.
        new, old = (torch.linalg.vector_norm(x, dim=-1).square().clamp_min(1e-12) for x in (k_ray, k_cam))
        growth = new / old
        beta_cam = beta / growth.mean(2, keepdim=True).clamp_min(1.0).unsqueeze(-1)
        g_cam, a_cam = frame_summaries(
            _per_frame(k_ray), _per_frame(v_ray), _per_frame(beta_cam).squeeze(-1), decay
        )
        # Main and camera states have one shape, so one scan carries both.
        states = bidirectional_states(torch.cat([g, g_cam], dim=1), torch.cat([a, a_cam], dim=1))
        state, state_cam = states.chunk(2, dim=1)
        main = q_rot @ state * (q @ norm_state + 1e-8).reciprocal()
        extra = _per_token(_per_frame(q_ray) @ state_cam, self.heads)
        extra = self._to_rays(self._heads(extra), camera.matrix, camera.table.conj())
        return _per_token(main, self.heads), extra.flatten(3)

    def _softmax(
        self,
        x: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        cam: tuple[Tensor, Tensor, Tensor] | None,
        table: Tensor,
        camera: CameraFrames | None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = qkv
        q = rotate(self._heads(self.q_norm(q)), table)
        k = rotate(self._heads(self.k_norm(k)), table)
        main = self._attend(q, k, self._heads(v), self.softmax_scale)
        if cam is None or camera is None:
            return main.flatten(3), None
        q_cam, k_cam, v_cam = cam
        q_cam, k_cam = self._heads(self.q_norm_cam(q_cam)), self._heads(self.k_norm_cam(k_cam))
        q_ray, k_ray, v_ray = self._camera_qkv(q_cam, k_cam, self._heads(v_cam), camera)
        extra = self._attend(q_ray, k_ray, v_ray, self.cam_softmax_scale)
        return main.flatten(3), self._to_rays(extra, camera.matrix, camera.table.conj()).flatten(3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention over all tokens of the clip; (B,T,S,N,K) in and out."""
        dtype = torch.bfloat16 if self.softmax_bf16 else q.dtype
        frames, tokens = q.shape[1:3]
        q, k, v = (y.flatten(1, 2).transpose(1, 2).to(dtype) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).unflatten(1, (frames, tokens)).float()


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
