"""Shards of pairs that the refiner trains on: stage 1's latents beside a clip's own (SANA-WM 3.4, spec 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgr.data.shards import Shards
from vgr.diffusion import rollout, samplers
from vgr.diffusion.guidance import guided
from vgr.diffusion.timesteps import sigma_grid
from vgr.seeding import derive_seed
from vgr.training import checkpoints
from vgr.training.conditioning import conditioning
from vgr.training.rebuild import rebuild, refuse_other_codec
from vgr.training.teacher_paths import write_made
from vgr.types import Codec, VideoBatch


class Pairs:
    """Stage-1 latents and true ones of `clips`, a folder with train/ and val/ shards in latents of `codec`.

    run: a generator, whose samples under a clip's text, cameras and first frame, made the way it samples, are stage 1.
    None: the clip itself, decoded, each frame made `factor` times smaller (area) and as large again (bicubic), and
    encoded. batch: clips at once; frames: raw frames of a pair, those of a clip's start (None: all). Pair i takes clip
    i, round and round, with noise of (seed, i).
    """

    def __init__(
        self, clips: str, codec: Codec, run: str | None = None, factor: int = 4, batch: int = 1,
        frames: int | None = None,
    ) -> None:  # fmt: skip
        self.clips, self.codec, self.factor, self.batch, self.frames = Path(clips), codec, factor, batch, frames
        self.settings: dict[str, Any] = {"clips": clips, "frames": frames, "factor": factor}
        self.parts: dict[str, Any] | None = None
        if run is None:
            if factor < 2:
                raise ValueError(f"source.factor={factor} makes frames no smaller: use 2 or more, or give source.run")
            return
        checkpoint = checkpoints.resolve(Path(run))
        refuse_other_codec("source.run", run, codec)
        self.parts, record = rebuild(checkpoint), checkpoints.read_generator(checkpoint)
        self.chunk, self.sampling = record["chunk"], record["sampling"]
        told = {"run": checkpoints.weights_hash(checkpoint), "sampling": self.sampling, "factor": None}
        self.settings |= told

    def write(
        self, folder: Path, count: int, seed: int, progress: Callable[[int], None], device: str, **told: Any
    ) -> int:
        """Write `count` pairs of the split that `folder` is named after, continuing; returns how many were new."""
        clips = Shards(self.clips / folder.name, self.codec.fingerprint)
        extra = {"pairs": True, "split": folder.name, "seed": seed, **self.settings}

        def pair(batch: VideoBatch) -> Tensor:
            stage1 = self._degraded(batch.latents) if self.parts is None else self._sampled(batch, seed, device)
            return torch.stack([stage1.float(), batch.latents], dim=1)

        return write_made(
            folder, clips, self.codec, 2, extra, count, self.batch, self.frames, "pair", pair, progress, device, **told
        )

    def _degraded(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            video = self.codec.decode(latents)
            size = video.shape[3:]
            frames = video.transpose(1, 2).flatten(0, 1)
            small = F.interpolate(frames, [max(1, n // self.factor) for n in size], mode="area")
            frames = F.interpolate(small, size, mode="bicubic", align_corners=False).clamp(-1, 1)
            return self.codec.encode(frames.unflatten(0, (len(video), -1)).transpose(1, 2))

    def _sampled(self, batch: VideoBatch, seed: int, device: str) -> Tensor:
        model, text = (self.parts[k].to(device).eval() for k in ("model", "text"))
        told = self.sampling
        args = (batch.captions, batch.cameras, batch.shot, self.codec.stride[0], self.chunk)
        cond = conditioning(text, *args, told.get("cut_prefix"))
        negative = text(tuple(("",) * len(row) for row in batch.captions))
        denoiser = guided(model, 1.0 if told["sigmas"] else told["guidance"], negative)
        own = told["sigmas"]
        sigmas = torch.tensor(own, dtype=torch.float64) if own else sigma_grid(told["steps"], told["shift"])
        channels, _, *grid = batch.latents.shape[1:]
        seeds = [derive_seed(seed, "stage 1", i) for i in batch.position.tolist()]
        noise, first = samplers.frame_noise(seeds, (channels, *grid), device), batch.latents[:, :, :1]
        if told["method"] == "stream":
            renoise = told.get("renoise", False)
            chunks = rollout.stream(denoiser, denoiser.new_state(), cond, sigmas, noise, first, renoise=renoise)
            return torch.cat([latents for latents, _ in chunks], dim=2)
        solve = samplers.euler if told["method"] == "joint" else samplers.chunk_flow_euler
        return solve(denoiser, noise(cond.layout.position, 0), cond, sigmas, first)
