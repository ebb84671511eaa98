"""Frame-wise gated delta rule (SANA-WM section 3.2, equation 3): one recurrent step consumes a whole frame.

With frame keys K_t (S,K), values V_t (S,E), update gates beta_t (S,) and decay gamma_t, the state M (K,E) follows
    M_t = gamma_t (I - K_t^T diag(beta_t) K_t) M_{t-1} + K_t^T diag(beta_t) V_t,   out_t = Q_t M_t.
Since the update is affine in M, all frame summaries are made in parallel and only (K,K) matrices are scanned.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _BidirectionalStates(torch.autograd.Function):
    """Forward-inclusive plus reverse-exclusive states of M -> G_t M + A_t; the backward is two scans as well."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, g: Tensor, a: Tensor) -> Tensor:
        ahead, behind = torch.empty_like(a), torch.empty_like(a)
        frames = a.shape[0]
        ahead[0], behind[-1] = a[0], 0.0
        for t in range(1, frames):
            torch.baddbmm(a[t], g[t], ahead[t - 1], out=ahead[t])
            u = frames - t
            torch.baddbmm(a[u], g[u], behind[u], out=behind[u - 1])
        ctx.save_for_backward(g, ahead, behind)
        return ahead + behind

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        g, ahead, behind = ctx.saved_tensors
        grad = grad.contiguous()
        to_ahead, to_behind = torch.empty_like(grad), torch.empty_like(grad)
        frames = grad.shape[0]
        to_ahead[-1], to_behind[0] = grad[-1], grad[0]
        for t in range(1, frames):
            u = frames - 1 - t
            torch.baddbmm(grad[u], g[u + 1].mT, to_ahead[u + 1], out=to_ahead[u])
            torch.baddbmm(grad[t], g[t].mT, to_behind[t - 1], out=to_behind[t])
        grad_g = torch.zeros_like(g)
        if frames > 1:
            torch.matmul(to_ahead[1:], ahead[:-1].mT, out=grad_g[1:])
            grad_g[1:] += to_behind[:-1] @ behind[1:].mT
            to_ahead[1:] += to_behind[:-1]
        return grad_g, to_ahead


def bidirectional_states(g: Tensor, a: Tensor) -> Tensor:
    """What every frame reads: states of frames <= t scanned forward plus of frames > t scanned backward (spec 3.4).

    G (T,X,K,K), A (T,X,K,E) to (T,X,K,E). Forward F_t = G_t F_{t-1} + A_t; reverse R_{T-1} = 0,
    R_t = G_{t+1} R_{t+1} + A_{t+1}. Both directions share gates and summaries.
    """
    return _BidirectionalStates.apply(g, a)


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
