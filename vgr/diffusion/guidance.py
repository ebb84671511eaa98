"""Denoisers over a denoiser: classifier-free guidance, and a known past for every chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vgr.types import Conditioning, Denoiser, TextStates


def guided(denoiser: Denoiser, scale: float, negative: TextStates) -> Denoiser:
    """v = v_negative + scale (v_text - v_negative); the state is the pair of both calls' states.

    `negative` holds the text states of the null or negative prompt, one row per sample. A scale of 1 asks the
    conditional model only. Where the denoiser has `new_state`, so has the guided one.
    """
    if scale == 1.0:
        return denoiser

    def call(
        x: Tensor, t: Tensor, cond: Conditioning, state: Any = None, *, commit: bool = False
    ) -> tuple[Tensor, Any]:
        own, other = (None, None) if state is None else state
        v, own = denoiser(x, t, cond, own, commit=commit)
        away = dataclasses.replace(cond, text=negative, prompt=None)
        v_negative, other = denoiser(x, t, away, other, commit=commit)
        state = None if own is None and other is None else (own, other)
        return v_negative + scale * (v - v_negative), state

    call.takes_history = getattr(denoiser, "takes_history", False)
    if hasattr(denoiser, "new_state"):
        call.new_state = lambda **kwargs: (denoiser.new_state(**kwargs), denoiser.new_state(**kwargs))
    return call


def teacher_forced(denoiser: Denoiser, context: Tensor, context_t: Tensor | None = None) -> Denoiser:
    """Each chunk of x denoised under the frames of `context` (B,C,T,H,W) before it, in one packed call.

    Causal video, spec 3.2: the model sees [context | x] under `cond.packed()`, and x's half of the velocity is
    returned. context_t (B,T): times of the context, clean without. Stateless.
    """

    def call(
        x: Tensor, t: Tensor, cond: Conditioning, state: Any = None, *, commit: bool = False
    ) -> tuple[Tensor, Any]:
        if state is not None or commit:
            raise ValueError("a packed call holds its own past: it neither reads nor commits a state")
        told = torch.zeros_like(t) if context_t is None else context_t.to(t)
        v, _ = denoiser(torch.cat([context.to(x), x], dim=2), torch.cat([told, t], dim=1), cond.packed())
        return v[:, :, x.shape[2] :], None

    return call
