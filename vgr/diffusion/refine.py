"""Refining stage-1 latents in a few steps from their noised selves, whole or as they come (SANA-WM 3.4, spec 7).

The first latent frame is the sink: it stays as it is, at sigma 0. Of the decoded video the caller drops the first
frame. The noise of a latent frame is a function of (seed, position) alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vgr.diffusion import flow, rollout, samplers
from vgr.types import Conditioning, Denoiser, Layout, TextStates

SIGMAS = (0.909375, 0.725, 0.421875, 0.0)


def refine(
    denoiser: Denoiser, latents: Tensor, text: TextStates, seed: int = 42, sigmas: Sequence[float] = SIGMAS
) -> Tensor:
    """Refined latents (B,C,T,H,W) of a whole video's: Euler steps down `sigmas`, each over all frames."""
    cond = Conditioning(Layout.whole(len(latents), latents.shape[2], latents.device), text)
    start = _noised(latents, seed, sigmas[0], cond.layout.position, 0)
    return samplers.euler(denoiser, start, cond, torch.tensor(sigmas, dtype=torch.float64), latents[:, :, :1])


def refine_stream(
    denoiser: Any, pieces: Iterable[Tensor], text: TextStates, seed: int = 42, sigmas: Sequence[float] = SIGMAS
) -> Iterator[Tensor]:
    """Of each piece of stage-1 latents (B,C,T,H,W) its refined ones, before the next piece is asked for.

    denoiser: with `new_state()`; pieces: a video's successive frames, 4, 3, 3, ... in the release: the sink and blocks
    of three. A piece is Euler steps down `sigmas` and a pass at sigma 0 that commits it.
    """
    state, grid = denoiser.new_state(), torch.tensor(sigmas, dtype=torch.float64)
    frames = 0
    for chunk, piece in enumerate(pieces):
        layout = Layout.whole(len(piece), piece.shape[2], piece.device)
        layout = dataclasses.replace(layout, position=layout.position + frames, chunk=layout.chunk + chunk)
        start, sink = partial(_noised, piece, seed, sigmas[0]), piece[:, :, :1] if chunk == 0 else None
        latents, state = next(rollout.stream(denoiser, state, Conditioning(layout, text), grid, start, sink))
        frames += piece.shape[2]
        yield latents


def _noised(latents: Tensor, seed: int, sigma: float, position: Tensor, _step: int) -> Tensor:
    """Stage-1 latents (B,C,T,H,W) of frames at `position`, taken to sigma with noise that all rows share."""
    batch, channels, frames, height, width = latents.shape
    noise = samplers.frame_noise([seed], (channels, height, width), latents.device)(position, 0)
    return flow.interpolate(latents, noise.to(latents), latents.new_full((batch, frames), sigma))
