"""Helios' pyramid: a chunk denoised in stages of growing size, each along a straight path of its own (spec 1.4).

A stage's times are local: it starts at 0.999 and ends at 0 (a denoiser maps them to what its weights know). Stage k of
n works on latents halved n - 1 - k times. Its path leads from noise (k = 0), or from what the stage before ended with,
enlarged and noised, to latents that still have the noise of the stage's end; the last ends clean.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vgr.diffusion import flow
from vgr.diffusion.objectives import Noised
from vgr.diffusion.samplers import FrameNoise
from vgr.seeding import derive_seed, noised_frames, normal_like, torch_generator
from vgr.types import Conditioning, Denoiser, HistoryBlock

TOP, LEVELS = 0.999, 1000
SIZES = (16, 2, 1)  # latent frames of the tiers long, mid and short behind the prefix (spec 1.2)
_GROUPS = (4, 2, 1)  # latent frames of a token of theirs


@dataclass(frozen=True)
class Stages:
    """Noise at both ends of each of `count` stages; gamma: negative correlation of block noise, 1/3 at the most."""

    count: int = 3
    gamma: float = 1 / 3

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.gamma <= 1 / 3:
            raise ValueError(f"stages={self.count}, gamma={self.gamma}: use 1 or more stages and 0 < gamma <= 1/3")

    def _edge(self, stage: int) -> float:
        """The share of noise where `stage` begins, on one path from noise to data."""
        left = LEVELS - stage * LEVELS // self.count
        return TOP * left / LEVELS

    def renoise(self, stage: int) -> tuple[float, float]:
        """alpha, beta: stage > 0 starts at alpha times the enlarged end of the one before plus beta block noise."""
        signal = 1 - self._edge(stage)
        alpha = 1 / (math.sqrt(1 + 1 / self.gamma) * (1 - signal) + signal)
        return alpha, alpha * (1 - signal) / math.sqrt(self.gamma)

    def ends(self, stage: int) -> tuple[float, float]:
        """The shares of noise where a stage starts and ends."""
        start = self._edge(stage)
        if stage:
            start = 1 - self.renoise(stage)[0] * (1 - start)
        return start, self._edge(stage + 1)

    def times(self) -> tuple[float, ...]:
        """Global times (of 1000) between the stages, in proportion to the noise each removes, on the grid of 999/1000.

        The first and last belong to the local times 0.999 and 0 of the first and last stage.
        """
        lengths = [start - end for start, end in map(self.ends, range(self.count))]
        shares = [0.0, *(sum(lengths[: k + 1]) / sum(lengths) for k in range(self.count - 1))]
        return tuple(TOP * (LEVELS - int(share * LEVELS)) for share in shares) + (TOP,)

    def path(self, latents: Tensor, noise: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Start and end of a stage for clean latents and white noise (B,C,T,H,W), both at the stage's size."""
        times = self.count - 1 - stage
        start, end = self.ends(stage)
        noise, clean = halved(noise, times) * 2**times, halved(latents, times)
        target = clean + end * (noise - clean)
        if stage == 0:
            return noise, target
        coarse = _doubled(halved(clean, 1))
        return coarse + start * (noise - coarse), target


def halved(x: Tensor, times: int) -> Tensor:
    """Latents (B,C,T,H,W) at half the height and width, `times` times; means of four, as bilinear halving is."""
    for _ in range(times):
        x = F.avg_pool3d(x, (1, 2, 2))
    return x


def _doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def block_noise(noise: Tensor, gamma: float = 1 / 3) -> Tensor:
    """White noise (B,C,T,H,W) to noise of covariance (1 + gamma) I - gamma 11' in each 2x2 block.

    It takes back what enlarging by repetition makes alike. No factor of that matrix is sought: at 1/3 it is singular.
    """
    mean = _doubled(halved(noise, 1))
    return math.sqrt(1 + gamma) * (noise - mean) + math.sqrt(max(1 - 3 * gamma, 0.0)) * mean


def local_sigmas(steps: int, distilled: bool = False, shift: float | None = None) -> list[float]:
    """Local times of a stage's steps, falling from 0.999, and 0: `HeliosScheduler`'s, or `HeliosDMDScheduler`'s.

    The first lays them from end to end of the grid, so its last step is short; distilled weights stop before the
    grid's end. shift: mu of the dynamic shift, linear, sigma' = mu / (mu + 1/sigma - 1) (spec 1.4).
    """
    if steps < 1:
        raise ValueError(f"steps={steps} of a stage: give at least 1")
    count = steps + 1 if distilled else steps
    low = TOP / LEVELS
    sigmas = [TOP + (low - TOP) * i / max(count - 1, 1) for i in range(steps)]
    return [s if shift is None else shift / (shift + 1 / s - 1) for s in sigmas] + [0.0]


def dynamic_shift(cells: int) -> float:
    """mu of the dynamic shift for latents of `cells` T x H x W cells, four a token: 0.5 at 256 tokens, 1.15 at 4096."""
    return 0.5 + (cells // 4 - 256) * 0.65 / (4096 - 256)


@torch.no_grad()
def pyramid(
    denoiser: Denoiser,
    noise: FrameNoise,
    cond: Conditioning,
    steps: Sequence[int] = (2, 2, 2),
    *,
    distilled: bool = False,
    shifted: bool = False,
    coarse: tuple[Denoiser, Conditioning] | None = None,
    shown: int = 1,
) -> Tensor:
    """Clean latents (B,C,T,H,W) of cond's frames, with `steps` steps in each of len(steps) stages (spec 1.4).

    noise(position, k) draws white noise of the full size for stage k. distilled: each step goes back from the clean
    estimate towards the stage's own start, the last stays there; else Euler steps. shifted: `dynamic_shift` of each
    stage as diffusers' pipeline has it, by the size of latents before they are enlarged, and its times told over the
    grid without its end. coarse: denoiser and conditioning of the first `shown` stages instead of these, for evidence,
    its adapter and its prompt; the other stages, given the same start, are the same without it. ValueError for sizes
    that cannot be halved.
    """
    stages = Stages(len(steps))
    position, last = cond.layout.position, stages.count - 1
    x = noise(position, 0)
    if any(n % 2**last for n in x.shape[-2:]):
        raise ValueError(f"latents {tuple(x.shape[-2:])} cannot be halved {last} times: use fewer stages (steps)")
    x = halved(x, last) * 2**last
    for stage, count in enumerate(steps):
        own, told = coarse if stage < shown and coarse is not None else (denoiser, cond)
        told = dataclasses.replace(told, stage=stage)
        mu = dynamic_shift(math.prod(x.shape[2:])) if shifted else None  # of what it starts from
        if stage:
            alpha, beta = stages.renoise(stage)
            white = halved(noise(position, stage), last - stage) * 2 ** (last - stage)
            x = alpha * _doubled(x) + beta * block_noise(white, stages.gamma)
        start = x
        for sigma, following in itertools.pairwise(local_sigmas(count, distilled, mu)):
            local = TOP * (1 / LEVELS + TOP * sigma) if shifted else sigma
            v, _ = own(x, torch.full((x.shape[0], x.shape[2]), local, device=x.device), told)
            if distilled:
                clean = x - sigma * v
                x = clean + following * (start - clean)
            else:
                x = x + (following - sigma) * v
    return x


def image_noised(
    image: Tensor, still: Tensor, seeds: Sequence[int], span: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Latents (B,C,1,H,W) of images and of these standing still, with noise of a share within `span` (spec 1.3)."""
    both = noised_frames(torch.cat([image, still], dim=2), seeds, "image", torch.tensor([-2, -1]), span)
    return both[:, :, :1], both[:, :, 1:]


def history_blocks(
    past: Tensor, first: int, prefix: Tensor | None = None, sizes: Sequence[int] = SIZES, fill: bool = True
) -> tuple[HistoryBlock, ...]:
    """Helios' history of a chunk that starts at latent frame `first` (spec 1.2): prefix, short, mid and long tier.

    past (B,C,P,H,W): the frames before it, the newest last, any number (0 too); prefix (B,C,1,H,W): the video's first
    frame. fill: slots without a frame hold zeros, as Helios knows them; else what stands in none is left out, a tier or
    its tokens, as beside evidence (spec 2.5).
    """
    total, device = sum(sizes), past.device
    kept = past[:, :, max(past.shape[2] - total, 0) :]
    missing = total - kept.shape[2]
    slots = F.pad(kept, (0, 0, 0, 0, missing, 0))
    position = torch.arange(first - total, first, device=device)
    blocks = []
    if fill or prefix is not None:
        own = torch.zeros_like(slots[:, :, :1]) if prefix is None else prefix
        blocks.append(HistoryBlock(own, torch.zeros(1, dtype=torch.int64, device=device), "prefix"))
    begins = itertools.accumulate(sizes, initial=0)
    for tier, size, group, a in list(zip(("long", "mid", "short"), sizes, _GROUPS, begins))[::-1]:
        empty = min(max(missing - a, 0), size)
        if not fill and empty == size:
            continue
        keep = None
        if not fill and empty >= group:
            keep = torch.arange(0, size, group, device=device).view(1, -1, 1, 1) + group > empty
        blocks.append(HistoryBlock(slots[:, :, a : a + size], position[a : a + size], tier, keep))
    return tuple(blocks)


@dataclass(frozen=True)
class Past:
    """What a streamed pyramid remembers: the newest latents (B,C,P,H,W) that history takes, the video's first frame
    (B,C,1,H,W), and how many frames were committed."""

    latents: Tensor | None
    prefix: Tensor | None
    frames: int


class Streamed:
    """A staged denoiser as one that streams (`rollout.stream`, `rollout.Session`): its single step, from t = 1 to 0,
    takes a chunk through all stages under the chunks before it.

    noise(position, k): of stage k, also what the caller streams from; steps, distilled, shifted: `pyramid`'s;
    amplified: the first chunk takes twice the steps (spec 1.4). A first frame, given at t = 0, is the first chunk's
    history and stays as it is; where chunks are clips of their own, `new_state` takes it instead. cond.history,
    evidence, is read in the first `shown` stages, one as published, beside the past without its empty slots, and by
    `coarse` there instead of `denoiser` (its adapters, say).
    """

    takes_cameras, takes_history = False, True

    def __init__(
        self, denoiser: Denoiser, noise: FrameNoise, steps: Sequence[int] = (2, 2, 2), *, distilled: bool = False,
        amplified: bool = False, shifted: bool = False, coarse: Denoiser | None = None, shown: int = 1,
    ) -> None:  # fmt: skip
        self.denoiser, self.noise, self.steps, self.amplified = denoiser, noise, tuple(steps), amplified
        self.kind = {"distilled": distilled, "shifted": shifted}
        self.coarse, self.shown = denoiser if coarse is None else coarse, shown

    def new_state(self, prefix: Tensor | None = None, still: Tensor | None = None) -> Past:
        """The state before a video's first chunk, nothing or an image's (spec 1.2): its latent, and the last of it
        standing still for a clip, (B,C,1,H,W) each."""
        return Past(still, prefix, 0)

    def __call__(
        self, x: Tensor, t: Tensor, cond: Conditioning, state: Past | None = None, *, commit: bool = False
    ) -> tuple[Tensor, Past]:
        """x - t v is the chunk made (B,C,T,H,W). ValueError without a state, and for times between 0 and 1."""
        if state is None or int(cond.layout.position[0]) != state.frames:
            at, asked = None if state is None else state.frames, int(cond.layout.position[0])
            raise ValueError(f"a call at frame {asked} with a state at {at}: chunks come in order, from new_state() on")
        if commit:
            kept = x if state.latents is None else torch.cat([state.latents, x], dim=2)[:, :, -sum(SIZES) :]
            prefix = x[:, :, :1] if state.prefix is None else state.prefix
            return torch.zeros_like(x), Past(kept, prefix, state.frames + x.shape[2])
        given = int(state.frames == 0 and bool((t[:, 0] == 0).all()))
        if bool((t[:, given:] != 1).any()):
            raise ValueError("a streamed pyramid makes a chunk in one step: sample it with sigmas [1, 0]")
        past, prefix = state.latents, state.prefix
        if past is None:
            past, prefix = x[:, :, :given], x[:, :, :1] if given else None
        part, at = cond.frames(given, x.shape[2]), state.frames + given
        told, coarse = dataclasses.replace(part, history=history_blocks(past, at, prefix)), None
        if cond.history:
            own = past[:, :, -at:] if at else past  # an image standing still is of the first chunk alone (2.6)
            beside = (*history_blocks(own, at, prefix, fill=False), *cond.history)
            coarse = self.coarse, dataclasses.replace(part, history=beside)
        steps = [count * (1 + (self.amplified and state.frames == 0)) for count in self.steps]
        made = pyramid(self.denoiser, self.noise, told, steps, **self.kind, coarse=coarse, shown=self.shown)
        return x - torch.cat([x[:, :, :given], made], dim=2), state


def pyramid_flow(
    latents: Tensor,
    positions: Tensor,
    chunk_T: Tensor,
    seed: int,
    *,
    global_batch: int,
    ratio: Sequence[float] = (1, 2, 1),
    text: float = 0.25,
    corruption: float = 0.9,
    fill: bool = True,
    still: Tensor | None = None,
    image_noise: tuple[float, float] = (0.0, 0.0),
) -> Noised:
    """One stage of one chunk under its true history (spec 1.4, 1.5), as `Streamed` asks for it.

    A global batch shares its stage, of weights `ratio`, and its chunk, uniform over `chunk_T`, so that its samples have
    one size; the first chunk is made whole and from nothing with probability `text`, else from its first frame. With
    probability `corruption` each frame of a sample's history has noise of its own share, uniform up to 1/3. Local times
    are uniform. fill: of `history_blocks`. still (B,C,1,H,W): where chunks are clips of their own, the first frame
    standing still for one; the first chunk is then made whole behind it, and it and the prefix have noise of a share
    within `image_noise`, as in sampling. All are functions of (seed, position). ValueError for samples of two global
    batches in one call.
    """
    batches = set((positions // global_batch).tolist())
    if len(batches) != 1:
        told = f"objective.global_batch={global_batch}"
        raise ValueError(f"samples of global batches {sorted(batches)} in one call: {told} is not the run's")
    generator = torch_generator(seed, "stage", *batches)
    stage = int(torch.multinomial(torch.tensor(list(ratio), dtype=torch.float64), 1, generator=generator))
    ends = torch.unique_consecutive(chunk_T, return_counts=True)[1].cumsum(0).tolist()
    chunk = int(torch.randint(len(ends), (), generator=generator))
    from_text = float(torch.rand((), generator=generator)) < text
    whole = chunk or from_text or still is not None
    a, b = ([0, *ends][chunk], ends[chunk]) if whole else (1, ends[0])
    draws = [torch.rand(2 + a, generator=torch_generator(seed, "time", p)) for p in positions.tolist()]
    sigma_B, noisy_B, share_BT = torch.stack(draws).to(latents).split([1, 1, a], dim=1)
    past = latents[:, :, :a]
    noise = normal_like(past, seed, "history noise", positions)
    past = flow.interpolate(past, noise, share_BT / 3 * (noisy_B < corruption))
    prefix = past[:, :, :1] if a else None
    if still is not None and not (from_text and a == 0):
        seeds = [derive_seed(seed, "image", p) for p in positions.tolist()]
        prefix, still = image_noised(latents[:, :, :1], still, seeds, image_noise)
        past = past if a else still
    return pyramid_at(latents, past, (a, b), normal_like(latents[:, :, a:b], seed, "noise", positions),
                      TOP * (1 - sigma_B[:, 0]), stage, Stages(len(ratio)), fill, prefix)  # fmt: skip


def pyramid_at(
    latents: Tensor, past: Tensor, frames: tuple[int, int], noise: Tensor, sigma_B: Tensor, stage: int, stages: Stages,
    fill: bool = True, prefix: Tensor | None = None,
) -> Noised:  # fmt: skip
    """`pyramid_flow` of latent frames a to b of clean latents, with given history past (B,C,a,H,W), noise and times;
    prefix: the video's first frame in it, the first of the past unless given."""
    a, b = frames
    start, end = stages.path(latents[:, :, a:b], noise, stage)
    t_BT = sigma_B[:, None].expand(-1, b - a)
    prefix = past[:, :, :1] if prefix is None and past.shape[2] else prefix
    history = history_blocks(past, a, prefix, fill=fill)
    x = flow.interpolate(end, start, t_BT)
    return Noised(x, t_BT, start - end, torch.ones_like(t_BT), history=history, stage=stage, frames=frames)
