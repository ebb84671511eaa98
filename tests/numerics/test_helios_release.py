"""Videos of a released folder, sampled without any training, against diffusers' own pipeline: small, random, fp32."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_umt5 import folder as umt5  # noqa: E402, F401
from tiny_helios import release  # noqa: E402

from vgr import command, sample  # noqa: E402
from vgr.diffusion import pyramid  # noqa: E402
from vgr.diffusion.samplers import frame_noise  # noqa: E402
from vgr.types import Cameras  # noqa: E402

SMALL = ("data.source.size_hw=[64,64]", "model.dtype=float32", "model.text_length=12", "text.dtype=float32",
         "text.length=12", "sampling.staged.image_noise=[0.0,0.0]")  # fmt: skip
SEED, PROMPT = 7, "a red box"


def generator(monkeypatch, folder, *more, **given):
    composed, small = command.compose, () if "preset" in given else SMALL
    monkeypatch.setattr(command, "compose", lambda name, words=(): composed(name, [*words, *small, *more]))
    asked = dict(checkpoint=str(folder), preset="warp_adapter/one_video", device="cpu", steps=None, guidance=None,
                 shift=None, memory=None)  # fmt: skip
    made = sample.load(OmegaConf.create({**asked, **given}), 10.0)
    monkeypatch.setattr(command, "compose", composed)
    return made


def piped(folder, noise, amplified, **settings):
    """diffusers' pipeline on the folder, with our noise, and the mode of encoded images."""
    import diffusers
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    kind = diffusers.HeliosDMDScheduler
    pipe = diffusers.HeliosPyramidPipeline(
        PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        diffusers.AutoencoderKLWan.from_pretrained(folder / "vae"), kind.from_pretrained(folder / "scheduler"),
        diffusers.HeliosTransformer3DModel.from_pretrained(folder / "transformer"), is_distilled=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    starts, blocks = [], []

    def start(*args, **kwargs):
        starts.append(torch.arange(9) + 9 * len(starts))
        return noise(starts[-1], 0)

    def between(*args):
        stage = 1 + len(blocks) % 2
        blocks.append(stage)
        return pyramid.block_noise(pyramid.halved(noise(starts[-1], stage), 2 - stage) * 2 ** (2 - stage))

    pipe.prepare_latents, pipe.sample_block_noise = start, between
    video = pipe(
        prompt=PROMPT, max_sequence_length=12, guidance_scale=1.0, height=64, width=64, output_type="pt",
        pyramid_num_inference_steps_list=[2, 2, 2], is_amplify_first_chunk=amplified, add_noise_to_image_latents=False,
        **settings,
    ).frames[0]  # fmt: skip
    return (video * 255).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("image, frames, amplified, shifted", [
    (True, 65, True, False), (False, 97, False, True), (False, 33, True, True),
])  # fmt: skip
def test_videos_are_the_pipelines(tmp_path, monkeypatch, umt5, image, frames, amplified, shifted):  # noqa: F811
    """From an image or from text alone, over chunks that are clips of their own, as many frames as it returns."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.helios import pipeline_helios_pyramid

    # It mends broken encodings, of which there are none here, and is an extra of ours.
    monkeypatch.setattr(pipeline_helios_pyramid, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    folder = release(tmp_path, umt5, use_dynamic_shifting=shifted)
    own = generator(monkeypatch, folder, f"sampling.staged.amplified={amplified}")
    assert own.sampling["staged"]["shifted"] == shifted
    picture = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8)
    cameras = Cameras(torch.eye(4).expand(1, frames, 4, 4), torch.ones(1, frames, 4))
    made, _ = own(picture if image else None, cameras, ((PROMPT,),), [SEED])
    told = {"image": torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255} if image else {}
    # 33 frames a chunk, and of N chunks 33N - (33N - 1) % 4 come back
    video = piped(folder, frame_noise([SEED], (16, 8, 8)), amplified, num_frames=frames + (-frames % 33), **told)
    assert made.shape[1] == len(video) == frames
    assert np.abs(made[0] - video).max() <= 0.51  # levels: ours are rounded
    assert made[0].std() > 5
    seen = own(picture, cameras, ((PROMPT,),), [SEED])[0]
    assert (np.abs(seen.astype(int) - made).max() == 0) == image


def test_images_are_noised_as_the_pipeline_says(tmp_path, monkeypatch, umt5):  # noqa: F811
    """One share within 0.111 to 0.135 for the image, one for it standing still, and each of a seed alone."""
    own = generator(monkeypatch, release(tmp_path, umt5), "sampling.staged.image_noise=[0.111,0.135]")
    pictures = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    noisy, other = own._encode(pictures, [1, 2]), own._encode(pictures[1:], [2])
    assert all(torch.equal(a[1:], b) for a, b in zip(noisy, other))
    own.sampling["staged"]["image_noise"] = (0.0, 0.0)
    for dirty, clean in zip(noisy, own._encode(pictures, [1, 2])):
        assert dirty.shape == clean.shape == (2, 16, 1, 8, 8)
        for a, b in zip(dirty, clean):  # a = s e + (1 - s) b, with e of unit variance
            share = 1 - float((a * b).mean() / b.square().mean())
            assert float((a - (1 - 0.123) * b).std()) == pytest.approx(0.123, rel=0.15) and abs(share - 0.123) < 0.03


@pytest.mark.parametrize("given, words", [
    (dict(preset="warp_adapter/base_tiny"), "does not say how to sample weights"),
    (dict(preset="world_model/lora"), "does not say how to sample weights"),
    (dict(checkpoint="nowhere"), "28 GB in bfloat16"),
    (dict(shift=3.0), "memory= and shift="),
])  # fmt: skip
def test_what_cannot_be_sampled_is_told(tmp_path, monkeypatch, umt5, given, words):  # noqa: F811
    folder = release(tmp_path, umt5) if "checkpoint" not in given else tmp_path
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        generator(monkeypatch, folder, **given)


def test_a_scheduler_of_another_kind_is_refused(tmp_path, monkeypatch, umt5):  # noqa: F811
    folder = release(tmp_path, umt5, use_dynamic_shifting=True, time_shift_type="exponential")
    with pytest.raises(ValueError, match="shifted exponentially"):
        generator(monkeypatch, folder)
