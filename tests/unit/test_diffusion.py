"""Flow, guidance and the samplers against closed forms and recorded calls."""

import torch

from vgr.diffusion import flow, samplers, timesteps
from vgr.diffusion.guidance import guided
from vgr.seeding import normal_like
from vgr.types import Conditioning, Layout, TextStates


def _cond(batch=2, frames=3):
    text = TextStates(torch.zeros(batch, 1, 1, 1), torch.ones(batch, 1, 1, dtype=torch.bool))
    return Conditioning(Layout.whole(batch, frames), text)


def test_flow_identities():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=g), torch.randn(2, 3, 4, 2, 2, generator=g)
    t = torch.rand(2, 4, generator=g)
    t[:, 0] = 0.0
    x, v = flow.interpolate(x0, noise, t), flow.velocity(x0, noise)
    assert torch.equal(x[:, :, 0], x0[:, :, 0])
    torch.testing.assert_close(flow.clean_estimate(x, v, t), x0, atol=1e-5, rtol=1e-5)
    masked = flow.velocity_loss(v + 2.0 * (t > 0)[:, None, :, None, None], v, t > 0)
    torch.testing.assert_close(masked, torch.full((2,), 4.0))


def test_euler_is_exact_for_a_point_target_and_holds_the_first_frame():
    g = torch.Generator().manual_seed(0)
    target, noise = torch.randn(2, 3, 3, 2, 2, generator=g), torch.randn(2, 3, 3, 2, 2, generator=g)
    seen = []

    def oracle(x, t, cond, state=None, *, commit=False):
        seen.append(t.clone())
        return (x - target) / t.clamp_min(1e-9)[:, None, :, None, None], None

    first = target[:, :, :1] + 1.0
    made = samplers.euler(oracle, noise, _cond(), timesteps.sigma_grid(7, 3.0), first)
    assert torch.equal(made[:, :, :1], first)
    torch.testing.assert_close(made[:, :, 1:], target[:, :, 1:], atol=1e-5, rtol=1e-5)
    assert all((t[:, 0] == 0).all() and (t[:, 1:] > 0).all() for t in seen) and len(seen) == 7


def test_euler_converges_to_the_gaussian_solution():
    """Data N(0, s^2): the probability flow maps noise to s * noise; first-order convergence."""
    s = 0.5

    def gaussian(x, t, cond, state=None, *, commit=False):
        t = t[:, None, :, None, None]
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2), None

    noise = torch.randn(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [
        (samplers.euler(gaussian, noise, _cond(1, 1), timesteps.sigma_grid(n, 1.0)) - s * noise).abs().max()
        for n in (50, 100, 200)
    ]
    assert 1.9 < errors[0] / errors[1] < 2.1 and 1.9 < errors[1] / errors[2] < 2.1
    assert errors[2] < 0.01 * noise.abs().max()


def test_guidance_extrapolates_from_negative_text():
    def model(x, t, cond, state=None, *, commit=False):
        return x * 0 + cond.text.states.mean(), None

    cond = _cond()
    own = Conditioning(cond.layout, TextStates(torch.ones(2, 1, 1, 1), cond.text.mask))
    x, t = torch.zeros(2, 1, 3, 2, 2), torch.ones(2, 3)
    v, state = guided(model, 3.0, cond.text)(x, t, own)
    assert torch.equal(v, torch.full_like(x, 3.0)) and state is None
    assert guided(model, 1.0, cond.text) is model


def test_noise_rows_do_not_depend_on_their_neighbours():
    x = torch.zeros(3, 2, 2)
    a = normal_like(x, 1, "noise", torch.tensor([4, 5, 6]))
    b = normal_like(x[:1], 1, "noise", torch.tensor([5]))
    assert torch.equal(a[1:2], b) and not torch.equal(a, normal_like(x, 1, "other", torch.tensor([4, 5, 6])))
