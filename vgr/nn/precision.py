"""bf16 for the large products, fp32 for times and gates, whatever precision the weights have (design section 3)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear32(nn.Linear):
    """A linear layer computed in fp32 whatever its weights' precision and autocast."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), bias)


def writes_in_place() -> bool:
    """Whether no gradient is kept and nothing compiled: then what a block has just made may be written over.

    In eager code on a CPU pages of a new tensor cost more than the arithmetic; a compiler copies what it writes over.
    """
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def in_own_precision(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of a model that half-precision weights put under autocast to their own type, unless the caller has."""

    @functools.wraps(forward)
    def run(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = next(self.parameters()).dtype
        if dtype == torch.float32 or torch.is_autocast_enabled(x.device.type):
            return forward(self, x, *args, **kwargs)
        with torch.autocast(x.device.type, dtype):
            return forward(self, x, *args, **kwargs)

    return run
