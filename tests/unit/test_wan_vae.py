"""The Wan 2.1 codec on a tiny random VAE in the real file format: against diffusers, streaming against whole."""

import types

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

from vgr.models.wan_vae import WanCodec

TINY = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1,
    "latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [2.0, 0.5, 1.5, 0.7],
}  # fmt: skip
# Spec 2.4
MEAN = "-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 \
0.2503 -0.2921"
STD = "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"


def _save(folder, **config):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**(TINY | config)).eval()
    vae.save_pretrained(folder)
    return vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    _save(folder)
    return folder


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _video(frames, size=(16, 24), batch=1):
    return _normal(batch, 3, frames, *size).clamp(-1, 1)


def _decoded(vae, codec, latents):
    with torch.no_grad():
        return vae.decode(latents * codec.scale + codec.mean).sample


def test_the_default_statistics_are_those_of_the_spec(tmp_path):
    AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(tmp_path)
    codec = WanCodec(tmp_path)
    assert codec.stride == (4, 8, 8) and codec.channels == 16
    for got, words in ((codec.mean, MEAN), (codec.scale, STD)):
        torch.testing.assert_close(got.flatten(), torch.tensor([float(x) for x in words.split()]), atol=0, rtol=0)


def test_encoding_and_decoding_are_diffusers_own(folder):
    codec, vae = WanCodec.from_pretrained(folder), AutoencoderKLWan.from_pretrained(folder)
    video = _video(9, batch=2)
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 3, 2, 3) and latents.dtype == torch.float32
    with torch.no_grad():
        mode = vae.encode(video).latent_dist.mode().double()
    mean, std = (torch.tensor(TINY[f"latents_{x}"], dtype=torch.float64).view(-1, 1, 1, 1) for x in ("mean", "std"))
    torch.testing.assert_close(latents.double(), (mode - mean) / std, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latents), _decoded(vae, codec, latents), atol=1e-5, rtol=0)
    loud = 30 * _normal(1, 4, 3, 2, 3)
    assert codec.decode(loud).abs().max() <= 1
    # What the image-to-video pipeline puts before its noise, normalised: the image, then grey frames.
    config = types.SimpleNamespace(expand_timesteps=False)
    pipe = types.SimpleNamespace(vae=vae, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8, config=config)
    image = _video(1)[:, :, 0]
    noise = torch.zeros(1, 4, 3, 2, 3)
    with torch.no_grad():
        _, condition = WanImageToVideoPipeline.prepare_latents(
            pipe, image, 1, 4, 16, 24, 9, torch.float32, torch.device("cpu"), latents=noise
        )
    grey = torch.cat([image.unsqueeze(2), torch.zeros(1, 3, 8, 16, 24)], dim=2)
    torch.testing.assert_close(codec.encode(grey), condition[:, -4:], atol=1e-5, rtol=0)


def test_latent_zero_is_the_first_images_own(folder):
    codec, video = WanCodec(folder), _video(9)
    torch.testing.assert_close(codec.encode(video)[:, :, :1], codec.encode(video[:, :, :1]), atol=1e-5, rtol=0)
    latents = codec.encode(video)
    torch.testing.assert_close(codec.decode(latents)[:, :, :1], codec.decode(latents[:, :, :1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 6, [1, 5], [3, 3], [2, 1, 3], [6]])
def test_streaming_equals_diffusers_whole_decode(folder, pieces):
    codec = WanCodec(folder)
    latents = _normal(2, 4, 6, 3, 2)
    whole = _decoded(codec.vae, codec, latents)
    stream = codec.stream()
    got = [stream(piece) for piece in latents.split(pieces, dim=2)]
    assert [g.shape[2] for g in got] == [1 + (pieces[0] - 1) * 4, *(p * 4 for p in pieces[1:])]
    torch.testing.assert_close(torch.cat(got, 2), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latents), whole, atol=1e-5, rtol=0)
    # The past matters: pieces decoded as clips of their own would not do.
    alone = codec.decode(latents[:, :, -1:])
    assert (alone[:, :, -1] - whole[:, :, -1]).abs().max() > 1e-3


def test_streams_interleave_and_hold_constant_memory(folder):
    codec = WanCodec(folder)
    clips = [_normal(1, 4, 7, 2, 2, seed=seed) for seed in (1, 2)]
    expected = [codec.decode(clip) for clip in clips]
    streams, got, held = [codec.stream() for _ in clips], [[], []], []
    for i in range(7):
        for stream, clip, frames in zip(streams, clips, got):
            frames.append(stream(clip[:, :, i : i + 1]))
        codec.encode(_video(5))  # nor does encoding disturb them
        tensors = [x for x in streams[0].past[0, 0].values() if torch.is_tensor(x)]
        held.append(sum(x.untyped_storage().nbytes() for x in tensors))
    for frames, whole in zip(got, expected):
        torch.testing.assert_close(torch.cat(frames, 2), whole, atol=1e-5, rtol=0)
    # Two frames of each convolution's input, once the up-samplers have them too.
    assert held[2:] == held[2:3] * 5 and held[-1] == sum(x.nbytes for x in tensors)
    assert all(x.shape[2] == 2 for x in tensors)


def test_large_videos_go_in_tiles(folder):
    codec, whole = WanCodec(folder, tile=(16, 16), tile_stride=(8, 8)), WanCodec(folder)
    vae = AutoencoderKLWan.from_pretrained(folder)
    vae.enable_tiling(16, 16, 8, 8)
    video = _video(5, (40, 24))
    with torch.no_grad():
        mode = vae.encode(video).latent_dist.mode()
    latents = codec.encode(video)
    torch.testing.assert_close(latents, (mode - codec.mean) / codec.scale, atol=1e-5, rtol=0)
    latents, stream = _normal(1, 4, 4, 4, 3), codec.stream()
    got = torch.cat([stream(piece) for piece in latents.split([2, 1, 1], dim=2)], dim=2)
    torch.testing.assert_close(got, _decoded(vae, codec, latents), atol=1e-5, rtol=0)
    assert (got - whole.decode(latents)).abs().max() > 1e-3
    small = latents[..., :2, :2]
    torch.testing.assert_close(codec.decode(small), whole.decode(small), atol=0, rtol=0)


def test_posterior_samples_are_the_clips_own(folder):
    mode, drawn = WanCodec(folder), WanCodec(folder, sample_posterior=True)
    video = torch.cat([_video(5, (64, 64)), _video(5, (64, 64)).flip(2)])
    latents = drawn.encode(video)
    torch.testing.assert_close(drawn.encode(video[1:]), latents[1:], atol=1e-5, rtol=0)
    with torch.no_grad():
        std = drawn.vae.encode(video).latent_dist.std
    noise = (latents - mode.encode(video)) * mode.scale / std
    assert noise.std() == pytest.approx(1, abs=0.1) and (noise[0] - noise[1]).abs().max() > 0.1
    assert mode.fingerprint != drawn.fingerprint


def test_fingerprint_names_weights_and_configuration_whatever_the_dtype(folder, tmp_path):
    full, half = WanCodec(folder), WanCodec(folder, dtype="bfloat16")
    assert WanCodec(**half.config).fingerprint == full.fingerprint == half.fingerprint
    assert half.vae.dtype == torch.bfloat16 and len(full.fingerprint) == 16
    latents = half.encode(_video(5))
    assert latents.dtype == half.decode(latents).dtype == torch.float32
    difference = (half.decode(latents) - full.decode(latents)).abs().max()
    assert 0 < difference < 0.1
    vae = AutoencoderKLWan.from_pretrained(folder)
    vae.decoder.conv_out.bias.data += 1
    vae.save_pretrained(tmp_path / "weights")
    _save(tmp_path / "statistics", latents_std=[1.0] * 4)
    others = {WanCodec(tmp_path / name).fingerprint for name in ("weights", "statistics")}
    assert len({full.fingerprint, *others}) == 3


def test_refuses_what_does_not_fit(folder, tmp_path):
    codec, stream = WanCodec(folder), WanCodec(folder).stream()
    stream(_normal(1, 4, 1, 2, 2))
    cases = [
        (lambda: codec.encode(_video(8)), "5 or 9"),
        (lambda: codec.encode(_video(5, (20, 24))), "multiple of 8.*nearest size is 16x24"),
        (lambda: codec.decode(_normal(1, 3, 2, 2, 2)), r"\(B,4,T,H,W\)"),
        (lambda: stream(_normal(1, 4, 1, 2, 3)), r"began with \(B,H,W\) = \(1, 2, 2\), got \(1, 2, 3\)"),
        (lambda: WanCodec("Some/Repository"), "needs codec.revision.*Wan2.1"),
        (lambda: WanCodec(folder, dtype="float8"), "choose float32 or bfloat16"),
        (lambda: WanCodec(folder, tile=(20, 16), tile_stride=(8, 8)), r"multiples of the codec's stride \[8, 8\]"),
        (lambda: WanCodec(folder, tile=(16, 16, 16), tile_stride=(8, 8)), r"are \(height, width\)"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    for name, config, words in (
        ("later", {"patch_size": 2, "in_channels": 12, "out_channels": 12}, "not shaped as Wan 2.1's VAE"),
        ("short", {"latents_mean": [0.0] * 3}, r"\(3, 4\) values for 4 channels"),
    ):
        _save(tmp_path / name, **config)
        with pytest.raises(ValueError, match=words):
            WanCodec(tmp_path / name)


@pytest.mark.parametrize("pieces", [[9], [1, 2, 6], [3, 3, 3], [1] * 9, [4, 5]])
def test_clips_are_videos_of_their_own(folder, pieces):
    """Three latent frames, nine raw ones, by themselves, both ways and in pieces of any length."""
    codec, plain = WanCodec(folder, clip=3), WanCodec(folder)
    video = _video(27)
    latents, alone = codec.encode(video), [plain.encode(part) for part in video.split(9, 2)]
    assert torch.equal(latents, torch.cat(alone, 2)) and latents.shape[2] == codec.latent_frames(27) == 9
    torch.testing.assert_close(codec.encode(video[:, :, :1]), latents[:, :, :1], atol=1e-5, rtol=0)  # an image
    whole = torch.cat([plain.decode(part) for part in latents.split(3, 2)], 2)
    stream = codec.stream()
    torch.testing.assert_close(torch.cat([stream(x) for x in latents.split(pieces, 2)], 2), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latents), whole, atol=1e-5, rtol=0)
    assert whole.shape[2] == 27 and plain.decode(latents).shape[2] == 33
    assert codec.fingerprint != plain.fingerprint and codec.config["clip"] == 3
    with pytest.raises(ValueError, match="use n \\* 9, for example 18 or 27"):
        codec.latent_frames(25)
    with pytest.raises(ValueError, match="codec.clip=1"):
        WanCodec(folder, clip=1)
