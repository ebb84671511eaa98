"""Random numbers as functions of (seed, purpose, position), never of clock, worker, rank or world size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed from the run's seed, a purpose such as "noise" and any number of positions."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator; draws are made on the CPU so that every device sees the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *position))


def numpy_generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, purpose, *position))


def held_out(names: Iterable[str], share: float) -> set[str]:
    """About that share of names, each chosen by itself, whoever stands beside it; one at least where there are any."""
    place = {name: derive_seed(0, f"held out {name}") / 2**63 for name in names}
    return {name for name in place if place[name] < share} or set(sorted(place, key=place.__getitem__)[:1])


def noised_frames(
    x: Tensor, seeds: Sequence[int], purpose: str, positions: Tensor, span: tuple[float, float]
) -> Tensor:
    """Each frame of x (B,C,T,H,W) as sigma eps + (1 - sigma) x, sigma uniform within `span`; both are functions of
    (its row's seed, purpose, positions[t]) alone."""
    noisy = x.clone()
    for row, seed in zip(noisy, seeds, strict=True):
        for i, place in enumerate(positions.tolist()):
            generator = torch_generator(seed, purpose, place)
            sigma = span[0] + (span[1] - span[0]) * float(torch.rand((), generator=generator))
            row[:, i] = sigma * torch.randn(row[:, i].shape, generator=generator).to(row) + (1 - sigma) * row[:, i]
    return noisy


def normal_like(x: Tensor, seed: int, purpose: str, positions: Tensor) -> Tensor:
    """Standard normal noise of x's shape (B,...), row b drawn from (seed, purpose, positions[b]); fp32."""
    rows = [
        torch.randn(x.shape[1:], generator=torch_generator(seed, purpose, int(p)), dtype=torch.float32)
        for p in positions.tolist()
    ]
    return torch.stack(rows).to(x.device)
