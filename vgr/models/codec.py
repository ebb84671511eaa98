"""A codec without weights: an orthonormal space-time Haar wavelet on blocks, of which the lowest bands are kept.

The first frame stands alone (its block is the frame repeated, so its temporal bands are zero), then every
`stride[0]` frames make one latent frame, as in causal video VAEs. Kept bands become channels. With all bands
the round trip is exact; with fewer, decoding is the orthogonal projection onto them, and nothing that models
these latents can do better than that PSNR.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Orthonormal luma/chroma axes in RGB: grey, red-blue, green against both.
_COLOUR = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))


def haar_matrix(size: int) -> Tensor:
    """The orthonormal Haar analysis matrix (size, size), rows from coarse to fine; size a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a wavelet stride must be a power of two, got {size}; use 1, 2, 4, 8, ...")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        n = matrix.shape[0]
        low = torch.kron(matrix, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
        high = torch.kron(torch.eye(n, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
        matrix = torch.cat([low, high]) / 2**0.5
    return matrix


def _row_level(row: int) -> int:
    """The scale of a Haar row: 0 for the mean, 1 for the coarsest difference, one more for each halving."""
    return row.bit_length()


class WaveletCodec(nn.Module):
    """Video (B,3,F,H,W) in [-1, 1] to normalised latents (B,C,T,H/s,W/s) with T = 1 + (F-1)/stride[0].

    stride: (t, h, w), powers of two, h = w.
    luma, chroma: for every temporal scale (mean, coarsest difference, ...) the side of the square of lowest
        spatial bands that is kept; scales beyond the tuple are dropped. None keeps every band.
    latents_mean, latents_std: per-channel normalisation (C,), zero and one when not given. `fit` makes them.
    """

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
        if h != w:
            raise ValueError(f"codec.stride must have equal height and width strides, got {tuple(stride)}")
        self.stride = (t, h, w)
        scales = _row_level(t - 1) + 1
        luma = tuple(luma) if luma is not None else (h,) * scales
        chroma = tuple(chroma) if chroma is not None else (h,) * scales
        keep = [
            ((colour * t + i) * h + y) * w + x
            for colour in range(3)
            for i in range(t)
            for y in range(h)
            for x in range(w)
            if _row_level(i) < len(sides := luma if colour == 0 else chroma) and max(y, x) < sides[_row_level(i)]
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
        spatial, temporal = haar_matrix(h), haar_matrix(t)
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
        if frames < 1 or (frames - 1) % self.stride[0]:
            lower = 1 + max(frames - 1, 0) // self.stride[0] * self.stride[0]
            raise ValueError(
                f"{frames} frames do not fit the codec's temporal stride {self.stride[0]}; "
                f"use 1 + n * {self.stride[0]}, for example {lower} or {lower + self.stride[0]}"
            )
        return 1 + (frames - 1) // self.stride[0]

    def encode(self, video: Tensor) -> Tensor:
        """(B,3,F,H,W) in [-1,1] to normalised latents (B,C,T,H/h,W/w), fp32; ValueError on sizes that do not fit."""
        bands = self._analyse(video)
        shape = (1, -1, 1, 1, 1)
        return (bands - self.mean.view(shape)) / self.std.view(shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B,C,T,H,W) of a clip from its first frame on to video (B,3,F,H*h,W*w), not clamped."""
        stream = self.stream()
        return stream(latents)

    def stream(self) -> WaveletDecodeStream:
        """A decoder that takes a clip's latent frames piece by piece; the concatenation equals `decode`."""
        return WaveletDecodeStream(self)

    @torch.no_grad()
    def fit(self, videos: Sequence[Tensor]) -> WaveletCodec:
        """The same bands with mean and std measured on videos (B,3,F,H,W): what training data wants."""
        bands = torch.cat([self._analyse(v).transpose(0, 1).flatten(1) for v in videos], dim=1).double()
        config = dict(self.config)
        config["latents_mean"] = [round(x, 4) for x in bands.mean(1).tolist()]
        config["latents_std"] = [round(max(x, 1e-3), 4) for x in bands.std(1).tolist()]
        return WaveletCodec(**config)

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


class WaveletDecodeStream:
    """Streaming decode: call with successive latent frames (B,C,T,H,W), get their raw frames (B,3,F,H,W)."""

    def __init__(self, codec: WaveletCodec) -> None:
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
