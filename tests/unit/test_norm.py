"""The norm's hand-written backward against autograd in float64."""

import pytest
import torch

from vgr.nn.norm import RMSNorm


def plain(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (7, 8), (4,)])
def test_value_and_gradients_are_those_of_the_formula(shape):
    g = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=g) + 1).requires_grad_()
    norm, out_grad = RMSNorm(shape[-1], 1e-2), torch.randn(shape, generator=g)
    torch.nn.init.normal_(norm.weight, generator=g)
    out = norm(x)
    found = torch.autograd.grad(out, (x, norm.weight), out_grad)
    exact = [y.detach().double().requires_grad_() for y in (x, norm.weight)]
    wanted = plain(*exact, 1e-2)
    torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=1e-6)
    for a, b in zip(found, torch.autograd.grad(wanted, exact, out_grad.double())):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=3e-6)


def test_half_precision_frozen_weights_and_autocast():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=g).bfloat16().requires_grad_()
    norm = RMSNorm(8, 1e-5).bfloat16()
    norm.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.dtype == torch.float32 and grad.dtype == torch.bfloat16
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(exact, 1.0, 1e-5).sum(), exact)
    torch.testing.assert_close(grad.double(), wanted, atol=4e-3, rtol=4e-3)


def test_a_second_derivative_is_refused():
    x, norm = torch.randn(2, 8, requires_grad=True), RMSNorm(8, 1e-5)
    (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
