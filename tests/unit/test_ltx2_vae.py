"""The LTX-2 codec on tiny random VAEs in the real file format: against diffusers, streaming against whole."""

import json
import types

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import AutoencoderKLLTX2Video
from diffusers.pipelines.sana_wm.pipeline_sana_wm import SanaWMPipeline

from vgr.models.ltx2_vae import LTX2Codec

TINY = {
    "latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1, 1, 1, 1),
}  # fmt: skip
# Other strides (2,4,4), block kinds, a block that changes width (conv_in), no residuals in one of them.
MIXED = TINY | {
    "patch_size": 2, "spatio_temporal_scaling": (True, True, False, False),
    "downsample_type": ("spatial", "temporal", "spatial", "spatial"), "upsample_factor": (1, 1, 1),
    "decoder_block_out_channels": (8, 16, 16), "decoder_spatio_temporal_scaling": (True, True, False),
    "upsample_type": ("spatiotemporal", "temporal", "spatial"), "upsample_residual": (True, False, True),
}  # fmt: skip


def _save(folder, **config):
    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(**config).eval()
    vae.latents_mean.uniform_(-1, 1)
    vae.latents_std.uniform_(0.5, 2)
    vae.save_pretrained(folder)
    return vae


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("vae")
    for name, config in (("tiny", TINY), ("mixed", MIXED)):
        _save(base / name, **config, decoder_causal=True, scaling_factor=0.7)
        _save(base / f"{name}-ahead", **config, decoder_causal=False, scaling_factor=0.7)
    return base


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _video(frames, size=(32, 64), batch=1):
    return _normal(batch, 3, frames, *size).clamp(-1, 1)


def test_normalisation_is_diffusers_own(folders):
    codec = LTX2Codec.from_pretrained(folders / "tiny")
    vae = AutoencoderKLLTX2Video.from_pretrained(folders / "tiny")
    pipe = types.SimpleNamespace(vae=vae, _execution_device="cpu")
    image = _video(1)
    assert codec.stride == (8, 32, 32) and codec.channels == 8
    with torch.no_grad():
        expected = SanaWMPipeline._encode_first_frame(pipe, image[:, :, 0], "cpu", torch.float32)
        torch.testing.assert_close(codec.encode(image), expected)
        latents = _normal(2, 8, 3, 2, 2)
        torch.testing.assert_close(
            codec.decode(latents), SanaWMPipeline._decode_latents(pipe, latents), atol=1e-5, rtol=0
        )
        mode = vae.encode(_video(17)).latent_dist.mode()
    by_hand = (mode.double() - vae.latents_mean.double().view(-1, 1, 1, 1)) * 0.7
    by_hand = by_hand / vae.latents_std.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(codec.encode(_video(17)).double(), by_hand, atol=1e-5, rtol=0)


def test_strides_come_from_the_configuration(folders):
    codec = LTX2Codec(folders / "mixed")
    assert codec.stride == (2, 4, 4)
    latents = codec.encode(_video(5, (8, 12), batch=2))
    assert latents.shape == (2, 8, 3, 2, 3)
    assert codec.decode(latents).shape == (2, 3, 5, 8, 12)


@pytest.mark.parametrize("name", ["tiny", "mixed"])
@pytest.mark.parametrize("pieces", [[1] * 6, [1, 5], [3, 3], [2, 1, 3], [6]])
def test_causal_streaming_equals_diffusers_whole_decode(folders, name, pieces):
    codec, size = LTX2Codec(folders / name), (2, 2) if name == "tiny" else (3, 4)
    latents = _normal(2, 8, 6, *size)
    with torch.no_grad():
        whole = codec.vae.decode(latents * codec.scale + codec.mean, None).sample
    stream = codec.stream()
    got = [stream(piece) for piece in latents.split(pieces, dim=2)]
    t = codec.stride[0]
    assert codec.causal and [g.shape[2] for g in got] == [1 + (pieces[0] - 1) * t, *(p * t for p in pieces[1:])]
    torch.testing.assert_close(torch.cat(got, 2), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latents), whole, atol=1e-5, rtol=0)
    # The past matters: pieces decoded as clips of their own would not do.
    alone = torch.cat([codec.decode(piece)[:, :, -8:] for piece in latents.split(1, dim=2)], 2)
    assert (alone[:, :, -1] - whole[:, :, -1]).abs().max() > 1e-2


def test_segments_of_the_released_sampler_stream_with_constant_memory(folders):
    codec = LTX2Codec(folders / "tiny")
    latents, stream, got, held = _normal(1, 8, 13, 2, 2), codec.stream(), [], set()
    for piece in latents.split([4, 3, 3, 3], dim=2):
        got.append(stream(piece))
        held.add(sum(x.untyped_storage().nbytes() for x in stream.past.values()))
    assert held == {sum(x.nbytes for x in stream.past.values())}
    with torch.no_grad():  # longer than a tile: no seams either, unlike diffusers' `decode` with tiles
        whole = codec.vae.decoder(latents * codec.scale + codec.mean, None)
    torch.testing.assert_close(torch.cat(got, 2), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latents), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny-ahead", "mixed-ahead"])
def test_a_decoder_that_looks_ahead_streams_with_context(folders, name):
    codec = LTX2Codec(folders / name)
    latents = _normal(1, 8, 5, 2, 2)
    whole, t = codec.decode(latents), codec.stride[0]
    with torch.no_grad():
        expected = codec.vae.decode(latents * codec.scale + codec.mean, None).sample
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    stream = codec.stream()
    first, rest = stream(latents[:, :, :2]), stream(latents[:, :, 2:])
    assert not codec.causal and first.shape[2] == 1 + t
    # The rest saw all that came before it; the first piece could not see the rest.
    torch.testing.assert_close(rest, whole[:, :, 1 + t :], atol=1e-5, rtol=0)
    assert (first - whole[:, :, : 1 + t]).abs().max() > 1e-3


def test_latent_zero_is_the_first_image_where_the_encoder_is_causal(folders, tmp_path):
    video = _video(17)
    for name in ("tiny", "mixed"):
        codec = LTX2Codec(folders / name)
        torch.testing.assert_close(codec.encode(video)[:, :, :1], codec.encode(video[:, :, :1]), atol=1e-5, rtol=0)
    _save(tmp_path, **TINY, encoder_causal=False)
    ahead = LTX2Codec(tmp_path)
    assert (ahead.encode(video)[:, :, :1] - ahead.encode(video[:, :, :1])).abs().max() > 1e-3


def test_tiles_along_time_are_aligned(folders):
    """With convolutions that see one frame, encoding and decoding in blended tiles changes nothing."""
    codec = LTX2Codec(folders / "tiny-ahead", tile=(32, 128, 128), tile_stride=(16, 64, 64))
    whole = LTX2Codec(folders / "tiny-ahead", tile=None)
    for part, tap in ((codec.vae.encoder, 2), (codec.vae.decoder, 1)):
        for name, weight in part.named_parameters():
            if name.endswith("conv.weight"):
                weight.copy_(weight * (torch.arange(3) == tap).view(3, 1, 1))
    whole.vae.load_state_dict(codec.vae.state_dict())
    for frames in (33, 41, 57, 65, 73):
        video = _video(frames, (64, 64))
        latents = whole.encode(video)
        torch.testing.assert_close(codec.encode(video), latents, atol=1e-5, rtol=0)
        expected = whole.decode(latents)
        torch.testing.assert_close(codec.decode(latents), expected, atol=1e-5, rtol=0)
    late = codec.vae.decode(latents * codec.scale + codec.mean, None).sample
    torch.testing.assert_close(late[:, :, 40:], expected[:, :, 39:-1], atol=1e-5, rtol=0)  # diffusers' own loop


def test_long_and_wide_clips_are_decoded_in_tiles(folders):
    codec = LTX2Codec(folders / "tiny-ahead", tile=(32, 128, 128), tile_stride=(16, 64, 64))
    whole = LTX2Codec(folders / "tiny-ahead", tile=None)
    long, wide = _normal(1, 8, 9, 2, 2), _normal(1, 8, 2, 2, 6)
    error = (codec.decode(long) - whole.decode(long)).abs().mean()
    assert 0 < error < 0.2 * whole.decode(long).std()
    expected = codec.vae.tiled_decode(wide * codec.scale + codec.mean, None).sample
    torch.testing.assert_close(codec.decode(wide), expected)
    assert (expected - whole.decode(wide)).abs().max() > 1e-3


def test_posterior_samples_are_the_clips_own(folders):
    mode, drawn = LTX2Codec(folders / "tiny"), LTX2Codec(folders / "tiny", sample_posterior=True)
    video = torch.cat([_video(9), _video(9).flip(2)])
    latents = drawn.encode(video)
    torch.testing.assert_close(drawn.encode(video[1:]), latents[1:], atol=1e-5, rtol=0)
    with torch.no_grad():
        std = drawn.vae.encode(video).latent_dist.std
    noise = (latents - mode.encode(video)) * mode.scale / std
    assert noise.std() == pytest.approx(1, abs=0.3) and (noise[0] - noise[1]).abs().max() > 0.1
    assert mode.fingerprint != drawn.fingerprint


def test_fingerprint_names_weights_and_configuration_whatever_the_dtype(folders, tmp_path):
    vae = AutoencoderKLLTX2Video.from_pretrained(folders / "tiny", torch_dtype=torch.bfloat16)
    vae.save_pretrained(tmp_path / "half")
    codec = LTX2Codec(tmp_path / "half", dtype="bfloat16")
    full = LTX2Codec(**(codec.config | {"dtype": "float32"}))
    assert codec.fingerprint == full.fingerprint and len(codec.fingerprint) == 16
    vae.decoder.conv_out.conv.bias.data += 1
    vae.save_pretrained(tmp_path / "other")
    others = [LTX2Codec(f).fingerprint for f in (tmp_path / "other", folders / "tiny", folders / "tiny-ahead")]
    assert len({codec.fingerprint, *others}) == 4
    video = _video(9, (64, 64))
    latents = codec.encode(video)
    assert latents.dtype == codec.decode(latents).dtype == torch.float32
    assert codec.vae.dtype == torch.bfloat16 and full.vae.dtype == torch.float32
    torch.testing.assert_close(latents, full.encode(video), atol=0.1, rtol=0)


def test_the_released_causal_class_is_understood(folders, tmp_path):
    """`ltx2_causal_vae/`: another class name, up-samplers listed from the output back."""
    config = json.loads((folders / "mixed" / "config.json").read_text())
    kinds = config.pop("upsample_type")
    config |= {"_class_name": "AutoencoderKLCausalLTX2Video", "decoder_upsample_type": kinds[::-1]}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"gradient_checkpointing": False}))
    for file in (folders / "mixed").glob("*.safetensors"):
        (tmp_path / "vae" / file.name).write_bytes(file.read_bytes())
    codec, same = LTX2Codec(tmp_path, subfolder="vae"), LTX2Codec(folders / "mixed")
    latents = _normal(1, 8, 3, 2, 2)
    torch.testing.assert_close(codec.decode(latents), same.decode(latents))


def test_refuses_what_does_not_fit(folders, tmp_path):
    codec = LTX2Codec(folders / "tiny")
    cases = [
        (lambda: codec.encode(_video(16)), "9 or 17"),
        (lambda: codec.encode(_video(9, (40, 64))), "multiple of 32.*nearest size is 32x64"),
        (lambda: codec.latent_frames(0), "1 or 9"),
        (lambda: codec.decode(_normal(1, 7, 2, 2, 2)), r"\(B,8,T,H,W\)"),
        (lambda: codec.decode(_normal(1, 8, 2, 1, 2)), "H and W at least 2"),
        (lambda: LTX2Codec("Some/Repository"), "needs codec.revision"),
        (lambda: LTX2Codec(folders / "tiny", dtype="float8"), "choose float32 or bfloat16"),
        (lambda: LTX2Codec(folders / "tiny", tile=(96, 500, 512)), r"multiples of the codec's stride \[8, 32, 32\]"),
        (lambda: LTX2Codec(folders / "tiny", tile=(64, 512, 512)), "larger than its stride"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        LTX2Codec(tmp_path)
    _save(tmp_path, **TINY, timestep_conditioning=True)
    with pytest.raises(ValueError, match="timestep_conditioning"):
        LTX2Codec(tmp_path)
    config = json.loads((folders / "tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit the model"):
        LTX2Codec(tmp_path)
