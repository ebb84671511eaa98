"""Training a model of stages that reads history: the house's training, measured by what history is worth (spec 1.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from vgr.diffusion import flow
from vgr.diffusion.pyramid import Stages, pyramid_at
from vgr.seeding import normal_like
from vgr.training.conditioning import conditioning
from vgr.training.validation import Validation, told_gain
from vgr.training.world_model import WorldModelTraining
from vgr.types import Conditioning, VideoBatch


@dataclasses.dataclass(frozen=True)
class HistoryValidation(Validation):
    """loss_N3S: of N held-out chunks, under their own history, another clip's and none, in each of S stages."""

    loss_N3S: Tensor

    def metrics(self) -> dict[str, float]:
        """Beside the losses val/loss_stage*, and val/gain_over_*_history with paired 95 % intervals over clips."""
        values = super().metrics()
        values |= {f"val/loss_stage{k}": float(x) for k, x in enumerate(self.loss_N3S[:, 0].mean(0))}
        own, *others = self.loss_N3S.mean(2).unbind(1)
        for name, loss in zip(("shuffled", "no"), others):
            values[f"val/loss_{name}_history"] = float(loss.mean())
            values |= told_gain(f"val/gain_over_{name}_history", loss - own)
        return values


class StagedTraining(WorldModelTraining):
    """`WorldModelTraining` of `diffusion.pyramid.pyramid_flow`, whose averaged weights are validated chunk by chunk."""

    @torch.no_grad()
    def validate(self, batches: Sequence[VideoBatch]) -> HistoryValidation:
        """Fixed chunks behind the first of fixed clips, with fixed noise, in every stage at the validation levels.

        History is clean: the clip's own, that of the clip half the set away, which crosses maps, or none. ValueError
        for less than two clips.
        """
        self.ema.eval()
        stages, clips = Stages(self.model.stages), torch.cat([batch.latents for batch in batches])
        if len(clips) < 2:
            raise ValueError(f"validation compares history between clips and needs at least 2, got {len(clips)}")
        others, losses, start = clips.roll(len(clips) // 2, 0), [], 0
        for number, batch in enumerate(batches):
            rows = torch.arange(start, start := start + len(batch.keys))
            batch = batch.to(self.device)
            args = (batch.captions, batch.cameras, batch.shot, self.stride, self.chunk, self.cut_prefix)
            cond = conditioning(self.ema["text"], *args)
            ends = torch.unique_consecutive(cond.layout.chunk, return_counts=True)[1].cumsum(0).tolist()
            if len(ends) < 2:
                raise ValueError(f"training.chunk={self.chunk} makes one chunk of these clips: nothing has a history")
            later = 1 + number % (len(ends) - 1)
            pasts = [x[:, :, : ends[later - 1]] for x in (batch.latents, others[rows].to(self.device))]
            pasts.append(pasts[0][:, :, :0])
            losses.append(self._losses(batch.latents, pasts, (ends[later - 1], ends[later]), rows, cond, stages))
        loss_N3SL = torch.cat(losses)
        keys = tuple(k for b in batches for k in b.keys)
        return HistoryValidation(keys, self.validation_levels, loss_N3SL[:, 0].mean(1), None, loss_N3SL.mean(3))

    def _losses(
        self, latents: Tensor, pasts: list[Tensor], frames: tuple[int, int], rows: Tensor, cond: Conditioning,
        stages: Stages,
    ) -> Tensor:  # fmt: skip
        """(B,3,S,L): of latent frames a to b, under each of three pasts, in each stage, at each level."""
        made = []
        for past in pasts:
            for stage in range(stages.count):
                for level in self.validation_levels:
                    noise = normal_like(latents[:, :, slice(*frames)], self.seed, f"validation {level:g}", rows)
                    sigma_B = torch.full((len(rows),), level, device=self.device)
                    noised = pyramid_at(latents, past, frames, noise, sigma_B, stage, stages)
                    v, _ = self.ema["model"](noised.x, noised.t, noised.told(cond))
                    made.append(flow.velocity_loss(v, noised.target, noised.weight))
        return torch.stack(made, 1).view(len(rows), len(pasts), stages.count, -1).double().cpu()
