"""Triton kernels for the frame-wise gated delta rule: drop-in twins of vgr.nn.gated_delta (spec 3.3 to 3.5).

Summaries are one pass over the tokens, [G | A] from [K | V] in column blocks without a weighted copy of the keys. A
scan is one launch, serial over frames; a program owns one direction and a block of the state's columns. Both have
hand-written backwards. Accumulation and states are fp32 whatever the inputs; `precision` is tl.dot's: "ieee" (default),
"tf32x3" (tensor cores, close to fp32) or "tf32". On CPU they run in Triton's interpreter only (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Blocks, warps and one stage are what keeps fp32 dots of K = E = 112 in the registers of sm_90.
_SUMMARY = {"BN": 64, "BS": 32, "num_warps": 8, "num_stages": 1}
_SUMMARY_GRAD = {"BN": 64, "BS": 64, "BC": 16, "num_warps": 8, "num_stages": 1}
_SCAN = {"BN": 32, "BC": 32, "num_warps": 4, "num_stages": 1}


@triton.jit
def _summarise(
    k: tl.tensor, v: tl.tensor, beta: tl.tensor, decay: tl.tensor, g: tl.tensor, a: tl.tensor,
    heads: int, tokens: int, k_t: int, k_x: int, k_s: int, v_t: int, v_x: int, v_s: int,
    K: tl.constexpr, E: tl.constexpr, HAS_V: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """BN columns of K^T diag(beta) [K | V] for one frame and head; without V a column of ones takes its place."""
    at = tl.program_id(0).to(tl.int64)
    t, x = at // heads, at % heads
    rows = tl.arange(0, BK)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    of_k = cols < K
    total = tl.zeros((BK, BN), tl.float32)
    for start in range(0, tokens, BS):
        s = start + tl.arange(0, BS)
        alive = s < tokens
        base = k + t * k_t + x * k_x
        left = tl.load(base + s[None, :] * k_s + rows[:, None], (rows[:, None] < K) & alive[None, :], 0.0)
        right = tl.load(base + s[:, None] * k_s + cols[None, :], of_k[None, :] & alive[:, None], 0.0).to(tl.float32)
        if HAS_V:
            of_v = (cols >= K) & (cols < K + E)
            base_v = v + t * v_t + x * v_x - K
            right += tl.load(base_v + s[:, None] * v_s + cols[None, :], of_v[None, :] & alive[:, None], 0.0)
        else:
            right += tl.where(cols == K, 1.0, 0.0)[None, :]
        weight = tl.load(beta + at * tokens + s, alive, 0.0)
        total = tl.dot(left.to(tl.float32), right * weight[:, None], total, input_precision=PRECISION)
    gamma = tl.load(decay + at)
    inside = rows[:, None] < K
    step = gamma * (tl.where(rows[:, None] == cols[None, :], 1.0, 0.0) - total)
    tl.store(g + at * K * K + rows[:, None] * K + cols[None, :], step, inside & of_k[None, :])
    ours = inside & (cols >= K)[None, :] & (cols < K + E)[None, :]
    tl.store(a + at * K * E + rows[:, None] * E + cols[None, :] - K, total, ours)


@triton.jit
def _summarise_grad(
    k: tl.tensor, v: tl.tensor, beta: tl.tensor, decay: tl.tensor, to_g: tl.tensor, to_a: tl.tensor,
    to_k: tl.tensor, to_v: tl.tensor, to_beta: tl.tensor,
    heads: int, tokens: int, k_t: int, k_x: int, k_s: int, v_t: int, v_x: int, v_s: int,
    K: tl.constexpr, E: tl.constexpr, HAS_V: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of BS tokens: dv = beta u, dk = beta r, dbeta = (v.u + k.r) / 2 with the rows u = dA^T k and
    r = dA v - gamma (dG + dG^T) k. Keys and products are read again rather than kept: registers are short.
    """
    at = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    alive = s[:, None] < tokens
    k_rows = k + (at // heads) * k_t + (at % heads) * k_x + s[:, None] * k_s
    v_rows = v + (at // heads) * v_t + (at % heads) * v_x + s[:, None] * v_s
    rows = tl.arange(0, BK)
    to_g += at * K * K
    to_a += at * K * E
    weight = tl.load(beta + at * tokens + s, s < tokens, 0.0)
    slope = tl.zeros((BS,), tl.float32)
    if HAS_V:
        for first in range(0, E, BN):
            cols = first + tl.arange(0, BN)
            u = tl.zeros((BS, BN), tl.float32)
            for start in range(0, K, BC):
                c = start + tl.arange(0, BC)
                left = tl.load(k_rows + c[None, :], alive & (c[None, :] < K), 0.0).to(tl.float32)
                right = tl.load(to_a + c[:, None] * E + cols[None, :], (c[:, None] < K) & (cols[None, :] < E), 0.0)
                u = tl.dot(left, right, u, input_precision=PRECISION)
            inside = alive & (cols[None, :] < E)
            slope += tl.sum(u * tl.load(v_rows + cols[None, :], inside, 0.0), 1)
            tl.store(to_v + (at * tokens + s[:, None]) * E + cols[None, :], u * weight[:, None], inside)
    r = tl.zeros((BS, BK), tl.float32)
    for start in range(0, K, BC):
        c = start + tl.arange(0, BC)
        left = tl.load(k_rows + c[None, :], alive & (c[None, :] < K), 0.0).to(tl.float32)
        square = (c[:, None] < K) & (rows[None, :] < K)
        right = tl.load(to_g + c[:, None] * K + rows[None, :], square, 0.0)
        right += tl.load(to_g + c[:, None] + rows[None, :] * K, square, 0.0)
        r = tl.dot(left, right, r, input_precision=PRECISION)
    r *= -tl.load(decay + at)
    if HAS_V:
        for start in range(0, E, BC):
            c = start + tl.arange(0, BC)
            left = tl.load(v_rows + c[None, :], alive & (c[None, :] < E), 0.0).to(tl.float32)
            right = tl.load(to_a + c[:, None] + rows[None, :] * E, (c[:, None] < E) & (rows[None, :] < K), 0.0)
            r = tl.dot(left, right, r, input_precision=PRECISION)
    inside = alive & (rows[None, :] < K)
    keys = tl.load(k_rows + rows[None, :], inside, 0.0).to(tl.float32)
    if not HAS_V:
        u = tl.load(to_a + rows, rows < K, 0.0)[None, :]
        r += u
        slope += tl.sum(u * keys, 1)
    tl.store(to_k + (at * tokens + s[:, None]) * K + rows[None, :], r * weight[:, None], inside)
    tl.store(to_beta + at * tokens + s, 0.5 * (slope + tl.sum(r * keys, 1)), s < tokens)


@triton.jit
def _scan(
    g: tl.tensor, inputs: tl.tensor, first: tl.tensor, keep: tl.tensor, states: tl.tensor, final: tl.tensor,
    frames: int, heads: int,
    K: tl.constexpr, E: tl.constexpr, ADJOINT: tl.constexpr, CHUNKED: tl.constexpr, HAS_FIRST: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One direction of a whole scan for one head and BN state columns; states (2,T,X,K,E) keeps both directions.

    Forward: direction 0 goes up from `first` and stores F_{t-1} at t, direction 1 goes down and stores R_t; both do
    M -> G_t M + A_t. Adjoint: direction 0 goes down and stores dF_t, direction 1 goes up and stores the gradient of
    G_t R_t + A_t; both multiply by G_t^T. Direction 1 is cut between chunks; direction 0 ends in `final`.
    """
    x, direction = tl.program_id(0).to(tl.int64), tl.program_id(2)
    rows = tl.arange(0, BK)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    tile = rows[:, None] * E + cols[None, :]
    inside = (rows[:, None] < K) & (cols[None, :] < E)
    ahead = direction == 0
    up = direction == 1 if ADJOINT else ahead
    state = tl.zeros((BK, BN), tl.float32)
    if HAS_FIRST:
        state = tl.where(ahead, tl.load(first + x * K * E + tile, inside, 0.0), 0.0)
    for i in range(frames):
        t = tl.where(up, i, frames - 1 - i)
        at = t * heads + x
        given = tl.load(inputs + at * K * E + tile, inside, 0.0)
        if ADJOINT:
            state += tl.where(ahead, given, 0.0)
            given = tl.where(ahead, 0.0, given)
        stored = states + (direction * frames * heads + at) * K * E
        tl.store(stored + tile, state, inside)
        # A product with the whole state in registers spills thousands of bytes a thread in fp32, so the state just
        # stored is read back in slices; the barrier makes the other threads' part of it visible.
        tl.debug_barrier()
        state = given
        for start in range(0, K, BC):
            c = start + tl.arange(0, BC)
            square = c[None, :] * K + rows[:, None] if ADJOINT else rows[:, None] * K + c[None, :]
            step = tl.load(g + at * K * K + square, (rows[:, None] < K) & (c[None, :] < K), 0.0)
            part = tl.load(stored + c[:, None] * E + cols[None, :], (c[:, None] < K) & (cols[None, :] < E), 0.0)
            state = tl.dot(step, part, state, input_precision=PRECISION)
        if CHUNKED:
            state = tl.where(ahead | (tl.load(keep + t + (1 if ADJOINT else 0)) != 0), state, 0.0)
    if direction == 0:
        tl.store(final + x * K * E + tile, state, inside)


def _padded(size: int) -> int:
    """The power of two that holds `size` and that tl.dot takes."""
    return max(16, triton.next_power_of_2(size))


class _Summaries(torch.autograd.Function):
    """One launch forward, one backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, k: Tensor, v: Tensor | None, beta: Tensor, decay: Tensor, precision: str
    ) -> tuple[Tensor, Tensor]:
        frames, heads, tokens, width = k.shape
        target = 1 if v is None else v.shape[-1]
        g = beta.new_empty(frames, heads, width, width)
        a = beta.new_empty(frames, heads, width, target)
        v_strides = (0, 0, 0) if v is None else v.stride()[:3]
        _summarise[frames * heads, triton.cdiv(width + target, _SUMMARY["BN"])](
            k, k if v is None else v, beta, decay, g, a, heads, tokens, *k.stride()[:3], *v_strides,
            width, target, v is not None, BK=_padded(width), PRECISION=precision, **_SUMMARY,
        )  # fmt: skip
        ctx.save_for_backward(k, v, beta, decay, g)
        ctx.precision = precision
        return g, a

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, to_g: Tensor, to_a: Tensor) -> tuple[Tensor | None, ...]:
        k, v, beta, decay, g = ctx.saved_tensors
        frames, heads, tokens, width = k.shape
        to_g, to_a = to_g.contiguous(), to_a.contiguous()
        to_k = torch.empty_like(k, memory_format=torch.contiguous_format)
        to_v = None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)
        to_beta = torch.empty_like(beta)
        v_strides = (0, 0, 0) if v is None else v.stride()[:3]
        _summarise_grad[frames * heads, triton.cdiv(tokens, _SUMMARY_GRAD["BS"])](
            k, k if v is None else v, beta, decay, to_g, to_a, to_k, to_k if v is None else to_v, to_beta,
            heads, tokens, *k.stride()[:3], *v_strides, width, to_a.shape[-1], v is not None,
            BK=_padded(width), PRECISION=ctx.precision, **_SUMMARY_GRAD,
        )  # fmt: skip
        # G / gamma is I - P to the last bit but one; a gamma that has underflowed to zero gets no gradient.
        to_decay = (to_g * g).sum((-2, -1)) / decay.clamp_min(torch.finfo(decay.dtype).tiny)
        return to_k, to_v, to_beta, to_decay, None


class _States(torch.autograd.Function):
    """One launch of both directions forward, one backward; dG is two products, which follow torch's fp32 setting."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, g: Tensor, a: Tensor, initial: Tensor | None, keep: Tensor | None, precision: str
    ) -> tuple[Tensor, Tensor]:
        states, last = _run_scan(g, a, initial, keep, precision, adjoint=False)
        ctx.save_for_backward(g, states)
        ctx.has_initial, ctx.keep, ctx.precision = initial is not None, keep, precision
        before, behind = states
        read = torch.empty_like(a)
        torch.add(before[1:], behind[:-1], out=read[:-1])
        torch.add(last, behind[-1], out=read[-1])
        return read, last

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, to_read: Tensor, to_last: Tensor) -> tuple[Tensor | None, ...]:
        g, states = ctx.saved_tensors
        grads, to_initial = _run_scan(
            g, to_read.contiguous(), to_last.contiguous(), ctx.keep, ctx.precision, adjoint=True
        )
        (ahead, behind), (before, after) = grads.flatten(1, 2), states.flatten(1, 2).mT
        to_g = torch.baddbmm(torch.bmm(ahead, before), behind, after).view_as(g)
        return to_g, grads[0] + grads[1], to_initial if ctx.has_initial else None, None, None


def _run_scan(
    g: Tensor, inputs: Tensor, first: Tensor | None, keep: Tensor | None, precision: str, adjoint: bool
) -> tuple[Tensor, Tensor]:
    """States of both directions (2,T,X,K,E) and the last one of direction 0 (X,K,E)."""
    frames, heads, width, target = inputs.shape
    states, final = inputs.new_empty(2, *inputs.shape), inputs.new_empty(inputs.shape[1:])
    launch = {**_SCAN, "BN": min(_SCAN["BN"], _padded(target))}
    _scan[heads, triton.cdiv(target, launch["BN"]), 2](
        g, inputs, inputs if first is None else first, g if keep is None else keep, states, final, frames, heads,
        width, target, adjoint, keep is not None, first is not None,
        BK=_padded(width), PRECISION=precision, **launch,
    )  # fmt: skip
    return states, final


@lru_cache(maxsize=32)
def _within_chunks(chunks: tuple[int, ...], device: torch.device) -> Tensor:
    """1 where frame t continues the chunk of frame t - 1, (T+1,) int32."""
    keep = torch.ones(sum(chunks) + 1, dtype=torch.int32)
    keep[torch.tensor((0, *chunks)).cumsum(0)] = 0
    return keep.to(device)


def _check_device(x: Tensor) -> None:
    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"scan_backend=triton: tensors are on {x.device}, accepted is a CUDA device; use scan_backend=torch, "
            "or set TRITON_INTERPRET=1 to debug the kernels on CPU"
        )


def bidirectional_states(
    g: Tensor,
    a: Tensor,
    chunks: Sequence[int] | None = None,
    initial: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """What every frame reads: states of frames <= t plus of later frames of its chunk (spec 3.4, 3.8).

    G (T,X,K,K), A (T,X,K,E), initial (X,K,E) or None for zero, to read (T,X,K,E) and last (X,K,E), both fp32.
    F_t = G_t F_{t-1} + A_t from F_{-1} = initial; R_t = 0 at the last frame of every chunk (`chunks`: their sizes,
    None: one chunk), else G_{t+1} R_{t+1} + A_{t+1}; read = F + R, last = F_{T-1}. The backward is two scans as well.
    ValueError where chunks do not add up to T or the device is not a GPU.
    """
    if chunks is not None and sum(chunks) != a.shape[0]:
        raise ValueError(f"chunks={tuple(chunks)} add up to {sum(chunks)}, accepted is T={a.shape[0]} frames")
    _check_device(a)
    keep = None if chunks is None or len(chunks) == 1 else _within_chunks(tuple(chunks), a.device)
    first = None if initial is None else initial.float().contiguous()
    return _States.apply(g.float().contiguous(), a.float().contiguous(), first, keep, precision)


def frame_summaries(
    k: Tensor, v: Tensor | None, beta: Tensor, decay: Tensor, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """Per-frame affine maps of the delta rule: G = gamma (I - K^T beta K) and A = K^T beta V (spec 3.3, 3.5).

    k (T,X,S,K); v (T,X,S,E) or None for the normaliser stream, whose target is one (E = 1); beta (T,X,S);
    decay (T,X). Returns G (T,X,K,K), A (T,X,K,E) in fp32. k and v may be fp32, bf16 or fp16 and strided.
    ValueError where the device is not a GPU.
    """
    _check_device(k)
    k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    return _Summaries.apply(k, v, beta.float().contiguous(), decay.float().contiguous(), precision)
