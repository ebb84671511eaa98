"""fp32 code in float64, where equality is no matter of rounding."""

import pytest
import torch
from torch.overrides import TorchFunctionMode


@pytest.fixture
def wide():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Float64(TorchFunctionMode):
    """Where code asks for float32 it gets float64, so that all of it is computed in that."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})
