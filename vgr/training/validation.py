"""How well a network predicts velocities of held-out clips, and what it owes to their cameras."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vgr.diffusion import flow, refine
from vgr.diffusion.guidance import teacher_forced
from vgr.diffusion.objectives import refinement_at
from vgr.seeding import normal_like
from vgr.training.conditioning import conditioning
from vgr.types import Cameras, Conditioning, Denoiser, Layout, TextEncoder, VideoBatch


def told_gain(name: str, gain_N: Tensor) -> dict[str, float]:
    """`name`, its mean over N clips, and _low and _high, the normal 95 % interval of a mean of paired differences."""
    mean, half = float(gain_N.mean()), 1.96 * float(gain_N.std()) / math.sqrt(len(gain_N))
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


@dataclasses.dataclass(frozen=True)
class Validation:
    """Losses of N held-out clips at L noise levels: with their own cameras and, if it has any, another clip's."""

    keys: tuple[str, ...]
    levels: tuple[float, ...]
    own_NL: Tensor
    shuffled_NL: Tensor | None

    def metrics(self) -> dict[str, float]:
        """val/loss, val/loss_t*, val/loss_shuffled_camera and val/camera_gain with a normal 95 % interval.

        The gain is the shuffled minus the own loss of each clip, averaged over levels; its interval is that
        of a mean of N paired differences.
        """
        values = {f"val/loss_t{level:g}": float(x) for level, x in zip(self.levels, self.own_NL.mean(0))}
        values = {"val/loss": float(self.own_NL.mean()), **values, "val/clips": len(self.keys)}
        if self.shuffled_NL is None:
            return values
        gain = told_gain("val/camera_gain", (self.shuffled_NL - self.own_NL).mean(1))
        return {**values, "val/loss_shuffled_camera": float(self.shuffled_NL.mean()), **gain}


@torch.no_grad()
def validate(
    network: Denoiser,
    text: TextEncoder,
    batches: Sequence[VideoBatch],
    levels: Sequence[float],
    *,
    seed: int,
    stride: int,
    chunk: int | None,
    device: Any,
    packed: bool = False,
    cut_prefix: str | None = None,
) -> Validation:
    """Losses on fixed clips with fixed noise, first frame clean, cameras own and from another clip.

    packed: all frames noisy instead, each chunk under the clean ones before it (`guidance.teacher_forced`).
    The other clip is half the set away, which crosses maps; at least two clips are needed (ValueError).
    """
    count = sum(len(b.keys) for b in batches)
    if count < 2:
        raise ValueError(f"validation compares cameras between clips and needs at least 2, got {count}")
    c2w, intrinsics = (torch.cat([getattr(b.cameras, k) for b in batches]) for k in ("c2w", "intrinsics"))
    other = Cameras(c2w.roll(count // 2, 0), intrinsics.roll(count // 2, 0))
    own, shuffled, start = [], [], 0
    for batch in batches:
        end = start + len(batch.keys)
        swapped = Cameras(other.c2w[start:end], other.intrinsics[start:end]).to(device)
        clips = torch.arange(start, end)
        batch = batch.to(device)
        denoiser = teacher_forced(network, batch.latents) if packed else network
        for cameras, rows in ((batch.cameras, own), (swapped, shuffled))[: 1 + network.takes_cameras]:
            cond = conditioning(text, batch.captions, cameras, batch.shot, stride, chunk, cut_prefix)
            losses = []
            for level in levels:
                noise = normal_like(batch.latents, seed, f"validation {level:g}", clips)
                t_BT = torch.full((len(clips), batch.latents.shape[2]), level, device=device)
                if not packed:
                    t_BT[:, 0] = 0.0
                v, _ = denoiser(flow.interpolate(batch.latents, noise, t_BT), t_BT, cond)
                losses.append(flow.velocity_loss(v, flow.velocity(batch.latents, noise), t_BT > 0))
            rows.append(torch.stack(losses, 1).double().cpu())
        start = end
    keys = tuple(k for b in batches for k in b.keys)
    return Validation(keys, tuple(levels), torch.cat(own), torch.cat(shuffled) if shuffled else None)


def validate_average(module: Any, batches: Sequence[VideoBatch]) -> Validation:
    """`validate` of a training module's averaged weights, as it trains them."""
    module.ema.eval()
    return validate(
        module.ema["model"], module.ema["text"], batches, module.validation_levels, seed=module.seed,
        stride=module.stride, chunk=module.chunk, device=module.device, packed=module.packed,
        cut_prefix=module.cut_prefix,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PairValidation(Validation):
    """Losses of N held-out pairs, and root mean square distances to true latents behind the sink.

    distance_N3: of stage 1's latents, of the refined ones, and of those refined from another clip's stage 1.
    """

    distance_N3: Tensor

    def metrics(self) -> dict[str, float]:
        """Beside the losses val/distance_* and val/gain_*: how much nearer refining comes, 95 % paired intervals."""
        values = super().metrics()
        stage1, refined, other = self.distance_N3.unbind(1)
        for name, column in (("stage1", stage1), ("refined", refined), ("other_stage1", other)):
            values[f"val/distance_{name}"] = float(column.mean())
        for name, gain in (("over_stage1", stage1 - refined), ("over_other_stage1", other - refined)):
            values |= told_gain(f"val/gain_{name}", gain)
        return values


@torch.no_grad()
def validate_pairs(
    network: Denoiser, text: TextEncoder, batches: Sequence[VideoBatch], levels: Sequence[float], *,
    sigma_start: float, reference: int, seed: int, chunk: int | None, device: Any,
) -> PairValidation:  # fmt: skip
    """Losses of the refinement path at fixed sigmas, and three steps from stage 1: with its own, with another clip's.

    chunk: latent frames of a chunk; None: the whole video at once. At least two pairs are needed (ValueError).
    """
    pairs = torch.cat([batch.latents for batch in batches])
    if len(pairs) < 2:
        raise ValueError(f"validation compares stage 1 between clips and needs at least 2 pairs, got {len(pairs)}")
    others, losses, distances, start = pairs.roll(len(pairs) // 2, 0), [], [], 0
    for batch in batches:
        clips = torch.arange(start, start := start + len(batch.keys))
        latents, other = batch.latents.to(device), others[clips].to(device)
        (low, high), states = latents.chunk(2, dim=1), text(batch.captions)
        layout = Layout.chunked(*high.shape[::2][:2], chunk or high.shape[2], device)
        rows = []
        for level in levels:
            noise = normal_like(high, seed, f"validation {level:g}", clips)
            sigma_B = torch.full((len(clips),), level)
            noised = refinement_at(latents, noise, sigma_B, sigma_start, reference)
            v, _ = network(noised.x, noised.t, Conditioning(layout, states))
            rows.append(flow.velocity_loss(v, noised.target, noised.weight))
        losses.append(torch.stack(rows, 1).double().cpu())
        sizes = layout.chunk.bincount().tolist()
        made = [low]
        for stage1 in (low, other.chunk(2, dim=1)[0]):
            given = torch.cat([high[:, :, :reference], stage1[:, :, reference:]], dim=2)
            if chunk is None:
                made.append(refine.refine(network, given, states, seed))
            else:
                made.append(torch.cat(list(refine.refine_stream(network, given.split(sizes, 2), states, seed)), 2))
        squares = [(x - high)[:, :, reference:].double().square().flatten(1).mean(1).sqrt().cpu() for x in made]
        distances.append(torch.stack(squares, 1))
    keys = tuple(k for b in batches for k in b.keys)
    return PairValidation(keys, tuple(levels), torch.cat(losses), None, torch.cat(distances))
