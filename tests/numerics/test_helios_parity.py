"""Helios and its pyramid against diffusers' classes, random weights, fp32: forward, schedules, whole samples."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vgr.diffusion import pyramid
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import frame_noise
from vgr.models import helios as names
from vgr.models.helios import Helios
from vgr.training import rebuild
from vgr.types import Conditioning, Layout, TextStates

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from tiny_helios import conditioning, helios  # noqa: E402


def padded(cond):
    return cond.text.states[:, 0] * cond.text.mask[:, 0, :, None]


@pytest.mark.parametrize("stage,size,time", [(0, (2, 4), 999), (1, (4, 8), 743), (2, (8, 16), 385)])
def test_forward_is_diffusers_own(tmp_path, stage, size, time):
    """The indices, times and tiers of its pipeline; weights come from a folder that its class wrote."""
    theirs = helios().transformer
    theirs.save_pretrained(tmp_path / "port")
    ours = Helios.from_pretrained(tmp_path / "port", text_length=6)
    g = torch.Generator().manual_seed(2)
    past, x = torch.randn(2, 16, 30, 8, 16, generator=g), torch.randn(2, 16, 9, *size, generator=g)
    blocks = pyramid.history_blocks(past, 40, past[:, :, :1])
    cond = conditioning(stage=stage, history=blocks)
    v, state = ours(x, torch.full((2, 9), 0.999), cond)
    long, mid, short = past[:, :, -19:].split([16, 2, 1], dim=2)
    index = torch.arange(29)[None]
    expected = theirs(
        x, torch.tensor([time, time]), padded(cond), indices_hidden_states=index[:, 20:],
        indices_latents_history_short=index[:, [0, 19]], indices_latents_history_mid=index[:, 17:19],
        indices_latents_history_long=index[:, 1:17], latents_history_short=torch.cat([past[:, :, :1], short], 2),
        latents_history_mid=mid, latents_history_long=long, return_dict=False,
    )[0]  # fmt: skip
    assert torch.equal(v, expected) and state is None
    assert not torch.equal(v, ours(x, torch.full((2, 9), 0.5), cond)[0])


def test_folders_go_both_ways(tmp_path):
    from diffusers import HeliosTransformer3DModel

    ours = helios(stage_times=(999.0, 571.428, 0.999), truncate_times=False)
    ours.save_pretrained(tmp_path / "ours")
    again = Helios.from_pretrained(tmp_path / "ours")
    theirs = HeliosTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config and rebuild.read(tmp_path / "ours")[0]["model"]["class"] == "Helios"
    for model in (again.transformer, theirs):
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in ours.transformer.state_dict().items())
    text = (tmp_path / "ours" / "config.json").read_text()
    config = {**json.loads(text), "zero_history_timestep": False}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="zero_history_timestep"):
        Helios.from_pretrained(tmp_path / "ours")


def test_bfloat16_keeps_what_the_port_keeps_exact(tmp_path):
    from diffusers import HeliosTransformer3DModel

    helios().save_pretrained(tmp_path / "m")
    ours = Helios.from_pretrained(tmp_path / "m", dtype="bfloat16")
    theirs = HeliosTransformer3DModel.from_pretrained(tmp_path / "m", torch_dtype=torch.bfloat16)
    kinds = {k: v.dtype for k, v in theirs.state_dict().items()}
    assert {k: v.dtype for k, v in ours.transformer.state_dict().items()} == kinds
    assert len(set(kinds.values())) == 2
    x = torch.randn(1, 16, 9, 2, 4)
    cond = conditioning(1, history=pyramid.history_blocks(torch.randn(1, 16, 20, 8, 16), 40))
    assert ours(x, torch.full((1, 9), 0.5), cond)[0].isfinite().all()


def test_released_size():
    with torch.device("meta"):
        model = Helios()
    count = sum(p.numel() for p in model.parameters())
    assert count == 14_312_427_584
    config, _ = names.to_diffusers(model.config, {})
    assert names.from_diffusers(config, {})[0]["options"] == {}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["HeliosDMDScheduler", "HeliosScheduler"])
def test_schedules_are_diffusers_own(kind, count):
    import diffusers

    extra = {"scheduler_type": "euler"} if kind == "HeliosScheduler" else {}
    theirs = getattr(diffusers, kind)(stages=count, stage_range=[k / count for k in range(count + 1)], **extra)
    stages, distilled = pyramid.Stages(count), kind == "HeliosDMDScheduler"
    model = Helios(**{"heads": 1, "head_dim": 12, "layers": 0}, options={"rope_dim": [4, 4, 4]}, truncate_times=False,
                   stage_times=stages.times())  # fmt: skip
    for k in range(count):
        assert stages.ends(k) == pytest.approx((theirs.start_sigmas[k], theirs.end_sigmas[k]), abs=1e-12)
        for steps in (1, 2, 4, 10):
            theirs.set_timesteps(steps, k)
            ours = pyramid.local_sigmas(steps, distilled)
            assert ours == pytest.approx(theirs.sigmas.tolist(), abs=1e-12)
            times = model._time(torch.tensor(ours[:-1])[:, None], k)
            assert times.tolist() == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    if count == 3:
        assert stages.times() == pytest.approx(names.STAGE_TIMES, abs=1e-9)
        for k, alpha, beta in ((1, 0.6001, 0.6926), (2, 0.7498, 0.4333)):
            assert stages.renoise(k) == pytest.approx((alpha, beta), abs=1e-4)


def test_dynamic_shift_is_diffusers_own():
    from diffusers import HeliosDMDScheduler

    theirs = HeliosDMDScheduler(use_dynamic_shifting=True)
    for k, tokens in enumerate((540, 2160, 8640)):
        mu = pyramid.dynamic_shift(4 * tokens)
        theirs.set_timesteps(2, k, mu=mu)
        assert mu == pytest.approx((0.548, 0.822, 1.919)[k], abs=1e-3)
        assert pyramid.local_sigmas(2, True, mu) == pytest.approx(theirs.sigmas.tolist(), abs=1e-12)


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("distilled", [True, False])
def test_two_chunks_equal_the_pipeline(distilled, image):
    """3 stages, the same noise, history filled. T2V: the first latent frame made becomes the prefix. I2V: the image is,
    and a latent of it standing still is the short tier's."""
    from diffusers import AutoencoderKLWan, HeliosDMDScheduler, HeliosPyramidPipeline, HeliosScheduler

    model, steps = helios(), (2, 1, 2)
    model.text_length = 6
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = HeliosDMDScheduler() if distilled else HeliosScheduler(scheduler_type="euler")
    pipe = HeliosPyramidPipeline(None, None, vae, scheduler, model.transformer, is_distilled=distilled)
    pipe.set_progress_bar_config(disable=True)
    noise = frame_noise([7], (16, 16, 16))
    starts, blocks, made = [], [], []

    def start(*args, **kwargs):
        starts.append(torch.arange(9) + 9 * len(starts))
        return noise(starts[-1], 0)

    def between(batch, channels, frames, height, width, *args):
        stage = 1 + len(blocks) % 2
        blocks.append(stage)
        times = 2 - stage
        return pyramid.block_noise(pyramid.halved(noise(starts[-1], stage), times) * 2**times)

    pipe.prepare_latents, pipe.sample_block_noise = start, between
    vae.decode = lambda z, return_dict: (torch.zeros(1, 3, 33, 128, 128),)
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    first, still = torch.randn(2, 1, 16, 1, 16, 16, generator=torch.Generator().manual_seed(4))
    given = {"image_latents": first, "fake_image_latents": still, "add_noise_to_image_latents": False}
    pipe(
        **(given if image else {}), prompt_embeds=text, guidance_scale=1.0, height=128, width=128, num_frames=66,
        output_type="pt", pyramid_num_inference_steps_list=list(steps),
        callback_on_step_end=lambda p, i, t, k: made.append(k["latents"]) or {},
    )  # fmt: skip
    chunk = torch.arange(2).repeat_interleave(9)
    layout = Layout(torch.arange(18), chunk, torch.zeros_like(chunk), torch.zeros(1, 18, dtype=torch.int64))
    cond = Conditioning(layout, TextStates(text[:, None], torch.ones(1, 1, 6, dtype=torch.bool)))
    if image:
        ours, past = [], still
        for a in (0, 9):
            told = replace(cond.frames(a, a + 9), history=pyramid.history_blocks(past, a, first))
            ours.append(pyramid.pyramid(model, noise, told, steps, distilled=distilled))
            past = torch.cat([past, ours[-1]], dim=2)
    else:
        denoiser = pyramid.Streamed(model, noise, steps, distilled=distilled)
        chunks = stream(denoiser, denoiser.new_state(), cond, torch.tensor([1.0, 0.0]), noise)
        ours = [chunk for chunk, _ in chunks]
    for i, latents in enumerate(ours):
        expected = made[5 * (i + 1) - 1]
        assert latents.shape == expected.shape == (1, 16, 9, 16, 16)
        assert (latents - expected).abs().max() <= 2e-6 * expected.abs().max()
