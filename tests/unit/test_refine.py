"""Refining latents in few steps, whole and streaming, and training for it: against exact velocities and toy pairs."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
from tests.unit.tiny_refiner import CHANNELS, FPS, SIZES, TARGETS, TINY, TOKENS, inputs, refiner, save_transformer
from vgr.diffusion import flow, refine
from vgr.diffusion.objectives import refinement
from vgr.models.refiner import Refiner
from vgr.nn import lora
from vgr.seeding import normal_like
from vgr.types import Cameras, Conditioning, Layout, TextStates, VideoBatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refiner")
    save_transformer(folder)
    return folder


class _Exact:
    """The velocity towards known latents, whatever the start; records the calls."""

    def __init__(self, clean):
        self.clean, self.calls = clean, []

    def new_state(self):
        return 0

    def __call__(self, x, t, cond, state=None, *, commit=False):
        position = cond.layout.position
        self.calls.append((position.tolist(), cond.layout.chunk.tolist(), t[0].tolist(), commit))
        clean, t = self.clean[:, :, position], t[:, None, :, None, None]
        v = torch.where(t > 0, (x - clean) / t.clamp_min(1e-9), 7.0)
        return v, state + commit if state is not None else None


def test_bidirectional_refinement_keeps_the_sink_and_walks_the_sigmas(folder):
    x, _, cond = inputs(6)
    exact = _Exact(torch.randn(x.shape))
    refined = refine.refine(exact, x, cond.text)
    assert torch.equal(refined[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(refined[:, :, 1:], exact.clean[:, :, 1:])
    for sigma, (position, chunk, t, _) in zip(refine.SIGMAS[:3], exact.calls, strict=True):
        assert position == [*range(6)] and chunk == [0] * 6
        assert t == pytest.approx([0, *[sigma] * 5])


def test_bidirectional_refinement_is_the_released_loop(folder):
    """Three steps written out: x0 = x - sigma v, then (sigma' / sigma) x + (1 - sigma' / sigma) x0."""
    model = refiner(folder)
    x, _, cond = inputs(5)
    refined = refine.refine(model, x, cond.text, seed=42)
    z = refine._noised(x, 42, 0.909375, cond.layout.position, 0)
    for sigma, following in zip(refine.SIGMAS, refine.SIGMAS[1:]):
        z[:, :, 0] = x[:, :, 0]
        t = torch.tensor([0.0, *[sigma] * 4]).expand(2, -1)
        with torch.no_grad():
            clean = z - t[:, None, :, None, None] * model(z, t, cond)[0]
        z = following / sigma * z + (1 - following / sigma) * clean
    torch.testing.assert_close(refined[:, :, 1:], z[:, :, 1:], atol=1e-5, rtol=1e-4)
    assert (refine.refine(model, x, cond.text, seed=43) - refined)[:, :, 1:].abs().max() > 1e-3


def test_streaming_refines_each_piece_as_it_comes(folder):
    x, _, cond = inputs(10)
    exact = _Exact(torch.randn(x.shape))
    asked = []

    def pieces():
        for piece in x.split([4, 3, 3], dim=2):
            asked.append(len(exact.calls))
            yield piece

    refined = torch.cat(list(refine.refine_stream(exact, pieces(), cond.text)), dim=2)
    assert torch.equal(refined[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(refined[:, :, 1:], exact.clean[:, :, 1:])
    assert asked == [0, 4, 8]
    steps = [(s, False) for s in refine.SIGMAS[:3]] + [(0.0, True)]
    assert [(round(t[-1], 6), commit) for *_, t, commit in exact.calls] == steps * 3
    assert all(t[0] == 0 for *_, t, _ in exact.calls[:4])
    assert [c[:2] for c in exact.calls[3::4]] == [([0, 1, 2, 3], [0] * 4), ([4, 5, 6], [1] * 3), ([7, 8, 9], [2] * 3)]


def test_streaming_and_whole_refinement_share_their_noise_and_first_block(folder):
    """With one block both are the same computation, and so is the sink in a piece of its own."""
    x, _, cond = inputs(4)
    model = refiner(folder)
    whole = refine.refine(model, x, cond.text)
    (streamed,) = refine.refine_stream(model, [x], cond.text)
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-4)
    pieces = torch.cat(list(refine.refine_stream(model, [x[:, :, :1], x[:, :, 1:]], cond.text)), dim=2)
    torch.testing.assert_close(pieces, streamed, atol=1e-5, rtol=1e-4)


def _pairs(positions, frames=4):
    """Blurred and sharp latents of still scenes that share a pattern and differ in contrast."""
    pattern = torch.randn(CHANNELS, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    contrast = 1 + 0.3 * normal_like(torch.empty(len(positions), 1, 1, 1, 1), 0, "contrast", positions)
    high = (contrast * pattern).expand(-1, -1, frames, -1, -1)
    low = F.avg_pool3d(high, (1, 2, 2)).repeat_interleave(2, 3).repeat_interleave(2, 4)
    return torch.cat([low, high], dim=1)


def test_objective_follows_the_paper():
    positions, chunk = torch.arange(400), torch.zeros(3)
    pairs, start = _pairs(positions, 3), 0.909375
    noised = refinement(pairs, positions, chunk, 3, shift=4.0)
    low, high = pairs.chunk(2, dim=1)
    noise = normal_like(high, 3, "noise", positions)
    sigma = noised.t[:, 1]
    assert torch.equal(noised.t, torch.stack([0 * sigma, sigma, sigma], 1))
    assert torch.equal(noised.weight, noised.t.sign())
    assert sigma.min() > 0 and 0.9 < sigma.max() <= start
    # Below the cut the logit is normal around log(shift): its distribution function against the one of the draws.
    level = torch.tensor([0.3, 0.5, 0.7, 0.8, 0.9], dtype=torch.float64)
    cdf = torch.special.ndtr(level.logit() - math.log(4.0))
    cdf = cdf / torch.special.ndtr(torch.tensor(start, dtype=torch.float64).logit() - math.log(4.0))
    torch.testing.assert_close((sigma[:, None] <= level).double().mean(0), cdf, atol=0.06, rtol=0)
    x1 = (1 - start) * low + start * noise
    alpha = (noised.t / start)[:, None, :, None, None]
    torch.testing.assert_close(noised.x, (1 - alpha) * high + alpha * x1)
    torch.testing.assert_close(noised.target, (x1 - high) / start)
    assert torch.equal(noised.x[:, :, 0], high[:, :, 0])
    alone = refinement(pairs[7:8], positions[7:8], chunk, 3, shift=4.0)
    assert torch.equal(alone.x[0], noised.x[7])
    # x - sigma v is x_h from anywhere on the path, and so is the end of the sampler's three steps from x_1.
    torch.testing.assert_close(flow.clean_estimate(noised.x, noised.target, noised.t), high, atol=1e-5, rtol=1e-4)
    x = x1
    for sigma, following in zip(refine.SIGMAS, refine.SIGMAS[1:]):
        x = x + (following - sigma) * noised.target
    torch.testing.assert_close(x, high, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels,frames", [(3, 2), (4, 1)])
def test_objective_refuses_what_is_no_pair_with_a_reference(channels, frames):
    with pytest.raises(ValueError, match=rf"pairs on channels.*\(1, {channels}, {frames}, 2, 2\)"):
        refinement(torch.zeros(1, channels, frames, 2, 2), torch.zeros(1), torch.zeros(frames), 0, shift=1.0)


def test_training_on_pairs_sharpens_held_out_ones():
    torch.manual_seed(0)
    model = Refiner(**SIZES)
    batch, held = 8, torch.arange(1000, 1008)
    text = TextStates(torch.zeros(batch, 1, TOKENS, TINY["caption_channels"]), torch.ones(batch, 1, TOKENS).bool())
    cond = Conditioning(Layout.whole(batch, 4), text)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss(positions, seed=1):
        noised = refinement(_pairs(positions), positions, cond.layout.chunk, seed, shift=3.0)
        v, _ = model(noised.x, noised.t, cond)
        return flow.velocity_loss(v, noised.target, noised.weight).mean()

    before = loss(held).item()
    for step in range(60):
        optimizer.zero_grad()
        loss(torch.arange(batch) + batch * step).backward()
        optimizer.step()
    assert loss(held).item() < 0.3 * before
    low, high = _pairs(held).chunk(2, dim=1)
    stage1 = torch.cat([high[:, :, :1], low[:, :, 1:]], dim=2)
    refined = refine.refine(model, stage1, text)
    errors = [(z - high)[:, :, 1:].square().mean().sqrt().item() for z in (stage1, refined)]
    assert errors[1] < 0.6 * errors[0]


def test_world_model_training_takes_the_refiner_and_its_objective(folder):
    """Reference frame, pairs and adapters through the house's own training step."""
    pytest.importorskip("pytorch_lightning")
    from vgr.training.world_model import WorldModelTraining

    positions, raw = torch.tensor([3, 9]), 1 + 3 * 8
    told = TextStates(torch.randn(2, 1, TOKENS, 10), torch.ones(2, 1, TOKENS, dtype=torch.bool))

    class Told(torch.nn.Module):
        def forward(self, captions):
            return told

    cameras = Cameras(torch.eye(4).expand(2, raw, 4, 4), torch.full((2, raw, 4), 0.5))
    clip = dict(fps=torch.full((2,), FPS), captions=(("a",), ("b",)), shot=torch.zeros(2, 4, dtype=torch.int64))
    batch = VideoBatch(latents=_pairs(positions), cameras=cameras, keys=("a", "b"), position=positions, **clip)
    model = refiner(folder)
    lora.add(model, 2, 2, TARGETS)
    module = WorldModelTraining(
        model, Told(), SimpleNamespace(stride=(8, 32, 32)), seed=5, global_batch=2, max_samples=2,
        objective=functools.partial(refinement, shift=7.8),
    )  # fmt: skip
    loss = module.training_step(batch, 0)
    noised = refinement(batch.latents, positions, torch.zeros(4), 5, shift=7.8)
    v, _ = model(noised.x, noised.t, Conditioning(Layout.whole(2, 4), told))
    torch.testing.assert_close(loss, (v - noised.target)[:, :, 1:].square().mean())
    loss.backward()
    trained = [p for group in module.configure_optimizers().param_groups for p in group["params"]]
    assert len(trained) == 2 * 2 * 10 and all(p.grad is not None for p in trained)  # A and B, two blocks, ten layers
