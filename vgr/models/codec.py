"""A codec without weights: an orthonormal cosine transform of space-time blocks, of which the lowest bands are kept.

The first frame stands alone (its block is the frame repeated, so its temporal bands are zero), then every
`stride[0]` frames make one latent frame, as in causal video VAEs. Kept bands become channels. With all bands
the round trip is exact; with fewer, decoding is the orthogonal projection onto them, and nothing that models
these latents can do better than that PSNR. Cosines, not steps: a picture of flat squares stands still to optical
flow, and to the eye, whatever moves behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgr.types import latent_frames

# Orthonormal luma/chroma axes in RGB: grey, red-blue, green against both.
_COLOUR = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))


def cosine_matrix(size: int) -> Tensor:
    """The orthonormal cosine analysis matrix (size, size), rows from low to high frequency (DCT-II), float64."""
    row, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64) + 0.5
    matrix = torch.cos(torch.pi / size * row * place) * (2 / size) ** 0.5
    matrix[0] = size**-0.5
    return matrix


class CosineCodec(nn.Module):
    """Video (B,3,F,H,W) in [-1, 1] to normalised latents (B,C,T,H/s,W/s) with T = 1 + (F-1)/stride[0].

    stride: (t, h, w), h = w.
    luma, chroma: for every temporal frequency, from the mean up, the side of the square of lowest spatial
        frequencies that is kept; those beyond the tuple are dropped. None keeps every band.
    latents_mean, latents_std: per-channel normalisation (C,), zero and one when not given. `fit` makes them.
    """

    clip = None

    def __init__(
        self,
        stride: Sequence[int] = (4, 8, 8),
        luma: Sequence[int] | None = None,
        chroma: Sequence[int] | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        t, h, w = (int(s) for s in stride)
        if h != w or min(t, h) < 1:
            raise ValueError(f"codec.stride must be positive with equal height and width strides, got {tuple(stride)}")
        self.stride = (t, h, w)
        luma = tuple(luma) if luma is not None else (h,) * t
        chroma = tuple(chroma) if chroma is not None else (h,) * t
        keep = [
            ((colour * t + i) * h + y) * w + x
            for colour in range(3)
            for i in range(t)
            for y in range(h)
            for x in range(w)
            if i < len(sides := luma if colour == 0 else chroma) and max(y, x) < sides[i]
        ]
        self.channels = len(keep)
        mean = [0.0] * self.channels if latents_mean is None else [float(m) for m in latents_mean]
        std = [1.0] * self.channels if latents_std is None else [float(s) for s in latents_std]
        if len(mean) != self.channels or len(std) != self.channels or min(std) <= 0:
            raise ValueError(
                f"codec.latents_mean and latents_std need {self.channels} numbers, std above zero; "
                f"got {len(mean)} and {len(std)}"
            )
        self.config: dict[str, Any] = {
            "stride": list(self.stride),
            "luma": list(luma),
            "chroma": list(chroma),
            "latents_mean": mean,
            "latents_std": std,
        }
        colour = torch.nn.functional.normalize(torch.tensor(_COLOUR, dtype=torch.float64), dim=1)
        spatial, temporal = cosine_matrix(h), cosine_matrix(t)
        # One orthonormal matrix from a block's 3*t*h*w values (colour, t, y, x) to its kept bands.
        basis = torch.kron(torch.kron(colour, temporal), torch.kron(spatial, spatial))[keep]
        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the configuration, normalisation included."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]

    def latent_frames(self, frames: int) -> int:
        """T of F raw frames; ValueError unless F = 1 + n * stride[0]."""
        return latent_frames(frames, self.stride[0])

    def encode(self, video: Tensor) -> Tensor:
        """(B,3,F,H,W) in [-1,1] to normalised latents (B,C,T,H/h,W/w), fp32; ValueError on sizes that do not fit."""
        bands = self._analyse(video)
        shape = (1, -1, 1, 1, 1)
        return (bands - self.mean.view(shape)) / self.std.view(shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B,C,T,H,W) of a clip from its first frame on to video (B,3,F,H*h,W*w), not clamped."""
        stream = self.stream()
        return stream(latents)

    def stream(self) -> CosineDecodeStream:
        """A decoder that takes a clip's latent frames piece by piece; the concatenation equals `decode`."""
        return CosineDecodeStream(self)

    @torch.no_grad()
    def fit(self, videos: Sequence[Tensor]) -> CosineCodec:
        """The same bands normalised as measured on videos (B,3,F,H,W): what training data wants.

        Means become zero; a channel is divided by the square root of its deviation. With unit deviations the many
        high bands, which hold little of the picture and are hard to foresee, would make up nearly all of the loss.
        """
        bands = torch.cat([self._analyse(v).transpose(0, 1).flatten(1) for v in videos], dim=1).double()
        config = dict(self.config)
        config["latents_mean"] = [round(x, 4) for x in bands.mean(1).tolist()]
        config["latents_std"] = [round(max(x, 1e-6) ** 0.5, 4) for x in bands.std(1).tolist()]
        return CosineCodec(**config)

    def _analyse(self, video: Tensor) -> Tensor:
        t, h, w = self.stride
        batch, colours, frames, height, width = video.shape
        if colours != 3 or height % h or width % w:
            raise ValueError(
                f"the codec takes (B,3,F,H,W) with height and width multiples of {h}, got {tuple(video.shape)}"
            )
        count = self.latent_frames(frames)
        video = torch.cat([video[:, :, :1].expand(-1, -1, t, -1, -1), video[:, :, 1:]], dim=2).float()
        blocks = video.reshape(batch, 3, count, t, height // h, h, width // w, w)
        blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return (blocks @ self.basis.T).permute(0, 4, 1, 2, 3)

    def _synthesise(self, latents: Tensor) -> Tensor:
        t, h, w = self.stride
        shape = (1, -1, 1, 1, 1)
        bands = latents.float() * self.std.view(shape) + self.mean.view(shape)
        batch, _, count, rows, columns = bands.shape
        blocks = (bands.permute(0, 2, 3, 4, 1) @ self.basis).unflatten(-1, (3, t, h, w))
        return blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, 3, count * t, rows * h, columns * w)


class CosineDecodeStream:
    """Streaming decode: call with successive latent frames (B,C,T,H,W), get their raw frames (B,3,F,H,W)."""

    def __init__(self, codec: CosineCodec) -> None:
        self.codec = codec
        self.started = False

    def __call__(self, latents: Tensor) -> Tensor:
        video = self.codec._synthesise(latents)
        if not self.started:
            # The first latent frame holds one image repeated; the mean over its block is that image.
            t = self.codec.stride[0]
            video = torch.cat([video[:, :, :t].mean(2, keepdim=True), video[:, :, t:]], dim=2)
            self.started = True
        return video
