"""Which parameters decay, the learning rate and the moving average, all as functions of samples_seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vgr.parallel.fsdp import local, whole_shape

# Tables added to modulations act as biases although they are matrices.
_BIAS_LIKE = ("A_log", "dt_bias", "table")


def decays(name: str, parameter: Tensor) -> bool:
    """True for weight matrices and kernels; false for vectors, norms, gates' constants and added tables."""
    return len(whole_shape(parameter)) > 1 and not name.endswith(_BIAS_LIKE)


def adamw(
    module: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW over the module's trainable parameters in two groups, with and without weight decay; fused."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def lr_factor(samples_seen: int, warmup: int, total: int, schedule: str, final: float = 0.0) -> float:
    """Share of the peak learning rate for the step that starts at samples_seen.

    Linear over the first `warmup` samples, then constant, or half a cosine down to `final` at `total`.
    """
    if samples_seen < warmup:
        return (samples_seen + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (samples_seen - warmup) / max(1, total - warmup))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))


def ema_decay(samples_seen: int, batch: int, half_life: float, rampup: float = 0.05) -> float:
    """Decay for one step of `batch` samples: half the average's weight lies in the last half_life samples.

    While the run is young the half-life is `rampup` of what was seen, so that the start is forgotten
    (Karras et al. 2024, arXiv 2312.02696, code; 0 at the first step).
    """
    effective = min(half_life, rampup * samples_seen)
    return 0.5 ** (batch / effective) if effective > 0 else 0.0


@torch.no_grad()
def ema_update(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * current, in place and in fp32, tensor by tensor."""
    pairs = ([local(a) for a in average], [local(c).detach() for c in current])
    torch._foreach_lerp_(*pairs, 1.0 - decay)
