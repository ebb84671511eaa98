"""Networks of other libraries, frozen: what text encoders and video VAEs share.

World model: spec 1.2, 1.3, 6.3; causal video: spec 2.2, 2.4.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgr.seeding import torch_generator
from vgr.types import TextStates, latent_frames

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(key: str, name: str) -> torch.dtype:
    """The dtype that setting <key>.dtype names; ValueError for others than float32 and bfloat16."""
    if name not in _DTYPES:
        raise ValueError(f"{key}.dtype={name}: choose {' or '.join(_DTYPES)}")
    return _DTYPES[name]


def require_source(key: str, folder: str | Path, revision: str | None, release: str) -> None:
    """Refuse (ValueError) what is neither a local folder nor a hub id with a revision; release: where to get it."""
    if not Path(folder).is_dir() and revision is None:
        raise ValueError(
            f"{key}.folder={folder} is no local folder, and a hub id needs {key}.revision (a commit). {release}"
        )


def local(key: str, folder: str | Path, subfolder: str | None, revision: str | None, release: str) -> Path:
    """The folder with config.json and safetensors, fetched if it is a hub id; ValueError as `require_source`."""
    require_source(key, folder, revision, release)
    path = Path(folder)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        inside = f"{subfolder}/" if subfolder else ""
        files = [f"{inside}config.json", f"{inside}*.safetensors"]
        path = Path(snapshot_download(str(folder), revision=revision, allow_patterns=files))
    return path / subfolder if subfolder else path


class FrozenText(nn.Module):
    """Captions to the last hidden states (B,S,J,width) fp32 of a transformers encoder, without gradient.

    The network is not among the module's parameters: optimizers, averages, checkpoints and copies leave it alone,
    `to` moves it. A subclass loads it, unless on the meta device, and gives `_encode`.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.width, self.length = width, length
        self._networks: tuple[nn.Module, ...] = ()

    def _load(
        self, class_name: str, folder: str | Path, revision: str | None, dtype: torch.dtype, device: str,
        begins: bool, tokenizer: str = "AutoTokenizer", inside: tuple[str, str] = ("", ""), **options: Any,
    ) -> None:  # fmt: skip
        """Tokenizer, padding on the right, and network; every weight must be found.

        begins: texts begin with <bos>, else they end with <eos>; class_name, tokenizer: transformers' classes;
        inside: subfolders of tokenizer and network.
        """
        import transformers

        sources = [{"revision": revision, "subfolder": name} for name in inside]
        self.tokenizer = getattr(transformers, tokenizer).from_pretrained(folder, **sources[0])
        self.tokenizer.padding_side = "right"
        null = self.tokenizer.bos_token_id if begins else self.tokenizer.eos_token_id
        if null is None or self.tokenizer.encode("") != [null]:
            where = "begin texts with <bos>" if begins else "end texts with <eos>"
            raise ValueError(f"{folder}: its tokenizer does not {where}, as that of {class_name} does; copy it again")
        network, found = getattr(transformers, class_name).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **sources[1], **options
        )
        missing = sorted(found["missing_keys"])
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} weights of a {class_name}, {missing[:3]}; copy it again")
        if network.config.hidden_size != self.width:
            raise ValueError(f"text.width={self.width}, but {folder} is {network.config.hidden_size} wide: set it so")
        self._networks = (network.to(device).requires_grad_(False).eval(),)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for network in self._networks:
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # frozen: a running average of it is itself

    @torch.no_grad()
    def forward(self, captions: tuple[tuple[str, ...], ...]) -> TextStates:
        """B tuples of S captions to states on the network's device; fewer than S shots are padded with masked rows."""
        row = {text: i for i, text in enumerate(dict.fromkeys(text for clip in captions for text in clip))}
        states, mask = self._encode(list(row))  # each text once
        shots = max(len(clip) for clip in captions)
        rows = torch.tensor([[row[clip[s]] if s < len(clip) else -1 for s in range(shots)] for clip in captions])
        states, mask = F.pad(states, (0, 0, 0, 0, 0, 1))[rows], F.pad(mask, (0, 0, 0, 1))[rows]
        used = int(mask.sum(-1).max())
        return TextStates(states[..., :used, :], mask[..., :used])

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (N,J,width) fp32 and mask (N,J) of N texts."""
        raise NotImplementedError

    def _states(self, texts: Sequence[str], length: int, padding: str = "longest") -> tuple[Tensor, Tensor]:
        """The network's last states (N,J,width) and mask (N,J), texts cut at `length` tokens."""
        (network,) = self._networks
        tokens = self.tokenizer(
            list(texts), padding=padding, max_length=length, truncation=True, return_tensors="pt"
        ).to(network.device)
        with torch.autocast(network.device.type, enabled=False):
            states = network(tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False).last_hidden_state
        return states.float(), tokens.attention_mask.bool()


def to_arrays(text: TextStates) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each sample the states (S,J,D) float16, what `<key>.text.npy` holds, and the lengths (S,) of its shots.

    J is the sample's longest shot; rows that pad a ragged batch are left out. The encoders' last norm bounds their
    states far below float16's limit.
    """
    arrays = []
    for states, mask in zip(text.states, text.mask):
        lengths = mask.sum(-1).cpu()
        shots = int((lengths > 0).sum())
        kept = states[:shots, : int(lengths.max())].half().cpu().numpy()
        arrays.append((kept, lengths[:shots].numpy()))
    return arrays


def from_arrays(arrays: Sequence[tuple[np.ndarray, np.ndarray]]) -> TextStates:
    """The inverse: a batch of cached embeddings, padded and fp32, on the CPU. ValueError where lengths do not fit."""
    for states, lengths in arrays:
        if states.ndim != 3 or lengths.shape != states.shape[:1] or lengths.max(initial=0) > states.shape[1]:
            raise ValueError(f"cached text of shape {states.shape} does not fit its lengths {lengths.tolist()}")
    shots, tokens = (max(states.shape[i] for states, _ in arrays) for i in (0, 1))
    out = torch.zeros(len(arrays), shots, tokens, arrays[0][0].shape[2])
    mask = torch.zeros(len(arrays), shots, tokens, dtype=torch.bool)
    for b, (states, lengths) in enumerate(arrays):
        s, j, _ = states.shape
        own = torch.arange(j) < torch.from_numpy(lengths).unsqueeze(-1)
        mask[b, :s, :j] = own
        out[b, :s, :j] = torch.from_numpy(states).float() * own.unsqueeze(-1)
    return TextStates(out, mask)


class FrozenVAE(nn.Module):
    """A diffusers video VAE as a codec (vgr.types.Codec): z = (mode - mean) / scale per channel.

    vae: with its weights in fp32, put to work in `dtype`; mean, scale (C,); stride (t,h,w); sample_posterior: latents
    drawn from the posterior, by a generator seeded with the clip, instead of its mode; tile, tile_stride: of the axes
    `tile_axes`, None: whole; ValueError unless they are multiples of the stride. A subclass gives `stream`.
    `fingerprint`: sixteen hex digits of configuration, fp32 weights and sample_posterior, equal in either dtype.
    """

    tile_axes: tuple[str, ...] = ("height", "width")  # diffusers' names of what tiles cut
    clip: int | None = None

    def __init__(
        self, vae: nn.Module, dtype: torch.dtype, mean: Tensor, scale: Tensor, stride: tuple[int, int, int],
        sample_posterior: bool, tile: Sequence[int] | None, tile_stride: Sequence[int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.fingerprint = _fingerprint(vae, sample_posterior)
        self.vae = vae.requires_grad_(False).eval()
        self.to(dtype)
        self.stride, self.sample_posterior = stride, sample_posterior
        self.channels = mean.numel()
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1, 1), persistent=False)
        self.tile, self.tile_stride = tile and tuple(tile), tuple(tile_stride)
        self.vae.use_slicing = True
        if self.tile is None:
            return
        axes = self.tile_axes
        own = stride[-len(axes) :]
        sizes_fit = [0 < b < a and a % s == 0 and b % s == 0 for a, b, s in zip(self.tile, self.tile_stride, own)]
        if not len(self.tile) == len(self.tile_stride) == len(axes) or not all(sizes_fit):
            raise ValueError(
                f"codec.tile={list(self.tile)} and codec.tile_stride={list(self.tile_stride)} are ({', '.join(axes)}), "
                f"multiples of the codec's stride {list(own)}, each tile larger than its stride"
            )
        self.vae.enable_tiling(
            **{f"tile_sample_min_{n}": x for n, x in zip(axes, self.tile)},
            **{f"tile_sample_stride_{n}": x for n, x in zip(axes, self.tile_stride)},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """The codec of a local folder or hub id; options as the constructor's."""
        return cls(folder, **options)

    def latent_frames(self, frames: int) -> int:
        """T of F raw frames; ValueError unless F = 1 + n * stride[0], or whole clips."""
        return latent_frames(frames, self.stride[0], self.clip)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """(B,3,F,H,W) in [-1,1] to normalised latents (B,C,T,H/h,W/w), fp32; ValueError on sizes that do not fit.

        With a causal encoder, which released ones are, latent frame 0 is the first image's own.
        """
        _, h, w = self.stride
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3] % h or video.shape[4] % w or 0 in video.shape:
            near = "x".join(str(max(s, round(x / s) * s)) for x, s in zip(video.shape[-2:], (h, w)))
            raise ValueError(
                f"the codec takes (B,3,F,H,W) with height a multiple of {h} and width of {w}, "
                f"got {tuple(video.shape)}; the nearest size is {near}"
            )
        self.latent_frames(video.shape[2])
        with torch.autocast(self.mean.device.type, enabled=False):
            posterior = self.vae.encode(video.to(self.mean.device, self.vae.dtype)).latent_dist
        z = posterior.mode().float()
        if self.sample_posterior:
            # The clip seeds its own draw: the same in any batch, order or process.
            seeds = [int(hashlib.sha256(clip.float().cpu().contiguous().numpy()).hexdigest()[:8], 16) for clip in video]
            noise = [torch.randn(z.shape[1:], generator=torch_generator(0, "posterior", seed)) for seed in seeds]
            z = z + posterior.std.float() * torch.stack(noise).to(z.device)
        return ((z - self.mean) / self.scale).to(video.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B,C,T,H,W) of a clip from its first frame on to video (B,3,F,H*h,W*w), fp32.

        Clip by clip and, along time, piece by piece, so that memory grows only with the video itself.
        """
        return torch.cat([self.stream()(clip) for clip in latents.split(1)])

    def stream(self) -> VAEDecodeStream:
        """A decoder that takes a clip's latent frames piece by piece."""
        raise NotImplementedError


def _fingerprint(vae: nn.Module, sample_posterior: bool) -> str:
    known = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps([known, sample_posterior], sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


class VAEDecodeStream:
    """Streaming decode: call with successive latent frames (B,C,T,H,W), get their raw frames (B,3,F,H,W) fp32.

    The first call gives 1 + (T-1)*t raw frames, later ones T*t; what is kept between them does not grow, and is the
    stream's own. ValueError on latents that do not fit codec or stream. A subclass gives `_decode`.
    """

    least = 1  # latent height and width that the decoder takes

    def __init__(self, codec: Any) -> None:
        self.codec = codec
        self.size: tuple[int, ...] = ()  # B, H, W of the first call

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        codec, shape = self.codec, tuple(latents.shape)
        if len(shape) != 5 or shape[1] != codec.channels or 0 in shape or min(shape[3:]) < self.least:
            raise ValueError(
                f"the codec decodes latents (B,{codec.channels},T,H,W), H and W at least {self.least}; got {shape}"
            )
        size = (shape[0], *shape[3:])
        if size != (self.size or size):
            raise ValueError(f"this stream began with (B,H,W) = {self.size}, got {size}; a stream decodes one clip")
        self.size = size
        z = (latents.to(codec.mean.device).float() * codec.scale + codec.mean).to(codec.vae.dtype)
        with torch.autocast(z.device.type, enabled=False):
            return self._decode(z).float().to(latents.device)

    def _decode(self, z: Tensor) -> Tensor:
        """Raw latents (B,C,T,H,W) in the VAE's dtype to video."""
        raise NotImplementedError
