"""Clips as a denoiser is told about them: text states, grouped cameras and the layout of chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgr.data.modules import EncodedCaption, ShardData
from vgr.geometry.cameras import group_by_latent
from vgr.nn.frozen import from_arrays
from vgr.seeding import torch_generator
from vgr.types import Cameras, Conditioning, Layout, TextEncoder, TextStates, VideoBatch

Captions = tuple[tuple[str, ...], ...]


def conditioning(
    text: TextEncoder, captions: Captions, cameras: Cameras, shot_BT: Tensor, stride: int, chunk: int | None,
    cut_prefix: str | None = None, cuts: bool = True, clips: bool = False,
) -> Conditioning:  # fmt: skip
    """For a denoiser; poses stay fp32 under autocast. stride: raw frames of a latent frame; chunk: latent frames;
    clips: chunks are clips of their own, which models with cameras do not know.

    Cuts are moved to chunk edges: a chunk shows the shot of most of its frames, of equals the earlier (causal video,
    spec 3.1). Without chunks every frame keeps its shot. cut_prefix: marks a cut, as `diffusion.rollout.Session` does:
    it stands before the caption in the first chunk of a new shot. Empty captions, the null text, get none. cuts False:
    captions change within one shot, so that nothing but the text tells of it.
    """
    batch, frames = shot_BT.shape
    with torch.autocast(shot_BT.device.type, enabled=False):
        grouped = None if clips else group_by_latent(cameras, stride)
    prompt = None
    layout = Layout.chunked(batch, frames, chunk or frames, shot_BT.device, clips)
    if chunk is not None and bool((shot_BT != shot_BT[:, :1]).any()):
        parts = [shot_BT[:, layout.chunk == c] for c in layout.chunk.unique()]
        shot_BT = torch.cat([part.mode(dim=1, keepdim=True).values.expand_as(part) for part in parts], dim=1)
        if cut_prefix and cuts:
            most = max(map(len, captions))
            starts = [shot_BT[:, chunk.nonzero()[0]] for chunk in (layout.chunk == c for c in layout.chunk.unique())]
            starts_BN = torch.cat(starts, dim=1)
            cut_BN = F.pad(starts_BN[:, 1:] != starts_BN[:, :-1], (1, 0))
            prompt = shot_BT + most * cut_BN[:, layout.chunk]
            marked = (tuple(cut_prefix + caption if caption else "" for caption in row) for row in captions)
            captions = tuple(row + ("",) * (most - len(row)) + own for row, own in zip(captions, marked))
    if not cuts:
        prompt, shot_BT = shot_BT, torch.zeros_like(shot_BT)
    return Conditioning(dataclasses.replace(layout, shot=shot_BT), text(captions), grouped, prompt)


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


class CachedText(nn.Module):
    """Stands for a frozen text encoder, called `stands_for`, where captions bring its states along and it need not run.

    null: states (J,D) of the empty caption. ValueError for a caption without states.
    """

    def __init__(self, stands_for: str, config: dict[str, Any], null: np.ndarray) -> None:
        super().__init__()
        self.stands_for, self.config, self.width = stands_for, config, null.shape[1]
        self.register_buffer("null", torch.from_numpy(null), persistent=False)

    def forward(self, captions: Captions) -> TextStates:
        null = self.null.half().cpu().numpy()
        arrays = []
        for row in captions:
            rows = [self._states(caption) if caption else null for caption in row]
            lengths = np.array([len(x) for x in rows])
            arrays.append((np.stack([np.pad(x, ((0, lengths.max() - len(x)), (0, 0))) for x in rows]), lengths))
        states = from_arrays(arrays)
        return TextStates(states.states.to(self.null.device), states.mask.to(self.null.device))

    def _states(self, caption: str) -> np.ndarray:
        if not isinstance(caption, EncodedCaption):
            raise ValueError(
                f"the shards hold {self.stands_for}'s states of their own captions only, and not of {caption!r}; take "
                "shards prepared without text="
            )
        return caption.states


def cached_text(data: ShardData, settings: Mapping[str, Any]) -> CachedText | None:
    """The encoder that `settings` (cfg.text) names, if both splits hold its states. ValueError for other settings."""
    kept = [shards.manifest["extra"].get("text") for shards in (data.train_shards, data.val_shards)]
    name = settings["_target_"].rsplit(".", 1)[-1]
    if any(x is None or x["class"] != name for x in kept):
        return None
    for made, shards in zip(kept, (data.train_shards, data.val_shards)):
        differ = [k for k, v in made["config"].items() if k in settings and settings[k] != v]
        if differ:
            told = ", ".join(f"text.{k}={settings[k]} (they: {made['config'][k]})" for k in differ)
            raise ValueError(f"{shards.folder} holds text states of another {name}, {told}; set it so, or prepare anew")
    return CachedText(name, kept[0]["config"], data.train_shards.null_text())
