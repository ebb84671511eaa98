"""Wan 2.1's video VAE as a codec: diffusers' `AutoencoderKLWan` by composition (causal spec 2.4, 8.3).

Latents are normalised, z = (mode - mean) / std per channel, with the configuration's statistics. The decoder is
causal: decoding in pieces, of any lengths, equals decoding at once, whole or in spatial tiles. The first latent frame
is one image's and does not enter the past of the temporal up-samplers. With `clip`, as Helios has it, every so many
latent frames are such a video of their own (warp adapter, spec 1.3).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgr.models import weights
from vgr.nn import frozen
from vgr.types import raw_frames

_RELEASE = "The released VAE (0.5 GB, Apache 2.0) is vae/ of Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class WanCodec(frozen.FrozenVAE):
    """Video (B,3,F,H,W) in [-1, 1] to latents (B,16,T,H/8,W/8) with T = 1 + (F-1)/4; decoded video is clamped.

    folder: a local folder with config.json and safetensors, or a hub id, which needs a revision; subfolder: inside it.
    sample_posterior: latents drawn from the posterior, by a generator seeded with the clip, instead of its mode.
    tile, tile_stride: (height, width) in pixels of the pieces in which larger videos are encoded and decoded, and
        blended; None: whole. dtype: of weights and activations; latents and video are fp32 and stay on the device they
        came from. device: where the weights go first. clip: latent frames of a clip (Helios: 9, 33 raw frames), each
        encoded and decoded by itself; None: one causal video.
    Raises ValueError or OSError for folders, weights and settings that do not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        sample_posterior: bool = False,
        tile: Sequence[int] | None = None,
        tile_stride: Sequence[int] = (192, 192),
        dtype: str = "float32",
        device: str = "cpu",
        clip: int | None = None,
    ) -> None:
        kind = frozen.dtype_of("codec", dtype)
        path = frozen.local("codec", folder, subfolder, revision, _RELEASE)
        config, tensors = weights.load_folder(path, {"AutoencoderKLWan": lambda config, tensors: (config, tensors)})
        vae = _untrained(config, folder)
        weights.assign(vae, tensors, folder)
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
        super().__init__(vae, kind, mean, std, (4, 8, 8), sample_posterior, tile, tile_stride)
        self.config: dict[str, Any] = {
            "folder": str(folder), "subfolder": subfolder, "revision": revision, "sample_posterior": sample_posterior,
            "tile": tile and list(tile), "tile_stride": list(tile_stride), "dtype": dtype, "clip": clip,
        }  # fmt: skip
        if clip is not None:
            if clip < 2:
                raise ValueError(f"codec.clip={clip}: at least 2 latent frames, or null")
            self.clip, self.fingerprint = clip, hashlib.sha256(f"{self.fingerprint} {clip}".encode()).hexdigest()[:16]
        self.to(device)

    def encode(self, video: Tensor) -> Tensor:
        """As `FrozenVAE.encode`, clip by clip where there are such; one image alone is the start of one."""
        encode = super().encode
        if self.clip is None or video.ndim != 5:
            return encode(video)
        self.latent_frames(video.shape[2])
        return torch.cat([encode(part) for part in video.split(raw_frames(self.clip, self.stride[0]), 2)], 2)

    def stream(self) -> WanDecodeStream:
        """A decoder that takes a clip's latent frames piece by piece; equal to `decode`."""
        return WanDecodeStream(self)


class WanDecodeStream(frozen.VAEDecodeStream):
    """Exact for pieces of any length; it keeps the last input frames of each tile's convolutions, the codec nothing."""

    def __init__(self, codec: WanCodec) -> None:
        super().__init__(codec)
        # diffusers' feat_cache by tile: a table with None where nothing has passed yet, like the list it makes.
        self.past: dict[tuple[int, int], defaultdict[int, Any]] = {}
        self.at = 0  # latent frame within the clip

    def _decode(self, z: Tensor) -> Tensor:
        clip, pieces = self.codec.clip or self.at + z.shape[2] + 1, []
        while z.shape[2]:
            if self.at == 0:
                self.past = {}
            part, z = z[:, :, : clip - self.at], z[:, :, clip - self.at :]
            pieces.append(self._within(part))
            self.at = (self.at + part.shape[2]) % clip
        return torch.cat(pieces, dim=2)

    def _within(self, z: Tensor) -> Tensor:
        codec, (_, h, w) = self.codec, self.codec.stride
        z = codec.vae.post_quant_conv(z)
        height, width = z.shape[3] * h, z.shape[4] * w
        if codec.tile is None or (height <= codec.tile[0] and width <= codec.tile[1]):
            return self._tile((0, 0), z).clamp(-1, 1)
        (rows, columns), (down, right) = codec.tile, codec.tile_stride
        above: list[Tensor] = []
        lines = []
        for y in range(0, height, down):
            part = z[:, :, :, y // h : (y + rows) // h]
            line = [self._tile((y, x), part[..., x // w : (x + columns) // w]) for x in range(0, width, right)]
            # diffusers' order: a tile is blended with its neighbours as they have become.
            for i, tile in enumerate(line):
                tile = codec.vae.blend_v(above[i], tile, rows - down) if above else tile
                line[i] = codec.vae.blend_h(line[i - 1], tile, columns - right) if i else tile
            lines.append(torch.cat([tile[..., :down, :right] for tile in line], dim=-1))
            above = line
        return torch.cat(lines, dim=-2).clamp(-1, 1)

    def _tile(self, place: tuple[int, int], z: Tensor) -> Tensor:
        """One latent frame at a time, which bounds memory, through the decoder with the tile's past."""
        past = self.past.setdefault(place, defaultdict(lambda: None))
        decoder = self.codec.vae.decoder
        return torch.cat([decoder(frame, feat_cache=past, feat_idx=[0]) for frame in z.split(1, dim=2)], dim=2)


def _untrained(config: dict[str, Any], source: str | Path) -> nn.Module:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_config(config)
    own = vae.config
    if len(own.dim_mult) != 4 or sum(own.temperal_downsample) != 2 or own.is_residual or own.patch_size:
        raise ValueError(f"{source} is not shaped as Wan 2.1's VAE: stride (4, 8, 8), no patches as Wan 2.2's has them")
    lengths = len(own.latents_mean), len(own.latents_std)
    if lengths != (own.z_dim, own.z_dim):
        raise ValueError(f"{source}: latents_mean and latents_std have {lengths} values for {own.z_dim} channels")
    return vae
