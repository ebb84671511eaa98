"""How a batch of clean latents becomes what a denoiser is trained on: noisy latents, their times and a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vgr.diffusion import flow, timesteps
from vgr.seeding import normal_like, torch_generator
from vgr.types import Conditioning, HistoryBlock


@dataclass(frozen=True)
class Noised:
    """x, target (B,C,T,H,W): noisy latents and the velocity to predict; t (B,T); weight (B,T) of squared errors.

    context (B,C,T,H,W): the past of each chunk, where the model is to see it (`guidance.teacher_forced`), at times
    context_t (B,T), clean without. frames: x holds latent frames a to b of the clip only, of the size of `stage`, and
    the model sees their `history` (`pyramid.pyramid_flow`).
    """

    x: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor
    context: Tensor | None = None
    context_t: Tensor | None = None
    frames: tuple[int, int] | None = None
    stage: int | None = None
    history: tuple[HistoryBlock, ...] = ()

    def told(self, cond: Conditioning) -> Conditioning:
        """What the model is told of x, of the conditioning of the whole clip."""
        part = cond if self.frames is None else cond.frames(*self.frames)
        return replace(part, stage=self.stage, history=(*part.history, *self.history))


def flow_matching(
    latents_BCTHW: Tensor,
    positions: Tensor,
    chunk_T: Tensor,
    seed: int,
    *,
    shift: float,
    first_frame_clean: float,
    mixture: Mapping[str, float] = timesteps.MIXTURE,
) -> Noised:
    """SANA-WM sections 5.2 and C.2: a straight path to noise, errors unweighted, clean frames not counted.

    One time a sample for a single chunk, otherwise `mixture` over the chunks (see `timesteps.training_times`). Noise
    and times are functions of (seed, position).
    """
    t_BT = timesteps.training_times(positions, chunk_T, seed, shift, first_frame_clean, mixture)
    t_BT = t_BT.to(latents_BCTHW.device)
    noise = normal_like(latents_BCTHW, seed, "noise", positions)
    x = flow.interpolate(latents_BCTHW, noise, t_BT)
    return Noised(x, t_BT, flow.velocity(latents_BCTHW, noise), (t_BT > 0).float())


def teacher_forcing(
    latents: Tensor,
    positions: Tensor,
    chunk_T: Tensor,
    seed: int,
    *,
    shift: float,
    shared: bool = True,
    bump: bool = True,
    context_noise: float = 0.0,
    first_frame_clean: float = 0.0,
) -> Noised:
    """Causal video, spec 3.4: noisy chunks under a clean past, times the shift of uniform ones in (0, 1].

    shared: one time for all chunks, else one each. bump: errors weigh `timesteps.bump`, else 1. context_noise: the
    past has noise of its own, at a time uniform in [0, context_noise] which the model is told. first_frame_clean: how
    often a clip's first frame is given at t = 0, as `rollout.stream` holds one, and not counted. Noise and times are
    functions of (seed, position). ValueError for a context_noise or first_frame_clean outside [0, 1].
    """
    if not (0 <= context_noise <= 1 and 0 <= first_frame_clean <= 1):
        raise ValueError(f"objective.context_noise={context_noise} is the largest time of the past, objective."
                         f"first_frame_clean={first_frame_clean} a probability: use 0 to 1")  # fmt: skip
    t_BT = timesteps.shifted(timesteps.chunk_uniform(positions, chunk_T, seed, shared), shift)
    t_BT = t_BT.float().to(latents.device)
    weight = timesteps.bump(t_BT, shift) if bump else torch.ones_like(t_BT)
    generators = [torch_generator(seed, "first frame", position) for position in positions.tolist()]
    given = torch.stack([torch.rand((), generator=generator) < first_frame_clean for generator in generators])
    for value in (t_BT, weight):
        value[given.to(value.device), 0] = 0.0
    noise = normal_like(latents, seed, "noise", positions)
    context, context_t = latents, None
    if context_noise:
        generators = [torch_generator(seed, "context time", position) for position in positions.tolist()]
        s_B = context_noise * torch.stack([torch.rand((), generator=generator) for generator in generators])
        context_t = s_B.to(t_BT)[:, None].expand_as(t_BT)
        context = flow.interpolate(latents, normal_like(latents, seed, "context noise", positions), context_t)
    x = flow.interpolate(latents, noise, t_BT)
    return Noised(x, t_BT, flow.velocity(latents, noise), weight, context, context_t)


def next_chunk(
    latents: Tensor,
    positions: Tensor,
    chunk_T: Tensor,
    seed: int,
    *,
    shift: float,
    global_batch: int,
    from_time: float = 0.74,
) -> Noised:
    """One chunk, the same for a global batch, behind its clean past, at noise from `from_time` on (warp adapter 8.3).

    Times are shifted uniform ones, as far as they are that late. The first chunk has its first frame given at t = 0. A
    function of (seed, position). ValueError for samples of two global batches in one call.
    """
    ends = torch.unique_consecutive(chunk_T, return_counts=True)[1].cumsum(0).tolist()
    generator = torch_generator(seed, "chunk", one_batch(positions, global_batch))
    chunk = int(torch.randint(len(ends), (), generator=generator))
    a, b = [0, *ends][chunk], ends[chunk]
    low = from_time / (shift - (shift - 1) * from_time)  # what `shifted` makes from_time of
    generators = [torch_generator(seed, "time", position) for position in positions.tolist()]
    u_B = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    t_B = timesteps.shifted(1 - (1 - low) * u_B, shift).float().to(latents.device)
    t_BT = t_B[:, None].repeat(1, b - a)
    t_BT[:, : chunk == 0] = 0.0
    clean, noise = latents[:, :, a:b], normal_like(latents[:, :, a:b], seed, "noise", positions)
    x = flow.interpolate(clean, noise, t_BT)
    target, weight = flow.velocity(clean, noise), (t_BT > 0).float()
    return Noised(x, t_BT, target, weight, context=latents[:, :, :a], frames=(a, b))


def one_batch(positions: Tensor, global_batch: int) -> int:
    """The number of the global batch that all samples of a call are of. ValueError where they are of several."""
    found = sorted(set((positions // global_batch).tolist()))
    if len(found) != 1:
        raise ValueError(f"samples of global batches {found} in one call: objective.global_batch={global_batch} is "
                         "not the run's")
    return found[0]


def refinement(
    latents: Tensor,
    positions: Tensor,
    _chunk_T: Tensor,
    seed: int,
    *,
    shift: float,
    sigma_start: float = 0.909375,
    reference: int = 1,
) -> Noised:
    """SANA-WM's refiner (spec 7): the straight path from noised stage-1 latents to real ones, its slope the target.

    latents (B,2C,T,H,W): a pair on channels, stage 1's x_l and the real x_h. x_1 = (1 - sigma_start) x_l +
    sigma_start noise stands at sigma_start, x_h at 0, so the slope is (x_1 - x_h) / sigma_start. The first `reference`
    frames are x_h itself at sigma 0 and not counted. One sigma a sample, shifted logit-normal cut off above
    sigma_start. Noise and sigmas are functions of (seed, position). ValueError for latents that are no such pairs.
    """
    generators = [torch_generator(seed, "time", position) for position in positions.tolist()]
    u = torch.stack([1 - torch.rand((), generator=g, dtype=torch.float64) for g in generators])  # in (0, 1]
    below = torch.special.ndtr(torch.tensor(sigma_start, dtype=torch.float64).logit() - math.log(shift))
    sigma_B = torch.sigmoid(torch.special.ndtri(u * below) + math.log(shift)).clamp_max(sigma_start)
    noise = normal_like(latents[:, : latents.shape[1] // 2], seed, "noise", positions)
    return refinement_at(latents, noise, sigma_B.float(), sigma_start, reference)


def refinement_at(latents: Tensor, noise: Tensor, sigma_B: Tensor, sigma_start: float, reference: int) -> Noised:
    """`refinement` of pairs (B,2C,T,H,W) with given noise (B,C,T,H,W) and sigmas (B,)."""
    if latents.shape[1] % 2 or not 0 < reference < latents.shape[2]:
        raise ValueError(
            f"refinement takes pairs on channels, (B,2C,T,H,W), and frames behind the reference={reference}, got "
            f"latents {tuple(latents.shape)}"
        )
    low, high = latents.chunk(2, dim=1)
    t_BT = sigma_B.to(high)[:, None].repeat(1, high.shape[2])
    t_BT[:, :reference] = 0.0
    start = flow.interpolate(low, noise, torch.full_like(t_BT, sigma_start))
    return Noised(
        flow.interpolate(high, start, t_BT / sigma_start),
        t_BT,
        flow.velocity(high, start) / sigma_start,
        (t_BT > 0).float(),
    )
