"""Frame-wise gated delta rule (SANA-WM section 3.2, equation 3): one recurrent step consumes a whole frame.

With frame keys K_t (S,K), values V_t (S,E), update gates beta_t (S,) and decay gamma_t, the state M (K,E) follows
    M_t = gamma_t (I - K_t^T diag(beta_t) K_t) M_{t-1} + K_t^T diag(beta_t) V_t,   out_t = Q_t M_t.
Since the update is affine in M, all frame summaries are made in parallel and only (K,K) matrices are scanned.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _AffineScan(torch.autograd.Function):
    """M_t = G_t M_{t-1} + A_t for t = 0..T-1, M_{-1} = 0; G (T,X,K,K), A (T,X,K,E). The backward is a scan too."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, g: Tensor, a: Tensor) -> Tensor:
        states = torch.empty_like(a)
        states[0] = a[0]
        for t in range(1, a.shape[0]):
            torch.baddbmm(a[t], g[t], states[t - 1], out=states[t])
        ctx.save_for_backward(g, states)
        return states

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        g, states = ctx.saved_tensors
        grad_a = torch.empty_like(grad, memory_format=torch.contiguous_format)
        grad_a[-1] = grad[-1]
        for t in range(grad.shape[0] - 2, -1, -1):
            torch.baddbmm(grad[t], g[t + 1].mT, grad_a[t + 1], out=grad_a[t])
        grad_g = torch.zeros_like(g)
        if g.shape[0] > 1:
            torch.matmul(grad_a[1:], states[:-1].mT, out=grad_g[1:])
        return grad_g, grad_a


def affine_scan(g: Tensor, a: Tensor) -> Tensor:
    """All states of M_t = G_t M_{t-1} + A_t, M_{-1} = 0: G (T,X,K,K), A (T,X,K,E) to (T,X,K,E)."""
    return _AffineScan.apply(g, a)


def frame_summaries(k: Tensor, v: Tensor | None, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Per-frame affine maps of the delta rule: G = gamma (I - K^T beta K) and A = K^T beta V.

    k (T,X,S,K); v (T,X,S,E) or None for the normaliser stream, whose target is one (E = 1);
    beta (T,X,S); decay (T,X). Returns G (T,X,K,K), A (T,X,K,E).
    """
    weighted = (k * beta.unsqueeze(-1)).mT
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    g = decay[..., None, None] * (eye - weighted @ k)
    a = weighted.sum(-1, keepdim=True) if v is None else weighted @ v
    return g, a


def bidirectional_states(g: Tensor, a: Tensor) -> Tensor:
    """Forward-inclusive plus reverse-exclusive states of every frame (spec 3.4), from one stacked scan.

    Reverse: R_{T-1} = 0, R_t = G_{t+1} R_{t+1} + A_{t+1}. Both directions share gates and summaries.
    """
    frames, width = g.shape[:2]
    both = affine_scan(torch.cat([g, g.flip(0)], dim=1), torch.cat([a, a.flip(0)], dim=1))
    forward, flipped = both[:, :width], both[:, width:]
    if frames == 1:
        return forward
    # flipped[j] has consumed frames T-1 .. T-1-j; frame t may see T-1 .. t+1, which is flipped[T-2-t].
    reverse = flipped[:-1].flip(0)
    return torch.cat([forward[:-1] + reverse, forward[-1:]])


def delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, reverse: bool = False) -> Tensor:
    """The recurrence step by step, as the papers write it; the reference that fast forms are tested against.

    q, k (T,X,S,K), v (T,X,S,E), beta (T,X,S), decay (T,X) to (T,X,S,E). `reverse` reads frame t from frames > t.
    """
    frames = k.shape[0]
    state = torch.zeros(*k.shape[1:2], k.shape[-1], v.shape[-1], dtype=k.dtype, device=k.device)
    outputs = []
    for t in reversed(range(frames)) if reverse else range(frames):
        if reverse:
            outputs.append(q[t] @ state)
        decayed = decay[t][:, None, None] * state
        error = v[t] - k[t] @ decayed
        # The prediction reads the decayed state for all S tokens at once: a block delta rule.
        state = decayed + k[t].mT @ (beta[t].unsqueeze(-1) * error)
        if not reverse:
            outputs.append(q[t] @ state)
    return torch.stack(outputs[::-1] if reverse else outputs)
