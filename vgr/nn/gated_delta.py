"""Frame-wise gated delta rule (SANA-WM section 3.2, equation 3): one recurrent step consumes a whole frame.

With frame keys K_t (S,K), values V_t (S,E), update gates beta_t (S,) and decay gamma_t, the state M (K,E) follows
    M_t = gamma_t (I - K_t^T diag(beta_t) K_t) M_{t-1} + K_t^T diag(beta_t) V_t,   out_t = Q_t M_t.
Since the update is affine in M, all frame summaries are made in parallel and only (K,K) matrices are scanned.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vgr.nn.precision import writes_in_place
from vgr.nn.temporal import part
from vgr.types import Shard


class _FrameStates(torch.autograd.Function):
    """Forward-inclusive plus reverse-exclusive states of M -> G_t M + A_t; the backward is two scans as well."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        g: Tensor,
        a: Tensor,
        ends: frozenset[int],
        initial: Tensor | None,
        following: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        # Lists of steps, not writes into a whole: the compiler would copy the whole at every step.
        ahead = [a[0] if initial is None else torch.baddbmm(a[0], g[0], initial)]
        behind = [torch.zeros_like(a[0]) if following is None or len(a) - 1 in ends else following]
        for t in range(1, len(a)):
            u = len(a) - t
            ahead.append(torch.baddbmm(a[t], g[t], ahead[-1]))
            behind.append(torch.zeros_like(a[u]) if u - 1 in ends else torch.baddbmm(a[u], g[u], behind[-1]))
        last, ahead, behind = ahead[-1], torch.stack(ahead), torch.stack(behind[::-1])
        ctx.save_for_backward(g, ahead, behind, initial)
        ctx.ends, ctx.followed = ends, following is not None
        return ahead + behind, last.clone() if len(a) == 1 else last

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, grad_last: Tensor
    ) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None]:
        g, ahead, behind, initial = ctx.saved_tensors
        frames = len(grad)
        # A chunk's last frame reads nothing from behind, so no gradient passes it.
        to_ahead, to_behind = [grad[-1] + grad_last], [torch.zeros_like(grad[0]) if 0 in ctx.ends else grad[0]]
        for t in range(1, frames):
            u = frames - 1 - t
            to_ahead.append(torch.baddbmm(grad[u], g[u + 1].mT, to_ahead[-1]))
            passed = t not in ctx.ends
            to_behind.append(torch.baddbmm(grad[t], g[t].mT, to_behind[-1]) if passed else torch.zeros_like(grad[t]))
        to_ahead, to_behind = torch.stack(to_ahead[::-1]), torch.stack(to_behind)
        grad_g = torch.zeros_like(g)
        grad_initial = None
        if initial is not None:
            torch.matmul(to_ahead[0], initial.mT, out=grad_g[0])
            grad_initial = g[0].mT @ to_ahead[0]
        if frames > 1:
            torch.matmul(to_ahead[1:], ahead[:-1].mT, out=grad_g[1:])
            grad_g[1:] += to_behind[:-1] @ behind[1:].mT
            to_ahead[1:] += to_behind[:-1]
        return grad_g, to_ahead, None, grad_initial, to_behind[-1] if ctx.followed else None


def _states_at_once(
    g: Tensor, a: Tensor, ends: frozenset[int], initial: Tensor | None, following: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_FrameStates` where nothing is kept for a backward pass: written in place, the same numbers."""
    read = a.clone()
    if initial is not None:
        read[0].baddbmm_(g[0], initial)
    for t in range(1, len(a)):
        read[t].baddbmm_(g[t], read[t - 1])
    last, behind = read[-1].clone(), None if len(a) - 1 in ends else following
    for u in range(len(a) - 1, -1, -1):
        if behind is not None:
            read[u] += behind
        if u:
            behind = None if u - 1 in ends else a[u] if behind is None else torch.baddbmm(a[u], g[u], behind)
    return read, last


def _composed(g: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
    """All maps after one another as one: C = G_{T-1} ... G_0 (X,K,K) and H (X,K,E), neighbours joined pair by pair."""
    if g is None:
        return torch.eye(a.shape[2], dtype=a.dtype, device=a.device).expand(a.shape[1], -1, -1), a.sum(0)
    while len(a) > 1:
        even = len(a) // 2 * 2
        later = g[1:even:2]
        pairs = later @ g[:even:2], later @ a[:even:2] + a[1:even:2]
        g, a = torch.cat([pairs[0], g[even:]]), torch.cat([pairs[1], a[even:]])
    return g[0], a[0]


def _from_other_ranks(g: Tensor | None, a: Tensor, first: int, passes: bool, shard: Shard) -> tuple[Tensor, Tensor]:
    """Forward state before this rank's frames, reverse state behind them, each (X,K,E) (spec 5.4).

    first: frames of the first chunk here, all that the rank before may read; passes: whether that chunk fills this
    rank and goes on, so that reverse states pass through.
    """
    head = None if g is None else g[:first].flip(0)
    c, h = _composed(head, a[:first].flip(0))
    return shard.prefix(*_composed(g, a)), shard.prefix(c if passes else torch.zeros_like(c), h, reverse=True)


def frame_states(
    g: Tensor | None,
    a: Tensor,
    chunks: Sequence[int] | None = None,
    initial: Tensor | None = None,
    shard: Shard | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """What every frame reads, F_t + R_t, and the state F_{T-1} that the frames after it start from (spec 3.4, 3.8).

    g (T,X,K,K), a (T,X,K,E) to reads (T,X,K,E) and the last state (X,K,E). Forward F_t = G_t F_{t-1} + A_t from
    F_{-1} = initial (X,K,E), zero when not given; reverse R_t = G_{t+1} R_{t+1} + A_{t+1}, zero at the last frame of
    every chunk. chunks: sizes that sum to T, None for one chunk. Both directions share gates and summaries.
    Without g (cumulative linear attention, G = 1) a frame reads the sum up to its chunk's end.
    With a shard g and a are this rank's frames of the call that chunks describe, without initial, and so is the result.
    backend "triton" (CUDA): one kernel launch for both scans; a shard and linear attention take the torch form.
    """
    sizes = [a.shape[0]] if chunks is None else list(chunks)
    following, goes_on = None, False
    if shard is not None:
        start, end = shard.frames(sum(sizes))
        goes_on = end not in accumulate(sizes)
        sizes = part(sizes, start, end)
        initial, following = _from_other_ranks(g, a, sizes[0], goes_on and len(sizes) == 1, shard)
    ends = [end - 1 for end in accumulate(sizes)]
    if g is not None and backend == "triton" and shard is None:
        from vgr.nn import gated_delta_triton

        return gated_delta_triton.bidirectional_states(g, a, sizes, initial)
    if g is not None and writes_in_place():
        return _states_at_once(g, a, frozenset(ends[:-1] if goes_on else ends), initial, following)
    if g is not None:
        return _FrameStates.apply(g, a, frozenset(ends[:-1] if goes_on else ends), initial, following)
    ahead = a.cumsum(0) if initial is None else a.cumsum(0) + initial
    own_end = torch.tensor([end for end, n in zip(ends, sizes) for _ in range(n)], device=a.device)
    read = ahead[own_end]
    if following is not None:
        unfinished = torch.arange(len(a), device=a.device) >= len(a) - (sizes[-1] if goes_on else 0)
        read = read + unfinished.view(-1, 1, 1, 1) * following
    return read, ahead[-1]


def frame_summaries(
    k: Tensor, v: Tensor | None, beta: Tensor | None, decay: Tensor | None, backend: str = "torch"
) -> tuple[Tensor | None, Tensor]:
    """Per-frame affine maps of the delta rule: G = gamma (I - K^T beta K) and A = K^T beta V.

    k (T,X,S,K); v (T,X,S,E) or None for the normaliser stream, whose target is one (E = 1); beta (T,X,S), decay
    (T,X). Returns G (T,X,K,K), A (T,X,K,E). Without gates: linear attention, no G and A = K^T V.
    """
    if backend == "triton" and beta is not None and decay is not None:
        from vgr.nn import gated_delta_triton

        return gated_delta_triton.frame_summaries(k, v, beta, decay)
    weighted = (k if beta is None else k * beta.unsqueeze(-1)).mT
    a = weighted.sum(-1, keepdim=True) if v is None else weighted @ v
    if decay is None:
        return None, a
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return decay[..., None, None] * (eye - weighted @ k), a


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
