"""Noise levels: how training draws them and which grid a sampler walks down."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vgr.seeding import torch_generator

LEVELS = 1000
# The public chunk-causal recipe (SANA-WM section C.2); "clean_prefix" is teacher forcing.
MIXTURE = {"same": 0.1, "incremental": 0.4, "last_anchor": 0.4, "clean_prefix": 0.1}


def shifted(t: Tensor, shift: float) -> Tensor:
    """The flow shift s t / (1 + (s - 1) t): more time at high noise for s > 1."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def sigma_grid(steps: int, shift: float) -> Tensor:
    """The released sampler's grid (spec 1.4): steps + 1 values in fp64 from 1 down to exactly 0.

    The lower end is shifted before the grid is laid and the whole grid is shifted once more, as the scheduler
    does it; the last non-zero value therefore depends on the shift alone (0.0877 at 9.8).
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"sampling needs steps >= 1 and shift > 0, got steps={steps}, shift={shift}")
    low = shifted(torch.tensor(0.001, dtype=torch.float64), shift).item()
    grid = shifted(torch.linspace(1.0, low, steps, dtype=torch.float64), shift)
    return torch.cat([grid, grid.new_zeros(1)])


def few_step_sigmas(steps: int, shift: float, grid_steps: int | None = None) -> Tensor:
    """A student's times: steps + 1 fp64 values from 1 down to 0, whole thousandths as its weights were trained.

    The shift of 1, 1 - 1/steps, ...: the streaming list 1000, 960, 889, 727 is (4, 8.0) (spec 6.3). With
    `grid_steps` every (grid_steps / steps)-th value of that teacher's `sigma_grid`: the distillation list
    1000, 967, 908, 764 is (4, 10.0, 60) (spec 6.2; no shift of quarters gives it, 9.8 misses by two).
    """
    if steps < 1 or shift <= 0 or (grid_steps is not None and (grid_steps < steps or grid_steps % steps)):
        raise ValueError(
            f"a student needs steps >= 1, shift > 0 and grid_steps a multiple of steps (or none), "
            f"got steps={steps}, shift={shift}, grid_steps={grid_steps}"
        )
    if grid_steps is None:
        sigmas = shifted(torch.arange(steps, -1, -1, dtype=torch.float64) / steps, shift)
    else:
        sigmas = sigma_grid(grid_steps, shift)[:: grid_steps // steps]
    return torch.round(LEVELS * sigmas) / LEVELS


def training_times(
    positions: Tensor,
    chunk: Tensor,
    seed: int,
    shift: float,
    clean_first: float,
    mixture: Mapping[str, float] = MIXTURE,
) -> Tensor:
    """Times (B,T) for samples at `positions` (B,) of the run's order (SANA-WM sections 5.1, C.2).

    chunk (T,): `layout.chunk`. A level per sample, floor(1000 sigmoid(normal)). With several chunks, one of
    `mixture` (weights, normalised): "same" gives it to every chunk; "incremental" to a random chunk, around which
    the others are uniform over all non-decreasing sequences; "last_anchor" to the last chunk in the same way;
    "clean_prefix" is "last_anchor" with a random non-empty proper prefix of chunks clean. Levels / 1000 are
    shifted; then frame 0 is clean (t = 0) with probability `clean_first`. A function of (seed, position) alone;
    fp32 on the positions' device. ValueError for weights that are unknown, negative or all zero.
    """
    if set(mixture) - set(MIXTURE) or min(mixture.values(), default=0) < 0 or sum(mixture.values()) <= 0:
        raise ValueError(f"mixture={dict(mixture)}: give weights >= 0, not all zero, for some of {', '.join(MIXTURE)}")
    ids, index = torch.unique_consecutive(chunk.cpu(), return_inverse=True)
    rows = []
    for position in positions.tolist():
        generator = torch_generator(seed, "time", int(position))
        level = int(LEVELS * torch.sigmoid(torch.randn((), generator=generator, dtype=torch.float64)))
        clean = torch.rand((), generator=generator) < clean_first
        levels = _chunk_levels(len(ids), level, mixture, generator)
        t = shifted(levels.double() / LEVELS, shift).float()[index]
        if clean:
            t[0] = 0.0
        rows.append(t)
    return torch.stack(rows).to(positions.device)


def chunk_uniform(positions: Tensor, chunk: Tensor, seed: int, shared: bool) -> Tensor:
    """Uniform in (0, 1], (B,T) fp64 on the CPU: one number a sample, or one for each of its chunks.

    chunk (T,): `layout.chunk`. A function of (seed, position) alone.
    """
    ids, index = torch.unique_consecutive(chunk.cpu(), return_inverse=True)
    count = 1 if shared else len(ids)
    generators = [torch_generator(seed, "time", position) for position in positions.tolist()]
    rows = [1 - torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.stack(rows)[:, index * (not shared)]


def bump(t: Tensor, shift: float) -> Tensor:
    """Self-Forcing's weight of errors at t (causal video, spec 3.4): exp(-2 (t - 1/2)^2) above its value at t = 1.

    Its mean over the shifted thousandths is 1; at shift 5 it is 2.08 at 0.5.
    """

    def height(t: Tensor) -> Tensor:
        return torch.exp(-2 * (t - 0.5).square()) - math.exp(-0.5)

    table = shifted(torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS, shift)
    return (height(t.double()) / height(table).mean()).clamp_min(0.0).to(t.dtype)


def _chunk_levels(chunks: int, level: int, mixture: Mapping[str, float], generator: torch.Generator) -> Tensor:
    """Levels (chunks,) of one sample of the mixture around its drawn level."""
    if chunks == 1:
        return torch.tensor([level])
    weights = torch.tensor([mixture.get(k, 0.0) for k in MIXTURE], dtype=torch.float64)
    kind = list(MIXTURE)[int(torch.multinomial(weights, 1, generator=generator))]
    if kind == "same":
        return torch.full((chunks,), level)
    anchor = int(torch.randint(chunks, (), generator=generator)) if kind == "incremental" else chunks - 1
    levels = monotone_levels(chunks, anchor, level, generator)
    if kind == "clean_prefix":
        levels[: int(torch.randint(1, chunks, (), generator=generator))] = 0
    return levels


def monotone_levels(chunks: int, anchor: int, level: int, generator: torch.Generator, levels: int = LEVELS) -> Tensor:
    """Non-decreasing levels (chunks,) in [0, levels) with `level` at `anchor`, uniform over all such sequences."""
    before = _non_decreasing(anchor, level + 1, generator)
    after = level + _non_decreasing(chunks - 1 - anchor, levels - level, generator)
    return torch.cat([before, torch.tensor([level]), after])


def _non_decreasing(length: int, values: int, generator: torch.Generator) -> Tensor:
    """A uniform non-decreasing sequence (length,) in [0, values).

    Adding its rank to each term makes it strictly increasing below values + length - 1, and back: a bijection
    with subsets, so a random subset replaces the reference's dynamic programme over path counts.
    """
    subset = torch.randperm(values + length - 1, generator=generator)[:length].sort().values
    return subset - torch.arange(length)
