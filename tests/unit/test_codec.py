"""The cosine codec: exact with all bands, an orthogonal projection with fewer, streaming equals whole."""

import pytest
import torch

from vgr.models.codec import CosineCodec, cosine_matrix


def _video(frames=17, seed=0, size=(16, 24)):
    return torch.rand(2, 3, frames, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_cosines_are_orthonormal(size):
    matrix = cosine_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("stride", [(1, 4, 4), (4, 8, 8), (8, 2, 2), (2, 8, 8)])
def test_all_bands_round_trip_exactly(stride):
    codec, video = CosineCodec(stride), _video()
    latents = codec.encode(video)
    assert latents.shape == (2, 3 * stride[0] * stride[1] ** 2, 1 + 16 // stride[0], 16 // stride[1], 24 // stride[1])
    torch.testing.assert_close(codec.decode(latents), video, atol=2e-6, rtol=0)


def test_kept_bands_are_an_orthogonal_projection():
    codec, video = CosineCodec((4, 8, 8), [4, 2, 1], [2, 1]), _video()
    once = codec.decode(codec.encode(video))
    torch.testing.assert_close(codec.decode(codec.encode(once)), once, atol=1e-5, rtol=0)
    # After the first frame the error is orthogonal to what is kept, so energies add up.
    kept, lost, all_ = (x[:, :, 1:].square().sum() for x in (once, video - once, video))
    torch.testing.assert_close(kept + lost, all_, rtol=1e-5, atol=0)


def test_first_frame_stands_alone():
    codec = CosineCodec((4, 8, 8), [4, 2, 1], [2, 1])
    video = _video()
    image = codec.encode(video[:, :, :1])
    torch.testing.assert_close(codec.encode(video)[:, :, :1], image)
    assert image.shape[2] == 1


def test_streaming_decode_equals_whole():
    codec = CosineCodec((4, 8, 8), [4, 2], [2])
    latents = torch.randn(1, codec.channels, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    stream = codec.stream()
    pieces = [stream(latents[:, :, :2]), stream(latents[:, :, 2:3]), stream(latents[:, :, 3:])]
    assert [p.shape[2] for p in pieces] == [5, 4, 8]
    torch.testing.assert_close(torch.cat(pieces, 2), codec.decode(latents))


def test_fit_normalises_and_changes_the_fingerprint():
    plain = CosineCodec((4, 8, 8), [2, 1], [1])
    video = 0.3 * _video() + 0.2
    fitted = plain.fit([video])
    latents = fitted.encode(video).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(plain.channels), atol=2e-3, rtol=0)
    measured = plain.encode(video).transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(latents.std(1), measured.sqrt(), atol=0, rtol=1e-2)
    again, before = fitted.decode(fitted.encode(video)), plain.decode(plain.encode(video))
    torch.testing.assert_close(again, before, atol=1e-4, rtol=0)
    assert fitted.fingerprint != plain.fingerprint
    assert CosineCodec(**fitted.config).fingerprint == fitted.fingerprint


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CosineCodec((4, 8, 8)).encode(_video(16)), "13 or 17"),
        (lambda: CosineCodec((4, 8, 8)).encode(_video(17, size=(12, 24))), "multiples of 8"),
        (lambda: CosineCodec((0, 8, 8)), "positive"),
        (lambda: CosineCodec((4, 8, 4)), "equal height and width"),
        (lambda: CosineCodec((4, 8, 8), [1], [0], latents_std=[1.0, 2.0]), "1 numbers"),
    ],
)
def test_refuses_what_does_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        call()
