"""LTX-2's video VAE as a codec: diffusers' `AutoencoderKLLTX2Video` by composition (spec 1.2, 6.3, 12.8).

Latents are normalised, z = (mode - mean) * scaling_factor / std per channel. With a causal decoder (the release's
`ltx2_causal_vae/`) decoding in pieces, of any lengths, equals decoding at once: every convolution keeps its last two
input frames, and up-samplers drop their first frame only at the start. With a decoder that looks ahead (the
release's `vae/`) a piece is decoded after the last four latent frames before it and without what follows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgr.models import weights
from vgr.nn import frozen

_RELEASE = (
    "The released VAEs (about 2.5 GB each, LTX-2 community licence) are vae/ of Efficient-Large-Model/"
    "SANA-WM_bidirectional and, for exact streaming, ltx2_causal_vae/ of SANA-WM_streaming"
)
_PIECE = 4  # latent frames a causal decoder takes at once: bounds memory, changes nothing
_CONTEXT = 4  # latent frames a decoder that looks ahead sees before a streamed piece: the overlap of released tiles


class LTX2Codec(frozen.FrozenVAE):
    """Video (B,3,F,H,W) in [-1, 1] to latents (B,C,T,H/h,W/w) with T = 1 + (F-1)/t; stride (t,h,w) as configured.

    folder: a local folder with config.json and safetensors, or a hub id, which needs a revision; subfolder: inside it.
    sample_posterior: latents drawn from the posterior, by a generator seeded with the clip, instead of its mode.
    tile, tile_stride: (frames, height, width) of the pieces in which long and large videos are encoded and blended,
        and decoded unless the decoder is causal; None: whole. dtype: of weights and activations; latents and video
        are fp32, not clamped, and stay on the device they came from. device: where the weights go first.
    `causal` tells whether streaming is exact; `fingerprint` is that of configuration, weights and sample_posterior.
    Raises ValueError or OSError for folders, weights and settings that do not fit.
    """

    tile_axes = ("num_frames", "height", "width")

    def __init__(
        self,
        folder: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        sample_posterior: bool = False,
        tile: Sequence[int] | None = (96, 512, 512),
        tile_stride: Sequence[int] = (64, 448, 448),
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        kind = frozen.dtype_of("codec", dtype)
        path = frozen.local("codec", folder, subfolder, revision, _RELEASE)
        config, tensors = weights.load_folder(path, _ADAPTERS)
        vae = _untrained(config, folder)
        weights.assign(vae, tensors, folder)
        scale = tensors["latents_std"].float() / vae.config.scaling_factor
        stride = _stride(vae.config)
        super().__init__(vae, kind, tensors["latents_mean"], scale, stride, sample_posterior, tile, tile_stride)
        self.config: dict[str, Any] = {
            "folder": str(folder), "subfolder": subfolder, "revision": revision, "sample_posterior": sample_posterior,
            "tile": tile and list(tile), "tile_stride": list(tile_stride), "dtype": dtype,
        }  # fmt: skip
        self.causal: bool = vae.decoder.is_causal
        vae.temporal_compression_ratio, vae.spatial_compression_ratio, _ = stride
        vae.use_framewise_decoding = self.tile is not None  # what diffusers asks when it encodes, not decodes
        self.to(device)

    def stream(self) -> LTX2DecodeStream:
        """A decoder that takes a clip's latent frames piece by piece; equal to `decode` where `causal`."""
        return LTX2DecodeStream(self)

    def _windows(self, z: Tensor) -> Tensor:
        """Raw latents (B,C,T,H,W) through a decoder that looks ahead, in overlapping windows blended along time.

        diffusers' own loop drops each window's last frame where the first is the double, so all after the first
        boundary comes a frame late and is blended with its neighbour; the released code drops the first, as here.
        """
        t = self.stride[0]
        if self.tile is None or z.shape[2] <= self.tile[0] // t + 1:
            return self._window(z)
        size, step = self.tile[0] // t + 1, self.tile_stride[0] // t
        overlap = self.tile[0] - self.tile_stride[0]
        pieces: list[Tensor] = []
        before = None
        for start in range(0, z.shape[2] - 1, step):
            video = self._window(z[:, :, start : start + size])
            if before is not None:
                video = self.vae.blend_t(before, video[:, :, 1:], overlap)
            pieces.append(video[:, :, : step * t + (start == 0)])
            before = video
        return torch.cat(pieces, dim=2)

    def _window(self, z: Tensor) -> Tensor:
        _, h, w = self.stride
        if self.tile is not None and (z.shape[3] * h > self.tile[1] or z.shape[4] * w > self.tile[2]):
            return self.vae.tiled_decode(z, None).sample
        return self.vae.decoder(z, None)


class LTX2DecodeStream(frozen.VAEDecodeStream):
    """Exact where `codec.causal`; else a piece's last frames, which would look at the next, differ from a whole's."""

    least = 2  # the decoder reflects at the edges

    def __init__(self, codec: LTX2Codec) -> None:
        super().__init__(codec)
        self.started = False
        self.past: dict[nn.Module, Tensor] = {}  # last input frames of each causal convolution
        self.context: Tensor | None = None  # last latents, for a decoder that looks ahead

    def _decode(self, z: Tensor) -> Tensor:
        if self.codec.causal:
            return torch.cat([self._causal(piece).float() for piece in z.split(_PIECE, dim=2)], dim=2)
        return self._looking_ahead(z)

    def _looking_ahead(self, z: Tensor) -> Tensor:
        known = 0
        if self.context is not None:
            known = 1 + (self.context.shape[2] - 1) * self.codec.stride[0]
            z = torch.cat([self.context, z], dim=2)
        self.context = z[:, :, -_CONTEXT:].clone()
        return self.codec._windows(z)[:, :, known:]

    def _causal(self, z: Tensor) -> Tensor:
        """The decoder's modules in their order, convolutions and up-samplers with what came before."""
        decoder = self.codec.vae.decoder
        x = self._conv(decoder.conv_in, z)
        for block in decoder.mid_block.resnets:
            x = self._resnet(block, x)
        for up in decoder.up_blocks:
            if up.conv_in is not None:
                x = self._resnet(up.conv_in, x)
            for upsampler in up.upsamplers or ():
                x = self._upsample(upsampler, x)
            for block in up.resnets:
                x = self._resnet(block, x)
        x = self._conv(decoder.conv_out, decoder.conv_act(decoder.norm_out(x)))
        self.started = True
        # Patches list width before height, unlike the up-samplers' blocks.
        p, p_t = decoder.patch_size, decoder.patch_size_t
        return _unfold(x.unflatten(1, (-1, p_t, p, p)).transpose(3, 4).flatten(1, 4), (p_t, p, p))

    def _conv(self, conv: nn.Module, x: Tensor) -> Tensor:
        reach = conv.kernel_size[0] - 1
        past = self.past[conv] if self.started else x[:, :, :1].expand(-1, -1, reach, -1, -1)
        x = torch.cat([past, x], dim=2)
        self.past[conv] = x[:, :, -reach:].clone()  # a slice would keep the whole input alive
        return conv.conv(x)

    def _resnet(self, block: nn.Module, x: Tensor) -> Tensor:
        y = self._conv(block.conv1, block.nonlinearity(block.norm1(x)))
        y = self._conv(block.conv2, block.nonlinearity(block.norm2(y)))
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(block.norm3(x.movedim(1, -1)).movedim(-1, 1))
        return x + y

    def _upsample(self, upsampler: nn.Module, x: Tensor) -> Tensor:
        stride = upsampler.stride
        y = _unfold(self._conv(upsampler.conv, x), stride)
        if upsampler.residual:
            y = y + _unfold(x, stride).repeat(1, math.prod(stride) // upsampler.upscale_factor, 1, 1, 1)
        return y if self.started else y[:, :, stride[0] - 1 :]


def _unfold(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Channels to space and time: (B,C*t*h*w,T,H,W) to (B,C,T*t,H*h,W*w)."""
    x = x.unflatten(1, (-1, *stride)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _stride(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(t,h,w) of the down-samplers; configurations need not state it, and diffusers' default is another's."""
    kinds, scaling = config["downsample_type"], config["spatio_temporal_scaling"]
    used = [k for k, scaled in zip(kinds, [scaling] * len(kinds) if isinstance(scaling, bool) else scaling) if scaled]
    t = config["patch_size_t"] * 2 ** sum(k != "spatial" for k in used)
    h = config["patch_size"] * 2 ** sum(k != "temporal" for k in used)
    return t, h, h


def _untrained(config: dict[str, Any], source: str | Path) -> nn.Module:
    from diffusers import AutoencoderKLLTX2Video

    noise = config.get("decoder_inject_noise", False)
    if config.get("timestep_conditioning") or (any(noise) if isinstance(noise, list) else noise):
        raise ValueError(
            f"{source}: this decoder wants a timestep or noise of its own (timestep_conditioning, "
            "decoder_inject_noise); the codec takes decoders without, as LTX-2's are"
        )
    return AutoencoderKLLTX2Video.from_config(config)


def _from_release(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`ltx2_causal_vae/`: the same modules; its kinds of up-samplers, where given, are listed from the output back."""
    config = {k: v for k, v in config.items() if k != "gradient_checkpointing"}
    kinds = config.pop("decoder_upsample_type", None)
    return config | ({"upsample_type": kinds[::-1]} if kinds else {}), tensors


_ADAPTERS: dict[str, weights.Adapter] = {
    "AutoencoderKLLTX2Video": lambda config, tensors: (config, tensors),
    "AutoencoderKLCausalLTX2Video": _from_release,
}
