"""Our world model equals diffusers' port: outputs, gradients, and the doubtful switches as the port has them."""

import pytest
import torch

pytest.importorskip("diffusers")
from benchmarks.speed.sana_port import fp32_softmax, from_port, make_inputs, make_port
from tests.float64 import Float64, wide  # noqa: F401
from vgr.types import _map_tensors

CHANNELS, TEXT, RAW = 4, 24, 8
# width, heads, layers, softmax_every, batch, frames, grid, translation
CASES = [
    (32, 2, 2, 2, 2, 5, (3, 4), 1.0),
    (96, 4, 4, 4, 1, 9, (4, 7), 1.0),
    (224, 2, 2, 2, 2, 4, (2, 3), 1.0),
    (64, 2, 2, 4, 3, 1, (1, 1), 1.0),
    (80, 2, 3, 2, 1, 23, (2, 2), 1.0),
    (48, 2, 2, 2, 1, 2, (3, 5), 300.0),
]


def _pair(case, seed=0):
    width, heads, layers, every, batch, frames, grid, translation = case
    port = make_port(width, heads, layers, every, CHANNELS, TEXT, RAW, seed)
    return port, from_port(port), make_inputs(batch, CHANNELS, frames, grid, TEXT, RAW, seed + 1, translation)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_equals_port(case):
    port, ours, inputs = _pair(case)
    with torch.no_grad(), fp32_softmax():
        expected = port(**inputs.port_arguments(), return_dict=False)[0]
        actual, _ = ours(inputs.x, inputs.t, inputs.cond)
    assert (actual - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def test_gradients_equal_port():
    port, ours, inputs = _pair(CASES[1])
    weight = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(5))
    x_port, x_ours = inputs.x.clone().requires_grad_(), inputs.x.clone().requires_grad_()
    with fp32_softmax():
        (port(**{**inputs.port_arguments(), "hidden_states": x_port}, return_dict=False)[0] * weight).sum().backward()
        (ours(x_ours, inputs.t, inputs.cond)[0] * weight).sum().backward()
    assert (x_ours.grad - x_port.grad).norm() < 1e-5 * x_port.grad.norm()
    # The port's gradients travel through the same renaming as its weights.
    from vgr.models.world_model_weights import from_diffusers

    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in port.named_parameters()}
    _, expected = from_diffusers(dict(port.config), grads)
    expected = {n: g for n, g in expected.items() if not n.startswith("unused.")}
    ours_grads = {n: p.grad for n, p in ours.named_parameters()}
    assert ours_grads.keys() == expected.keys()
    for name, grad in ours_grads.items():
        assert grad is not None, name
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


def test_bf16_softmax_switch_equals_port_as_released():
    port, ours, inputs = _pair(CASES[0])
    for block in ours.blocks:
        block.attn.softmax_bf16 = True
    with torch.no_grad():
        expected = port(**inputs.port_arguments(), return_dict=False)[0]
        actual, _ = ours(inputs.x, inputs.t, inputs.cond)
    assert (actual - expected).abs().max() < 1e-3 * (expected.max() - expected.min())


def test_renormalisation_switch_changes_output():
    _, ours, inputs = _pair(CASES[5])
    with torch.no_grad():
        on, _ = ours(inputs.x, inputs.t, inputs.cond)
        for block in ours.blocks:
            block.attn.cam_renorm = False
        off, _ = ours(inputs.x, inputs.t, inputs.cond)
    assert (on - off).abs().max() > 1e-3


def test_integer_times_survive_fp32():
    _, ours, inputs = _pair(CASES[3])
    steps = torch.arange(1000)
    seen = torch.floor(1000.0 * (steps.float() / 1000.0).double() + 1e-4).long()
    assert torch.equal(seen, steps)
    a, _ = ours(inputs.x, torch.full_like(inputs.t, 0.0290), inputs.cond)
    b, _ = ours(inputs.x, torch.full_like(inputs.t, 0.0299), inputs.cond)
    c, _ = ours(inputs.x, torch.full_like(inputs.t, 0.0300), inputs.cond)
    assert torch.equal(a, b) and not torch.equal(b, c)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_models_have_the_ports_gradients_in_float64(seed, wide):  # noqa: F811
    """Sizes, lengths and cameras drawn, both sides in float64: output and every parameter's gradient agree."""
    from vgr.models.world_model_weights import from_diffusers

    draw = torch.Generator().manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (), generator=draw))]  # noqa: E731
    heads = pick(2, 4)
    case = (
        heads * pick(16, 24, 56), heads, pick(2, 3, 4), pick(2, 4), pick(1, 2), pick(1, 2, 5, 9, 14),
        (pick(1, 2, 3), pick(2, 5)), pick(1.0, 30.0),
    )  # fmt: skip
    with Float64():  # tables that are made once, too
        port, ours, inputs = _pair(case, seed)
    port, ours = port.double(), ours.double()
    weight = torch.randn(inputs.x.shape, generator=draw, dtype=torch.float64)
    double = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    x_port, x_ours = (inputs.x.double().requires_grad_() for _ in range(2))
    given = {**{k: double(v) for k, v in inputs.port_arguments().items()}, "hidden_states": x_port}
    with fp32_softmax(), Float64():
        expected = port(**given, return_dict=False)[0]
        (expected * weight).sum().backward()
        actual, _ = ours(x_ours, inputs.t.double(), _map_tensors(inputs.cond, double))
        (actual * weight).sum().backward()
    assert actual.dtype == expected.dtype == torch.float64
    assert (actual - expected).abs().max() < 1e-7 * expected.abs().max()
    assert (x_ours.grad - x_port.grad).norm() < 1e-7 * x_port.grad.norm()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in port.named_parameters()}
    _, told = from_diffusers(dict(port.config), grads)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - told[name]).norm() <= 1e-6 * told[name].norm() + 1e-9, name
