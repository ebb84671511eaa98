"""Stages, history slots, staged sampling and the objective against closed forms."""

import dataclasses
import functools

import pytest
import torch
from tiny_helios import conditioning, helios

from vgr.diffusion import pyramid
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import frame_noise
from vgr.models.helios import Helios
from vgr.models.text import ByteTextEncoder
from vgr.training.staged import StagedTraining
from vgr.types import Cameras, Layout, VideoBatch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_block_noise_has_its_covariance(gamma):
    noise = pyramid.block_noise(normal(1, 1, 100, 128, 128), gamma)
    cells = noise.view(100, 64, 2, 64, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4)
    expected = (1 + gamma) * torch.eye(4) - gamma
    assert (cells.T @ cells / len(cells) - expected).abs().max() < 0.01


def test_stages_meet():
    """What a stage ends with, enlarged and noised, has the mean and variance the next one starts with."""
    stages, clean, noise = pyramid.Stages(3), normal(1, 1, 64, 64, 64) * 0 + 1.5, normal(1, 1, 64, 64, 64, seed=1)
    for stage in (1, 2):
        _, end = stages.path(clean, noise, stage - 1)
        alpha, beta = stages.renoise(stage)
        white = normal(*stages.path(clean, noise, stage)[0].shape, seed=stage + 1)
        entered = alpha * end.repeat_interleave(2, -1).repeat_interleave(2, -2) + beta * pyramid.block_noise(white)
        start, _ = stages.path(clean, noise, stage)
        assert float(entered.mean() - start.mean()) == pytest.approx(0, abs=0.03)
        assert float(entered.std() / start.std()) == pytest.approx(1, abs=0.02)
        cells = entered.unflatten(-1, (-1, 2))
        assert abs((cells[..., 0] * cells[..., 1]).mean() - entered.mean() ** 2) < 0.02  # white: neighbours are unlike
    start, _ = stages.path(clean, noise, 0)
    assert torch.equal(start, pyramid.halved(noise, 2) * 4)
    assert torch.equal(stages.path(clean, noise, 2)[1], clean)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_perfect_denoiser_ends_at_the_clean_latents(distilled):
    clean, seen = normal(1, 4, 9, 8, 16), []
    stages = pyramid.Stages(3)

    def oracle(x, t, cond, state=None, *, commit=False):
        end = stages.ends(cond.stage)[1]
        known = pyramid.halved(clean, 2 - cond.stage)
        mix = known + end * (normal(*known.shape, seed=3) - known)
        seen.append((cond.stage, float(t[0, 0])))
        return (x - mix) / t[:, None, :, None, None], None

    made = pyramid.pyramid(oracle, frame_noise([1], (4, 8, 16)), conditioning(1), (2, 2, 2), distilled=distilled)
    torch.testing.assert_close(made, clean, atol=1e-4, rtol=1e-4)
    assert [stage for stage, _ in seen] == [0, 0, 1, 1, 2, 2]
    assert [t for _, t in seen][:2] == pytest.approx([0.999, 0.5 if distilled else 0.001], abs=1e-4)


def test_evidence_reaches_the_first_stage_only():
    model, noise, cond = helios(), frame_noise([1], (16, 8, 16)), conditioning(1, history=())
    shown = pyramid.HistoryBlock(normal(1, 16, 9, 8, 16), cond.layout.position, "short")
    told = dataclasses.replace(cond, history=(shown,))
    inputs = {}

    def watched(name):
        def call(x, t, cond, state=None, *, commit=False):
            inputs[name, cond.stage] = (x, len(cond.history))
            return model(x, t, cond) if cond.stage else (0 * x, None)

        return call

    plain = pyramid.pyramid(watched("plain"), noise, cond, (1, 1, 1))
    coarse = (watched("coarse"), told)
    assert torch.equal(pyramid.pyramid(watched("plain"), noise, cond, (1, 1, 1), coarse=coarse), plain)
    assert inputs["coarse", 0][1] == 1 and inputs["plain", 1][1] == inputs["plain", 2][1] == 0
    assert ("coarse", 1) not in inputs
    pyramid.pyramid(watched("plain"), noise, cond, (1, 1, 1), coarse=coarse, shown=2)
    assert ("coarse", 1) in inputs and ("coarse", 2) not in inputs


def test_history_slots():
    past = normal(1, 2, 30, 8, 16)
    blocks = {b.tier: b for b in pyramid.history_blocks(past, 30, past[:, :, :1])}
    assert {k: b.position.tolist() for k, b in blocks.items()} == {
        "prefix": [0], "short": [29], "mid": [27, 28], "long": list(range(11, 27)),
    }  # fmt: skip
    assert all(torch.equal(b.latents, past[:, :, b.position]) for b in blocks.values())
    blocks = {b.tier: b for b in pyramid.history_blocks(past[:, :, :6], 6, past[:, :, :1])}
    assert torch.equal(blocks["long"].latents[:, :, -3:], past[:, :, :3])
    assert not blocks["long"].latents[:, :, :-3].any()
    left = {b.tier: b for b in pyramid.history_blocks(past[:, :, :6], 6, past[:, :, :1], fill=False)}
    assert left["long"].keep.flatten().tolist() == [False, False, False, True] and left["mid"].keep is None
    one = past[:, :, :1]
    assert [b.tier for b in pyramid.history_blocks(one, 1, one, fill=False)] == ["prefix", "short"]
    assert pyramid.history_blocks(past[:, :, :0], 0, fill=False) == ()
    assert all(not b.latents.any() for b in pyramid.history_blocks(past[:, :, :0], 0))
    for fill in (True, False):  # the model takes what is made
        cond = conditioning(1, first=6, history=pyramid.history_blocks(normal(1, 16, 6, 8, 16), 6, fill=fill))
        assert helios()(normal(1, 16, 9, 2, 4), torch.full((1, 9), 0.5), cond)[0].isfinite().all()


def test_streaming_is_chunk_by_chunk_from_the_first_frame():
    model, noise = helios(), frame_noise([1], (16, 8, 16))
    text, first = conditioning(1).text, normal(1, 16, 1, 8, 16)
    cond = pyramid.Conditioning(Layout.chunked(1, 9, 4), text)
    told = []

    def coarse(x, t, part, state=None):
        told.append(part)
        return model(x, t, part)

    def streamed(first=None, history=(), **changes):
        denoiser = pyramid.Streamed(model, noise, (1, 1), **changes)
        given = dataclasses.replace(cond, history=history)
        chunks = stream(denoiser, denoiser.new_state(), given, torch.tensor([1.0, 0.0]), noise, first)
        return [latents for latents, _ in chunks]

    made = streamed(first)
    assert [x.shape[2] for x in made] == [5, 4] and torch.equal(made[0][:, :, :1], first)
    past = made[0]
    again = dataclasses.replace(cond.frames(5, 9), history=pyramid.history_blocks(past, 5, first))
    torch.testing.assert_close(pyramid.pyramid(model, noise, again, (1, 1)), made[1], rtol=0, atol=1e-5)
    assert [x.shape[2] for x in streamed()] == [5, 4]
    assert all(torch.equal(a, b) for a, b in zip(streamed(first, coarse=coarse), made)) and not told
    shown = pyramid.HistoryBlock(normal(1, 16, 4, 8, 16, seed=9), torch.arange(5, 9))
    other = streamed(first, (shown,), coarse=coarse)
    assert [p.layout.position.tolist() for p in told] == [[1, 2, 3, 4], [5, 6, 7, 8]] and {p.stage for p in told} == {0}
    tiers = ["prefix", "short", "mid", "long"]  # empty slots are left out, evidence stands last
    assert [[b.tier for b in p.history] for p in told] == [["prefix", "short", "short"], [*tiers, "short"]]
    assert not torch.allclose(other[1], made[1], atol=1e-3)


def test_a_first_chunk_takes_twice_the_steps_if_amplified():
    model, noise, seen = helios(), frame_noise([1], (16, 8, 16)), []

    def watched(x, t, part, state=None):
        seen.append((int(part.layout.position[0]), part.stage, round(float(t[0, 0]), 4)))
        return model(x, t, part)

    cond = pyramid.Conditioning(Layout.chunked(1, 18, 9, clips=True), conditioning(1).text)
    denoiser = pyramid.Streamed(watched, noise, (1, 2, 1), distilled=True, amplified=True)
    list(stream(denoiser, denoiser.new_state(), cond, torch.tensor([1.0, 0.0]), noise))
    assert [at for at, *_ in seen] == [0] * 8 + [9] * 4
    assert [t for at, stage, t in seen if (at, stage) == (0, 1)] == [0.999, 0.7495, 0.5, 0.2505]  # spec 1.4
    assert [t for at, stage, t in seen if (at, stage) == (9, 1)] == [0.999, 0.5]


def test_an_image_is_history_of_clips_and_standing_still_of_the_first_alone_beside_evidence():
    """Helios' slots (spec 1.2, 2.6): prefix and short tier of chunk 0; in chunk 1 evidence stands beside own frames."""
    model, noise, told, made = helios(), frame_noise([1], (16, 8, 16)), {}, []
    image, still = normal(1, 16, 1, 8, 16), normal(1, 16, 1, 8, 16, seed=1)

    def watched(name):
        def call(x, t, part, state=None):
            told.setdefault((name, int(part.layout.position[0])), {b.tier: b for b in part.history})
            return model(x, t, part)

        return call

    cond = pyramid.Conditioning(Layout.chunked(1, 18, 9, clips=True), conditioning(1).text)
    shown = pyramid.HistoryBlock(normal(1, 16, 9, 8, 16, seed=9), torch.arange(9), "mid")
    denoiser = pyramid.Streamed(watched("plain"), noise, (1, 1), coarse=watched("coarse"))
    state = denoiser.new_state(image, still)
    for a in (0, 9):
        part = dataclasses.replace(cond.frames(a, a + 9), history=(shown,))
        latents, state = next(stream(denoiser, state, part, torch.tensor([1.0, 0.0]), noise))
        made.append(latents)
    made = made[0]
    first, plain, later = told["coarse", 0], told["plain", 9], told["coarse", 9]
    assert torch.equal(first["prefix"].latents, image) and torch.equal(first["short"].latents, still)
    assert first["short"].position.tolist() == [-1] and "long" not in first
    assert all(torch.equal(part["prefix"].latents, image) for part in (plain, later))
    assert torch.equal(plain["long"].latents[:, :, -7:], torch.cat([still, made[:, :, :6]], 2))
    assert torch.equal(later["long"].latents[:, :, -6:], made[:, :, :6]) and not later["long"].latents[:, :, :-6].any()
    assert later["long"].keep.flatten().tolist() == [False, False, True, True]


def test_streaming_refuses_what_it_cannot_make():
    noise = frame_noise([1], (16, 8, 16))
    denoiser = pyramid.Streamed(helios(), noise, (1, 1))
    cond = pyramid.Conditioning(Layout.chunked(1, 9, 4).frames(0, 5), conditioning(1).text)
    x, t = normal(1, 16, 5, 8, 16), torch.ones(1, 5)
    with pytest.raises(ValueError, match="sigmas \\[1, 0\\]"):
        denoiser(x, 0.5 * t, cond, denoiser.new_state())
    with pytest.raises(ValueError, match="chunks come in order"):
        denoiser(x, t, cond)


def objective(latents, positions, **changes):
    settings = {"global_batch": 4, "ratio": (1, 1), **changes}
    chunk = Layout.chunked(1, latents.shape[2], 4).chunk
    return pyramid.pyramid_flow(latents, torch.tensor(positions), chunk, 3, **settings)


def test_the_objective_is_a_function_of_position():
    latents = normal(4, 2, 9, 8, 8)
    whole = objective(latents, [4, 5, 6, 7])
    for rows in ([0, 1], [2, 3]):
        part = objective(latents[rows], [4 + r for r in rows])
        assert (part.stage, part.frames) == (whole.stage, whole.frames)
        for name in ("x", "t", "target"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
        for mine, all_ in zip(part.history, whole.history):
            assert torch.equal(mine.latents, all_.latents[rows]) and torch.equal(mine.position, all_.position)
    with pytest.raises(ValueError, match=r"global batches \[0, 1\]"):
        objective(latents, [2, 3, 4, 5])


def test_the_objective_of_clips_begins_from_an_image_standing_still():
    """Both chunks whole; the first behind the still latent and the clip's first frame, with the image's noise."""
    latents, still, seen = normal(4, 2, 18, 8, 8), normal(4, 2, 1, 8, 8, seed=5), set()
    chunk = Layout.chunked(1, 18, 9, clips=True).chunk
    for batch in range(12):
        positions = torch.arange(4 * batch, 4 * batch + 4)
        noised = pyramid.pyramid_flow(latents, positions, chunk, 3, global_batch=4, ratio=(1, 0), text=0.0, fill=False,
                                      corruption=0.0, still=still, image_noise=(0.111, 0.135))  # fmt: skip
        seen.add(noised.frames)
        tiers = {b.tier: b for b in noised.history}
        dirty = tiers["prefix"].latents - latents[:, :, :1]
        assert 0.08 < float(dirty.std()) < 0.2
        if noised.frames == (0, 9):
            assert tiers["short"].position.tolist() == [-1] and set(tiers) == {"prefix", "short"}
            assert 0.08 < float((tiers["short"].latents - still).std()) < 0.2
        else:
            assert torch.equal(tiers["short"].latents, latents[:, :, 8:9])
    assert seen == {(0, 9), (9, 18)}


def test_the_objective_draws_stages_chunks_and_corruption():
    latents = normal(4, 2, 9, 8, 8)
    seen, noisy = [], []
    for batch in range(200):
        noised = objective(latents, range(4 * batch, 4 * batch + 4), ratio=(1, 3))
        a, b = noised.frames
        size = (8, 8) if noised.stage else (4, 4)
        assert noised.x.shape == noised.target.shape == (4, 2, b - a, *size) and noised.t.shape == (4, b - a)
        seen.append((noised.stage, a, b))
        stages = pyramid.Stages(2)
        end = noised.x - noised.t[:, None, :, None, None] * noised.target
        if noised.stage:
            torch.testing.assert_close(end, latents[:, :, a:b], atol=1e-5, rtol=1e-5)
        short = next(x for x in noised.history if x.tier == "short").latents
        if a:
            noisy.append((short - latents[:, :, a - 1 : a]).flatten(1).abs().amax(1) > 1e-6)
        else:
            assert not any(block.latents.any() for block in noised.history)
    assert {s[1:] for s in seen} == {(0, 5), (1, 5), (5, 9)}
    assert 0.65 < sum(s[0] for s in seen) / 200 < 0.85 and stages.count == 2
    assert 0.85 < torch.cat(noisy).float().mean() < 0.95


class _Codec:
    stride, clip = (4, 8, 8), None


def test_training_learns_to_use_history():
    """Clips that stand still: what comes is what was."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options = {"ffn_dim": 64, "rope_dim": [8, 4, 4]}
    model = Helios(4, 16, 2, 16, 2, options, text_length=8, stage_times=(999.0, 571.428, 0.999), truncate_times=False)
    run = functools.partial(pyramid.pyramid_flow, global_batch=8, ratio=(1, 1), text=0.0)
    training = StagedTraining(
        model, ByteTextEncoder(16, 8, 1, 2), _Codec(), seed=1, global_batch=8, max_samples=800, objective=run, chunk=4,
        text_dropout=0.0, validation_levels=(0.5, 0.9),
    )  # fmt: skip

    def batch(start, clips=8):
        still = torch.cat([normal(1, 4, 1, 1, 1, seed=start + i) for i in range(clips)]).expand(-1, -1, 9, 8, 8)
        eye = torch.eye(4).expand(clips, 33, 4, 4)
        own = Cameras(eye, torch.ones(clips, 33, 4))
        names = tuple(str(start + i) for i in range(clips))
        shot = torch.zeros(clips, 9, dtype=torch.int64)
        position = torch.arange(start, start + clips)
        return VideoBatch(still.contiguous(), own, torch.ones(clips), (("a",),) * clips, shot, names, position)

    optimizer = torch.optim.AdamW(training.model.parameters(), 5e-3)
    for step in range(120):
        loss = training._sample_losses(batch(8 * step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    training.ema["model"].load_state_dict(training.model.state_dict())
    found = training.validate([batch(10_000), batch(10_008)]).metrics()
    assert found["val/gain_over_shuffled_history_low"] > 0.1 and found["val/gain_over_no_history_low"] > 0.05
    assert {"val/loss", "val/loss_stage0", "val/loss_stage1", "val/loss_t0.5", "val/clips"} <= found.keys()
