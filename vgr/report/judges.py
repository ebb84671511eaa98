"""Networks that judge single frames, by weights the user brings: LPIPS, DINO and CLIP (specs/benchmarks 1, 3, 6).

LPIPS is the lpips package's own, heads included; the file is its AlexNet. DINO and CLIP are transformers folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.metrics.extractors import pretrained

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
Frames = NDArray[np.uint8]
ALEXNET = "7be5be79"  # torchvision names its files by the first of their sha256
WEIGHTS = {
    "lpips": (f"alexnet-owt-{ALEXNET}.pth", "put it there from download.pytorch.org/models (233 MB, BSD-3-Clause)"),
    "dino": ("dino", "put config.json and model.safetensors of huggingface.co/facebook/dino-vitb16 there (343 MB, "
             "Apache-2.0), or give subject in <key>.features.npz"),
    "clip": ("clip", "put config.json, model.safetensors and the tokenizer's files of huggingface.co/openai/"
             "clip-vit-base-patch32 there (605 MB, MIT), or give background in <key>.features.npz"),
}  # fmt: skip
OF = {"lpips": "lpips", "subject_consistency": "dino", "background_consistency": "clip", "clip_score": "clip"}
_AT_ONCE = 16  # frames


class Judge(NamedTuple):
    """about: what defines the numbers; frames: uint8 (F,H,W,3), of lpips two of them, to (F,D), of lpips (F,); text:
    captions to (S,D), of clip alone."""

    about: dict[str, Any]
    frames: Callable[..., Array]
    text: Callable[[list[str]], Array] | None = None


def missing(folder: Path) -> dict[str, dict[str, str]]:
    """Metric -> why it has no weights in `folder` and what to do, of those that lack them."""
    lacking = {name: told for name, told in WEIGHTS.items() if not (folder / told[0]).exists()}
    return {metric: {"why": f"no {folder / lacking[name][0]}", "get": lacking[name][1]}
            for metric, name in OF.items() if name in lacking}  # fmt: skip


def load(folder: Path, device: str = "cpu") -> dict[str, Judge]:
    """The judges whose weights lie in `folder`, by name. Raises ValueError for files that are others."""
    doors = {"lpips": load_lpips, "dino": load_dino, "clip": load_clip}
    return {name: door(folder / WEIGHTS[name][0], device) for name, door in doors.items()
            if (folder / WEIGHTS[name][0]).exists()}  # fmt: skip


def load_lpips(path: Path, device: str = "cpu", digest: str = ALEXNET) -> Judge:
    """LPIPS 0.1 on torchvision's AlexNet, at full size. Raises ValueError unless the file's sha256 begins so."""
    import lpips
    import torch

    from vgr.models.weights import read_tensors

    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digest):
        raise ValueError(f"{path} is another file (sha256 {found}, not {digest}...); {WEIGHTS['lpips'][1]}")
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    stored = read_tensors(path)
    for name, tensor in network.net.named_parameters():  # slice2.3.weight of lpips is features.3.weight
        tensor.data.copy_(stored[f"features.{name.split('.', 1)[1]}"])
    network.to(device).eval()

    def distances(a_FHW3: Frames, b_FHW3: Frames) -> Array:
        with torch.inference_mode():
            parts = [network(2 * _unit_range(a, device) - 1, 2 * _unit_range(b, device) - 1)
                     for a, b in zip(_groups(a_FHW3), _groups(b_FHW3), strict=True)]  # fmt: skip
        return torch.cat(parts).flatten().double().cpu().numpy()

    return Judge({"network": "lpips 0.1, alex", "sha256": found, "resize": "none"}, distances)


def load_dino(folder: Path, device: str = "cpu") -> Judge:
    """DINO's class token as VBench takes it: shorter side 224, whole picture, no antialiasing, ImageNet's range."""
    import torch
    from torchvision.transforms import functional as tv
    from transformers import ViTModel

    network, digest = pretrained(ViTModel, folder, WEIGHTS["dino"][1], device, add_pooling_layer=False)
    side = network.config.image_size

    def tokens(frames_FHW3: Frames) -> Array:
        parts = []
        for group in _groups(frames_FHW3):
            x = tv.resize(_unit_range(group, device), [side], tv.InterpolationMode.BILINEAR, antialias=False)
            x = tv.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            with torch.inference_mode():
                parts.append(network(x, interpolate_pos_encoding=True).last_hidden_state[:, 0])
        return torch.cat(parts).double().cpu().numpy()

    return Judge({"network": "dino", "sha256": digest, "resize": f"bilinear, shorter side {side}"}, tokens)


def load_clip(folder: Path, device: str = "cpu") -> Judge:
    """CLIP's embeddings of frames (bicubic, centre crop) and of captions, cut to the length it reads."""
    import torch
    from torchvision.transforms import functional as tv
    from transformers import AutoTokenizer, CLIPModel

    network, digest = pretrained(CLIPModel, folder, WEIGHTS["clip"][1], device)
    side, length = network.config.vision_config.image_size, network.config.text_config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def frames(frames_FHW3: Frames) -> Array:
        parts = []
        for group in _groups(frames_FHW3):
            x = tv.resize(_unit_range(group, device), [side], tv.InterpolationMode.BICUBIC, antialias=True)
            x = tv.center_crop(x.clamp(0, 1), [side])
            x = tv.normalize(x, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
            with torch.inference_mode():
                parts.append(network.visual_projection(network.vision_model(x).pooler_output))
        return torch.cat(parts).double().cpu().numpy()

    def text(captions: list[str]) -> Array:
        given = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        with torch.inference_mode():
            pooled = network.text_model(given.input_ids, attention_mask=given.attention_mask).pooler_output
            return network.text_projection(pooled).double().cpu().numpy()

    about = {"network": "clip", "sha256": digest, "resize": f"bicubic, shorter side {side}, centre crop"}
    return Judge(about, frames, text)


def _groups(frames_FHW3: Frames) -> list[Frames]:
    return [frames_FHW3[i : i + _AT_ONCE] for i in range(0, len(frames_FHW3), _AT_ONCE)]


def _unit_range(frames_FHW3: Frames, device: str) -> Tensor:
    import torch

    return torch.from_numpy(frames_FHW3).permute(0, 3, 1, 2).to(device, torch.float32) / 255
