"""Clip features from networks whose weights the user brings in one folder: I3D for the FVD, VideoMAE (spec 1, 2.2).

An I3D that is not, byte for byte, the published one is refused: TorchScript runs code.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
I3D_BYTES = 51_235_320
WEIGHTS = {
    "fvd": ("i3d_torchscript.pt", f"put i3d_torchscript.pt (51 MB, sha256 {I3D_SHA256}) there, from huggingface.co/"
            "flateon/FVD-I3D-torchscript; no licence is stated beside it, the I3D it converts is Apache-2.0"),
    "fd_videomae": ("videomae", "put config.json and model.safetensors of a VideoMAE classifier there, such as "
                    "huggingface.co/MCG-NJU/videomae-base-finetuned-ssv2 (346 MB, CC BY-NC 4.0)"),
}  # fmt: skip


class Extractor(NamedTuple):
    """A network over clips, uint8 (B,F,H,W,3) of `frames` frames -> float64 (B,D); about: what defines the features."""

    frames: int
    about: dict[str, Any]
    features: Callable[[NDArray[np.uint8]], Array]


def missing(folder: Path) -> dict[str, dict[str, str]]:
    """Metric -> why it has no weights in `folder` and what to do, of those that lack them."""
    return {name: {"why": f"no {folder / file}", "get": how}
            for name, (file, how) in WEIGHTS.items() if not (folder / file).exists()}  # fmt: skip


def load(folder: Path, frames: int, device: str = "cpu") -> dict[str, Extractor]:
    """The extractors whose weights lie in `folder`, by metric. Raises ValueError for a file that is another."""
    lacking, doors = missing(folder), {"fvd": lambda p: load_i3d(p, frames, device),
                                       "fd_videomae": lambda p: load_videomae(p, device)}  # fmt: skip
    return {name: door(folder / WEIGHTS[name][0]) for name, door in doors.items() if name not in lacking}


def load_i3d(
    path: Path, frames: int = 16, device: str = "cpu", sha256: str = I3D_SHA256, size: int = I3D_BYTES
) -> Extractor:
    """The TorchScript I3D of StyleGAN-V's FVD: the 400 logits before softmax, of clips resized and scaled by itself.
    The bytes hashed are the bytes that run. Raises ValueError unless they are `sha256`'s, and below 10 frames."""
    import torch

    if frames < 10:
        raise ValueError(f"fvd.frames={frames}: I3D pools over time and needs 10 or more; published FVDs have 16")
    given = path.stat().st_size
    data = path.read_bytes() if given == size else b""
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        told = f"{given} bytes, not {size}" if given != size else f"sha256 {digest}, not {sha256}"
        raise ValueError(f"{path} is not the published I3D ({told}); it is not run. {WEIGHTS['fvd'][1]}")
    network = torch.jit.load(io.BytesIO(data), map_location=device).eval()

    def features(clips_BFHWC: NDArray[np.uint8]) -> Array:
        x = torch.from_numpy(clips_BFHWC).permute(0, 4, 1, 2, 3).to(device, torch.float32)  # 0 to 255
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            logits = network(x, rescale=True, resize=True, return_features=True)
        return logits.double().cpu().numpy()

    about = {"extractor": "i3d_torchscript", "sha256": digest, "frames": frames, "resize": "its own, bilinear 224x224"}
    return Extractor(frames, about, features)


def load_videomae(folder: Path, device: str = "cpu") -> Extractor:
    """A VideoMAE classifier's pooled features before the classifier, from a transformers folder (safetensors only).

    Frames come to the network's size by antialiased bicubic, whatever their aspect, and are normalised as ImageNet's.
    Raises ValueError naming what does not fit.
    """
    import torch
    from transformers import VideoMAEForVideoClassification

    network, digest = pretrained(
        VideoMAEForVideoClassification, folder, WEIGHTS["fd_videomae"][1], device, spare=("classifier.",)
    )
    network.classifier, config = torch.nn.Identity(), network.config
    mean, sd = (torch.tensor(x, device=device)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    side = config.image_size

    def features(clips_BFHWC: NDArray[np.uint8]) -> Array:
        from torch.nn.functional import interpolate

        x = torch.from_numpy(clips_BFHWC).permute(0, 1, 4, 2, 3).to(device, torch.float32) / 255
        small = interpolate(x.flatten(0, 1), (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.inference_mode():
            pooled = network((small.unflatten(0, x.shape[:2]) - mean) / sd).logits
        return pooled.double().cpu().numpy()

    about = {"extractor": "videomae", "sha256": digest, "frames": config.num_frames,
             "resize": f"antialiased bicubic {side}x{side}"}  # fmt: skip
    return Extractor(config.num_frames, about, features)


def pretrained(
    kind: Any, folder: Path, how: str, device: str, spare: tuple[str, ...] = (), **settings: Any
) -> tuple[Any, str]:
    """A network of transformers and its file's sha256; tensors that begin as one of `spare` may be missing. ValueError
    names what does not fit and `how` to get it."""
    import torch

    try:
        network, told = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            **settings,
        )  # fmt: skip
        if random := sorted(k for k in told["missing_keys"] if not k.startswith(spare)):
            raise ValueError(f"{len(random)} tensors are missing: {random[:3]}")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no {kind.__name__} ({str(error).splitlines()[0]}); {how}") from error
    with (folder / "model.safetensors").open("rb") as file:
        return network.to(device).eval(), hashlib.file_digest(file, "sha256").hexdigest()


def clip_of(
    frames_FHW3: NDArray[np.uint8], length: int, stride: int = 1, chance: np.random.Generator | None = None
) -> NDArray[np.uint8] | None:
    """The clip of a video that StyleGAN-V scores: `length` frames, every `stride`-th, from the first for generated
    videos, from a random one (`chance`) for real ones; None if too short."""
    span = (length - 1) * stride + 1
    if len(frames_FHW3) < span:
        return None
    start = 0 if chance is None else int(chance.integers(len(frames_FHW3) - span + 1))
    return frames_FHW3[start : start + span : stride]
