"""Clips as a denoiser is told about them: text states, grouped cameras and the layout of chunks."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vgr.geometry.cameras import group_by_latent
from vgr.seeding import torch_generator
from vgr.types import Cameras, Conditioning, Layout, TextEncoder, VideoBatch

Captions = tuple[tuple[str, ...], ...]


def conditioning(
    text: TextEncoder, captions: Captions, cameras: Cameras, shot_BT: Tensor, stride: int, chunk: int | None
) -> Conditioning:
    """For a denoiser; poses stay fp32 under autocast. stride: raw frames of a latent frame; chunk: latent frames."""
    batch, frames = shot_BT.shape
    with torch.autocast(shot_BT.device.type, enabled=False):
        grouped = group_by_latent(cameras, stride)
    layout = Layout.chunked(batch, frames, chunk or frames, shot_BT.device)
    return Conditioning(dataclasses.replace(layout, shot=shot_BT), text(captions), grouped)


def dropped(batch: VideoBatch, seed: int, text_dropout: float, camera_dropout: float) -> tuple[Captions, Cameras]:
    """Captions emptied and cameras stopped at their first pose, each with its probability, drawn per position."""
    captions, c2w = [], batch.cameras.c2w.clone()
    for b, position in enumerate(batch.position.tolist()):
        generator = torch_generator(seed, "dropout", position)
        no_text, no_camera = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        shots = batch.captions[b]
        captions.append(("",) * len(shots) if no_text < text_dropout else shots)
        if no_camera < camera_dropout:
            c2w[b] = c2w[b, :1]
    return tuple(captions), Cameras(c2w, batch.cameras.intrinsics)
