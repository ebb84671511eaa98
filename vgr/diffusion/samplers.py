"""Solvers of the flow: functions over a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vgr.diffusion import flow
from vgr.seeding import torch_generator
from vgr.types import Conditioning, Denoiser, Layout

# noise(position (T,), step) -> (B,C,T,H,W): the start (step 0) or the renewed noise of frames of a video.
FrameNoise = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Conditioning,
    sigmas: Tensor,
    first_frame: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Euler steps down `sigmas` (steps + 1, ending in 0 at clean latents) from noise (B,C,T,H,W) (spec 1.4).

    first_frame (B,C,1,H,W): given clean latents, held at latent frame 0 with t = 0. Updates use the exact sigma;
    a model that truncates its times does so itself. `on_step(i)` is called after each step.
    """
    return _descend(denoiser, noise, cond, sigmas, [0] * noise.shape[2], first_frame, on_step)


@torch.no_grad()
def chunk_flow_euler(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Conditioning,
    sigmas: Tensor,
    first_frame: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
    stagger: float | None = None,
) -> Tensor:
    """Staggered joint denoising of a chunk-causal model without a state (spec 6.1); arguments as `euler`'s.

    Chunk i of `cond.layout` starts at global step int(i * stagger * steps), stagger 1 / chunks unless given: at 1
    each chunk waits for the one before. Every call takes the chunks that have started; finished ones stay in at
    t = 0. There are int((chunks - 1) * stagger * steps) + steps calls. ValueError unless 0 < stagger <= 1.
    """
    sigmas, bounds = _checked(sigmas), chunk_bounds(cond.layout)
    steps = len(sigmas) - 1
    share = 1 / len(bounds) if stagger is None else stagger
    if not 0 < share <= 1:
        raise ValueError(f"stagger={stagger} is the share of a chunk's steps after which the next starts: use (0, 1]")
    # The reference's expression, rounding included.
    start = [int(i * share * steps) for i, (a, b) in enumerate(bounds) for _ in range(a, b)]
    return _descend(denoiser, noise, cond, sigmas, start, first_frame, on_step)


def _descend(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Conditioning,
    sigmas: Tensor,
    start: list[int],
    first_frame: Tensor | None,
    on_step: Callable[[int], None] | None,
) -> Tensor:
    """Euler steps where frame f of T begins at global step start[f], non-decreasing over frames."""
    sigmas = sigmas.to("cpu", torch.float64)
    x, steps, first = noise.clone(), len(sigmas) - 1, torch.tensor(start)
    free = torch.ones(len(start), dtype=torch.float64)
    if first_frame is not None:
        x[:, :, :1] = first_frame
        free[0] = 0.0
    for i in range(start[-1] + steps):
        active = int((first <= i).sum())
        local = (i - first[:active]).clamp(max=steps)
        sigma, following = (free[:active] * sigmas[s] for s in (local, (local + 1).clamp(max=steps)))
        t = sigma.to(x.device, torch.float32).expand(x.shape[0], -1)
        v, _ = denoiser(x[:, :, :active], t, cond.frames(0, active))
        step = (following - sigma).to(x.device, x.dtype)
        moved = x[:, :, :active] + step.view(1, 1, -1, 1, 1) * v.to(x.dtype)
        x = torch.cat([moved, x[:, :, active:]], dim=2)
        if on_step is not None:
            on_step(i)
    return x


@torch.no_grad()
def few_step(
    denoiser: Denoiser,
    noise: FrameNoise,
    cond: Conditioning,
    sigmas: Tensor,
    state: Any = None,
    first_frame: Tensor | None = None,
    *,
    renoise: bool = False,
    exit_step: int | None = None,
) -> tuple[Tensor, Any]:
    """A student's clean latents (B,C,T,H,W) of cond's frames, and the state with this chunk's scratch.

    Between calls x moves down `sigmas` (steps + 1, ending in 0) by Euler steps, as in streaming (spec 6.3), or with
    `renoise` to (1 - t) x0 + t noise(position, step), as in self-forcing (spec 6.2); every draw depends on absolute
    frames only. The last call's x - t v is returned. exit_step (from 0): stop at that call. first_frame (B,C,1,H,W)
    is held at cond's first frame with t = 0. Nothing is committed. ValueError for an exit_step beyond the steps.
    """
    sigmas = _checked(sigmas)
    steps = len(sigmas) - 1
    last = steps - 1 if exit_step is None else exit_step
    if not 0 <= last < steps:
        raise ValueError(f"exit_step={exit_step} with {steps} steps: use 0 to {steps - 1}, or none for all")
    x = noise(cond.layout.position, 0)
    times = sigmas.to(x.device)[:, None].repeat(1, x.shape[2])
    if first_frame is not None:
        x = torch.cat([first_frame.to(x), x[:, :, 1:]], dim=2)
        times[:, 0] = 0.0
    for i in range(last + 1):
        t, following = (times[j].expand(x.shape[0], -1) for j in (i, i + 1))
        v, state = denoiser(x, t.float(), cond, state)
        v = v.to(x.dtype)
        clean = flow.clean_estimate(x, v, t.to(x.dtype))
        if i < last and renoise:
            x = flow.interpolate(clean, noise(cond.layout.position, i + 1), following.to(x.dtype))
        elif i < last:
            x = flow.clean_estimate(x, v, (t - following).to(x.dtype))
    return clean, state


def _checked(sigmas: Tensor) -> Tensor:
    """The grid in fp64 on the host; ValueError unless it falls from at most 1 to 0."""
    sigmas = sigmas.to("cpu", torch.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[0] > 1 + 1e-9 or sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas must fall from at most 1 to exactly 0, got {sigmas.tolist()}")
    return sigmas


def frame_noise(seeds: Sequence[int], shape_CHW: Sequence[int], device: torch.device | str = "cpu") -> FrameNoise:
    """Standard normal noise whose every frame is a function of (seed of its row, position, step) alone; fp32."""

    def draw(position: Tensor, step: int) -> Tensor:
        places = position.tolist()
        draws = [
            [torch.randn(*shape_CHW, generator=torch_generator(seed, "frame", place, step)) for place in places]
            for seed in seeds
        ]
        return torch.stack([torch.stack(row, dim=1) for row in draws]).to(device)

    return draw


def chunk_bounds(layout: Layout) -> list[tuple[int, int]]:
    """First (included) and last (excluded) frame of each chunk in order; ValueError where a chunk comes back."""
    if bool((layout.chunk.diff() < 0).any()):
        raise ValueError(
            f"layout.chunk must not decrease, got {layout.chunk.tolist()}; packed layouts serve training, not sampling"
        )
    ends = torch.unique_consecutive(layout.chunk, return_counts=True)[1].cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends))
