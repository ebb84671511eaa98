"""Flow, guidance and the samplers against closed forms and recorded calls."""

import pytest
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


def _chunked(frames=8, chunk=2, batch=1):
    cond = _cond(batch, frames)
    return Conditioning(Layout.chunked(batch, frames, chunk), cond.text)


class _Recorder:
    """A denoiser of the point target 0 that keeps what it was asked."""

    def __init__(self):
        self.times, self.positions, self.grads, self.inputs, self.commits = [], [], [], [], []
        self.gain = torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, x, t, cond, state=None, *, commit=False):
        self.times.append(t[0].tolist())
        self.positions.append(cond.layout.position.tolist())
        self.grads.append(torch.is_grad_enabled())
        self.inputs.append(x.detach().clone())
        self.commits.append(commit)
        return self.gain * x, (state or ()) + (len(self.times),)


def test_chunk_flow_starts_each_chunk_at_its_global_step():
    """4 steps, 3 chunks of 3, 2 and 2 frames: they start at int(4 i / 3) = 0, 1, 2; finished ones stay at 0."""
    model, ended = _Recorder(), []
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    first = torch.ones(1, 1, 1, 1, 1)
    noise = torch.randn(1, 1, 7, 1, 1, generator=torch.Generator().manual_seed(0))
    out = samplers.chunk_flow_euler(model, noise, _chunked(7), sigmas, first, ended.append)
    a, b, c, d = 1.0, 0.75, 0.5, 0.25
    assert model.times == [
        [0, a, a],
        [0, b, b, a, a],
        [0, c, c, b, b, a, a],
        [0, d, d, c, c, b, b],
        [0, 0, 0, d, d, c, c],
        [0, 0, 0, 0, 0, d, d],
    ]
    assert model.positions == [list(range(n)) for n in (3, 5, 7, 7, 7, 7)] and ended == list(range(6))
    kept = torch.tensor(1.0) * (1 - 0.25) ** 4  # v = x: each step leaves 3/4
    torch.testing.assert_close(out, torch.cat([first, kept * noise[:, :, 1:]], dim=2))


@pytest.mark.parametrize(("stagger", "starts"), [(0.5, [0, 2, 4]), (1.0, [0, 4, 8]), (0.1, [0, 0, 0])])
def test_chunk_flow_stagger(stagger, starts):
    model = _Recorder()
    sigmas = torch.linspace(1, 0, 5)
    samplers.chunk_flow_euler(model, torch.zeros(1, 1, 7, 1, 1), _chunked(7), sigmas, stagger=stagger)
    begun = [min(i for i, t in enumerate(model.times) if len(t) > f and t[f] == 1.0) for f in (0, 3, 5)]
    assert begun == starts and len(model.times) == starts[-1] + 4


def test_chunk_flow_of_one_chunk_is_euler():
    def model(x, t, cond, state=None, *, commit=False):
        return torch.sin(3 * x) + t[:, None, :, None, None] * x.mean(2, keepdim=True), None

    noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for first in (None, noise[:, :, :1] * 2):
        args = (model, noise, _cond(2, 4), timesteps.sigma_grid(9, 3.0), first)
        assert torch.equal(samplers.euler(*args), samplers.chunk_flow_euler(*args))


def test_euler_runs_in_segments():
    noise = torch.randn(1, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    sigmas, cond = torch.linspace(1, 0, 7), _cond(1, 3)

    def model(x, t, cond, state=None, *, commit=False):
        return torch.sin(3 * x) + t[:, None, :, None, None], None

    part = samplers.euler(model, noise, cond, sigmas[:4], noise[:, :, :1])
    made = samplers.euler(model, part, cond, sigmas[3:], noise[:, :, :1])
    assert torch.equal(made, samplers.euler(model, noise, cond, sigmas, noise[:, :, :1]))


def test_samplers_refuse_bad_grids_stagger_and_layouts():
    noise, sigmas = torch.zeros(1, 1, 7, 1, 1), torch.linspace(1, 0, 5)
    model, cond = _Recorder(), _chunked(7)
    for bad in (torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.2, 0.0]), torch.zeros(1)):
        with pytest.raises(ValueError, match="sigmas must fall"):
            samplers.chunk_flow_euler(model, noise, cond, bad)
        with pytest.raises(ValueError, match="sigmas must fall"):
            samplers.few_step(model, lambda p, i: noise, cond, bad)
    for stagger in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"stagger={stagger}"):
            samplers.chunk_flow_euler(model, noise, cond, sigmas, stagger=stagger)
    with pytest.raises(ValueError, match="exit_step=4 with 4 steps"):
        samplers.few_step(model, lambda p, i: noise, cond, sigmas, exit_step=4)
    packed = Layout(*(torch.cat([x, x], -1) for x in (cond.layout.position, cond.layout.chunk)), *[None] * 2)
    with pytest.raises(ValueError, match="must not decrease"):
        samplers.chunk_bounds(packed)
    assert not model.times


def test_few_step_without_renoising_is_euler():
    noise = samplers.frame_noise([5, 6], (2, 2, 2))
    cond, sigmas = _cond(2, 4), timesteps.few_step_sigmas(4, 8.0)

    def model(x, t, cond, state=None, *, commit=False):
        return torch.sin(3 * x) + t[:, None, :, None, None], None

    start = noise(cond.layout.position, 0)
    for first in (None, start[:, :, :1] * 2):
        made, _ = samplers.few_step(model, noise, cond, sigmas, first_frame=first)
        torch.testing.assert_close(made, samplers.euler(model, start, cond, sigmas, first), atol=2e-6, rtol=1e-5)
        assert first is None or torch.equal(made[:, :, :1], first)


def test_few_step_renoises_and_exits_at_the_clean_estimate():
    """v = g x: the clean estimate is (1 - g t) x; fresh noise of each step joins at its level."""
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64)
    draws = torch.randn(3, 1, 1, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = _chunked(2)
    for exit_step in range(3):
        model = _Recorder()
        with torch.no_grad():
            model.gain.fill_(0.5)
        made, state = samplers.few_step(
            model, lambda p, i: draws[i], cond, sigmas, (), renoise=True, exit_step=exit_step
        )
        x = draws[0]
        for i in range(1, exit_step + 1):
            clean = (1 - 0.5 * sigmas[i - 1]) * x
            x = (1 - sigmas[i]) * clean + sigmas[i] * draws[i]
        torch.testing.assert_close(made, (1 - 0.5 * sigmas[exit_step]) * x)
        assert not made.requires_grad and model.grads == [False] * (exit_step + 1)
        assert state == tuple(range(1, exit_step + 2)) and not any(model.commits)
    model = _Recorder()
    made, _ = samplers.few_step(model, lambda p, i: draws[i], cond, sigmas)
    assert not made.requires_grad and model.grads == [False] * 3


def test_frame_noise_depends_on_seed_frame_and_step_alone():
    noise = samplers.frame_noise([3, 4], (2, 3, 5))
    whole = noise(torch.arange(6), 1)
    assert whole.shape == (2, 2, 6, 3, 5)
    assert torch.equal(noise(torch.arange(4, 6), 1), whole[:, :, 4:])
    assert torch.equal(samplers.frame_noise([4], (2, 3, 5))(torch.tensor([2]), 1), whole[1:, :, 2:3])
    other = [noise(torch.arange(6), 0), whole.roll(1, 2), whole.flip(0)]
    assert all((x - whole).abs().min() > 0 for x in other)
    assert abs(float(noise(torch.arange(200), 0).std()) - 1) < 0.02


def test_guidance_nests_states_and_makes_them():
    class Counting:
        def new_state(self, detach=True):
            return (0, detach)

        def __call__(self, x, t, cond, state=None, *, commit=False):
            return x * cond.text.states.mean(), (state[0] + commit, state[1])

    cond = _cond()
    text = TextStates(torch.ones(2, 1, 1, 1), cond.text.mask)
    model = guided(Counting(), 2.0, text)
    assert model.new_state(detach=False) == ((0, False), (0, False))
    x, t = torch.ones(2, 1, 3, 2, 2), torch.zeros(2, 3)
    v, state = model(x, t, cond, model.new_state(), commit=True)
    assert state == ((1, True), (1, True)) and torch.equal(v, -x)
    assert not hasattr(guided(lambda *a, **k: None, 2.0, text), "new_state")
