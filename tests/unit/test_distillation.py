"""Trajectories, ODE regression, distribution matching and stage surgery against closed forms and plain loops."""

import pytest
import torch

from vgr.diffusion import flow
from vgr.diffusion.guidance import teacher_forced
from vgr.diffusion.samplers import euler
from vgr.diffusion.timesteps import sigma_grid
from vgr.distillation import consistency, dmd, ode
from vgr.models import surgery
from vgr.models.causal_video import CausalVideo
from vgr.models.world_model import WorldModel
from vgr.types import Conditioning, Layout, TextStates

TIMES = [1.0, 0.9, 0.75, 0.5, 0.0]
COND = Conditioning(Layout.chunked(2, 7, 3), TextStates(torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1).bool()))


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gaussian(scale):
    """The exact velocity for data N(0, scale^2): v = E[noise - x0 | x_t]."""

    def denoiser(x, t, cond, state=None, *, commit=False):
        t = flow.per_frame(t.double())
        variance = (1 - t).square() * scale**2 + t.square()
        return x * (t - (1 - t) * scale**2) / variance, None

    return denoiser


def test_a_trajectory_ends_where_the_sampler_does_and_keeps_the_first_frame():
    noise, first = _normal(2, 3, 7, 2, 2), _normal(2, 3, 1, 2, 2, seed=1)
    grid = sigma_grid(400, 3.0)
    path = ode.trajectory(_gaussian(0.5), noise, COND, TIMES, grid, first)
    joined = torch.tensor(sorted({*grid.tolist(), *TIMES}, reverse=True), dtype=torch.float64)
    assert torch.equal(path[:, -1], euler(_gaussian(0.5), noise, COND, joined, first))
    assert torch.equal(path[:, :, :, :1], first[:, None].expand(-1, 5, -1, -1, -1, -1))
    # The exact flow of a Gaussian scales noise by the deviation at each time.
    for i, time in enumerate(TIMES):
        deviation = ((1 - time) ** 2 * 0.25 + time**2) ** 0.5
        torch.testing.assert_close(path[:, i, :, 1:], noise[:, :, 1:] * deviation, rtol=0.01, atol=0.0)


def test_regression_loss_is_the_squared_error_of_the_clean_estimate():
    path = _normal(12, 5, 3, 7, 2, 2).float()
    chunk = COND.layout.chunk
    noised = ode.regression(path.flatten(1, 2), torch.arange(12), chunk, 0, times=TIMES)
    assert torch.equal(noised.t[:, 0], torch.zeros(12)) and len(noised.t.unique()) == 5
    v = _normal(12, 3, 7, 2, 2, seed=3).float()
    for b in range(12):
        for c in range(2):
            assert len(noised.t[b, 1:][chunk[1:] == c].unique()) == 1  # one snapshot a chunk
        errors = []
        for f in range(7):
            snapshot = TIMES.index(pytest.approx(float(noised.t[b, f])))
            assert torch.equal(noised.x[b, :, f], path[b, snapshot, :, f])
            if snapshot < 4:
                estimate = path[b, snapshot, :, f] - TIMES[snapshot] * v[b, :, f]
                errors.append((estimate - path[b, 4, :, f]).square().mean())
        loss = flow.velocity_loss(v, noised.target, noised.weight)[b]
        expected = torch.stack(errors).mean() if errors else torch.tensor(0.0)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    again = ode.regression(path.flatten(1, 2)[3:4], torch.tensor([3]), chunk, 0, times=TIMES)
    assert torch.equal(again.x[0], noised.x[3])


def test_regression_under_the_true_frames_keeps_them_apart_from_the_path():
    """A causal teacher's path: the last snapshot is the past, never the end; without an image every frame is noisy."""
    stored = _normal(64, 6, 3, 7, 2, 2).float()
    path, true = stored[:, :5], stored[:, 5]
    args = (torch.arange(64), COND.layout.chunk, 0)
    noised = ode.regression(stored.flatten(1, 2), *args, times=TIMES, history=True, image=False)
    plain = ode.regression(path.flatten(1, 2), *args, times=TIMES, image=False)
    assert torch.equal(noised.context, true) and plain.context is None
    for name in ("x", "t", "target", "weight"):
        assert torch.equal(getattr(noised, name), getattr(plain, name))
    assert (noised.t[:, 0] > 0).any() and torch.equal(noised.t[:, 0], noised.t[:, 3])  # one snapshot a chunk
    slope = flow.clean_estimate(noised.x, noised.target, noised.t)
    ends = noised.t > 0
    torch.testing.assert_close(slope.movedim(1, 2)[ends], path[:, -1].movedim(1, 2)[ends], atol=1e-5, rtol=1e-4)


def test_a_causal_teachers_path_is_its_stream_over_the_true_frames():
    """A trajectory in the packed form, chunk by chunk equal to Euler steps from committed true chunks."""
    torch.manual_seed(0)
    model = CausalVideo(in_channels=4, width=32, heads=2, layers=2, ffn_width=64, text_width=16, text_length=4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    cond = Conditioning(Layout.chunked(2, 7, 3), TextStates(_normal(2, 1, 3, 16).float(), torch.ones(2, 1, 3).bool()))
    noise, true, grid = _normal(2, 4, 7, 2, 4).float(), _normal(2, 4, 7, 2, 4, seed=1).float(), sigma_grid(3, 3.0)
    path = ode.trajectory(teacher_forced(model, true), noise, cond, TIMES, grid)
    joined, state = torch.tensor(sorted({*grid.tolist(), *TIMES}, reverse=True), dtype=torch.float64), model.new_state()
    with torch.no_grad():
        for a, b in ((0, 4), (4, 7)):
            part, x = cond.frames(a, b), noise[:, :, a:b]
            for now, after in zip(joined, joined[1:]):
                v, _ = model(x, now.float().expand(2, b - a), part, state)
                x = x + (after - now).float() * v
            torch.testing.assert_close(path[:, -1, :, a:b], x, rtol=1e-4, atol=1e-4)
            _, state = model(true[:, :, a:b], torch.zeros(2, b - a), part, state, commit=True)


def _consistent(x, t):
    """The end of the path through x at t for data N(0, 1/4): deviations scale along it."""
    t = flow.per_frame(t.double())
    return x * 0.5 / ((1 - t).square() * 0.25 + t.square()).sqrt()


@pytest.mark.parametrize("shared", [True, False])
def test_consistency_is_zero_for_the_exact_consistency_function(shared):
    """With the exact velocity as teacher only Euler's error is left: the loss falls with the step's fourth power."""
    data, chunk = 0.5 * _normal(64, 3, 7, 2, 2), COND.layout.chunk

    def student(x, t):  # x - t v is the consistency function
        return (x - _consistent(x, t)) / flow.per_frame(torch.where(t > 0, t, 1.0).double())

    def wrong(x, t):  # takes each point for its own end
        return 0 * x

    def loss(student, noised):
        return float(flow.velocity_loss(student(noised.x, noised.t), noised.target, noised.weight).mean())

    def teacher(x, t):
        return _gaussian(0.5)(x, t, COND)[0]

    losses = []
    for steps in (25, 50, 400):
        settings = {"teacher": teacher, "average": student, "steps": steps, "shift": 5.0, "shared": shared}
        noised = consistency.consistency(data, torch.arange(64), chunk, 0, **settings)
        losses.append(loss(student, noised))
        levels = noised.t[:, [0, 4]]
        assert (levels[:, 0] == levels[:, 1]).all() == shared
        assert torch.equal(noised.context, data) and len(levels.unique()) <= steps and float(levels.max()) <= 1
    assert 8 < losses[0] / losses[1] < 20 and losses[2] < 1e-8
    other = consistency.consistency(data, torch.arange(64), chunk, 0, **{**settings, "average": wrong})
    assert losses[2] < 0.01 * loss(wrong, other)
    # One step from t = 1 ends at t = 0, where the point is its own end whatever the average says.
    settings |= {"steps": 1, "average": lambda x, t: x + 7.0}
    noised = consistency.consistency(data, torch.arange(64), chunk, 0, **settings)
    torch.testing.assert_close(noised.target, teacher(noised.x, noised.t))


def test_matching_loss_moves_samples_by_the_scores_difference():
    sample, fake, real = (_normal(2, 3, 4, 2, 2, seed=i) for i in range(3))
    sample.requires_grad_()
    frames = torch.tensor([[False, True, True, True]] * 2)
    dmd.matching_loss(sample, fake, real, frames).sum().backward()
    valid = flow.per_frame(frames)
    for b in range(2):
        distance = (sample[b] - real[b]).abs()[:, 1:].mean()
        expected = (fake[b] - real[b]) / distance * valid[b]
        # The loss averages over the 3 frames' 12 numbers each.
        torch.testing.assert_close(sample.grad[b] * 36, expected.detach(), rtol=1e-5, atol=1e-6)


def test_matching_pulls_a_gaussian_to_the_teachers():
    """Samples N(a, s) against a teacher N(1, 0.5) with exact scores: mean and deviation are found."""
    torch.manual_seed(0)
    mean, log_std = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.05)

    def clean(x, t, m, s):  # E[x0 | x_t] of N(m, s^2)
        gain = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
        return m + gain * (x - (1 - t) * m)

    for _ in range(200):
        sample = mean + log_std.exp() * torch.randn(64, 1, 2, 2, 2)
        t = torch.rand(64, 2).clamp(0.02, 0.98)
        x = flow.interpolate(sample.detach(), torch.randn_like(sample), t)
        fake = clean(x, flow.per_frame(t), mean.detach(), log_std.detach().exp())
        real = clean(x, flow.per_frame(t), 1.0, 0.5)
        optimizer.zero_grad()
        dmd.matching_loss(sample, fake, real, torch.ones(64, 2).bool()).mean().backward()
        optimizer.step()
    assert abs(mean.item() - 1.0) < 0.1 and abs(log_std.exp().item() - 0.5) < 0.1


def test_score_times_are_shifted_bounded_and_clean_at_the_first_frame():
    t = dmd.score_times(torch.arange(500), 3, 0, 10.0, "x")
    assert torch.equal(t[:, 0], torch.zeros(500)) and torch.equal(t[:, 1], t[:, 2])
    assert float(t[:, 1].min()) >= 0.02 and float(t[:, 1].max()) < 0.98001 and float(t[:, 1].mean()) > 0.7


GDN_ONLY = ("beta_proj", "gate_proj", "A_log", "dt_bias", "conv_k")
SMALL = {"in_channels": 4, "width": 32, "heads": 2, "layers": 2, "text_width": 16, "raw_frames": 4}


def _tensors(seed, **changes):
    torch.manual_seed(seed)
    model = WorldModel(**{**SMALL, **changes})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.state_dict()


@pytest.mark.parametrize(
    "steps, old, new, fresh",
    [
        ([], {}, {}, ()),
        (["latents"], {}, {"in_channels": 6}, ("x_embedder", "final_linear")),
        (["gdn"], {"mixer": "linear", "softmax_every": 0}, {"softmax_every": 0}, GDN_ONLY),
        (["softmax"], {"softmax_every": 0}, {"softmax_every": 2}, ()),
    ],
    ids=str,
)
def test_surgery_keeps_everything_else(steps, old, new, fresh):
    stored, own = _tensors(0, **old), _tensors(1, **new)
    result = surgery.convert(stored, own, steps)
    assert result.keys() == own.keys()
    for name, tensor in result.items():
        begins_anew = any(part in name for part in fresh)
        assert torch.equal(tensor, own[name] if begins_anew else stored[name]), name
    if steps:
        with pytest.raises(ValueError, match="surgery="):
            surgery.convert(stored, own, [])


def test_the_camera_branch_starts_as_the_main_one_without_effect():
    own, stored = _tensors(0, softmax_every=2), _tensors(1, softmax_every=2)
    result = surgery.convert(stored, own, ["camera"])
    block = "blocks.0.attn"
    for name in ("qkv{}.weight", "q_norm{}.weight", "k_norm{}.weight", "conv_k{}"):
        assert torch.equal(result[f"{block}.{name.format('_cam')}"], stored[f"{block}.{name.format('')}"])
    for name in (f"{block}.qkv_cam.bias", f"{block}.out_proj_cam.weight", "plucker_embedder.weight"):
        assert not result[name].any()
    assert torch.equal(result["blocks.0.plucker_proj.weight"], own["blocks.0.plucker_proj.weight"])
    with pytest.raises(ValueError, match="surgery=lens: choose from latents"):
        surgery.convert(stored, own, ["lens"])


def test_fresh_gates_continue_linear_attention():
    """A gated delta model converted from linear attention starts close to it (spec 3.2): gates near one, no filter."""
    torch.manual_seed(0)
    linear = WorldModel(**SMALL, mixer="linear", softmax_every=0)
    torch.nn.init.normal_(linear.final_linear.weight, std=0.2)
    grown = WorldModel(**SMALL, softmax_every=0)
    grown.load_state_dict(surgery.convert(linear.state_dict(), grown.state_dict(), ["gdn"]))
    other = WorldModel(**SMALL, softmax_every=0)
    torch.nn.init.normal_(other.final_linear.weight, std=0.2)
    text = TextStates(_normal(1, 1, 3, 16).float(), torch.ones(1, 1, 3).bool())
    x, t = _normal(1, 4, 5, 3, 4).float(), torch.full((1, 5), 0.5)
    with torch.no_grad():
        a, b, c = (m(x, t, Conditioning(Layout.whole(1, 5), text))[0] for m in (linear, grown, other))
    assert (a - b).norm() < 0.05 * a.norm() < 0.5 * (a - c).norm()
