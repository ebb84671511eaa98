"""Frame-by-frame agreement with the true continuation: PSNR, SSIM and, where its weights are at hand,
LPIPS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"  # the suffix is the start of the file's sha256
_CAP_DB = 100.0


def psnr(
    frames_FHW3: NDArray[np.uint8], truth_FHW3: NDArray[np.uint8], data_range: float = 255.0
) -> NDArray[np.float64]:
    """PSNR of every frame in dB, (F,), at most 100; a video's value is the mean of these, not of squared
    errors.
    """
    _same_shape(frames_FHW3, truth_FHW3)
    error = (frames_FHW3.astype(np.float64) - truth_FHW3.astype(np.float64)) / data_range
    mse = (error**2).mean(axis=tuple(range(1, error.ndim)))
    return -10 * np.log10(np.maximum(mse, 10 ** (-_CAP_DB / 10)))


def ssim(frames_FHW3: NDArray[np.uint8], truth_FHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """SSIM of every frame, (F,): Gaussian 11x11 window of sigma 1.5, K1 0.01, K2 0.03, range 255.

    Over the whole frame, with mirrored borders.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    _same_shape(frames_FHW3, truth_FHW3)
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() for x in (frames_FHW3, truth_FHW3))
    return measure(a, b, gaussian_kernel=True, sigma=1.5, data_range=255.0, reduction="none").double().numpy()


def lpips_backbone(folder: Path | None = None) -> Path | None:
    """The AlexNet file LPIPS stands on, if it lies in torch hub's checkpoint folder (or `folder`) and is
    intact.
    """
    if folder is None:
        import torch

        folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / LPIPS_BACKBONE
    if not path.is_file():
        return None
    expected = LPIPS_BACKBONE.split("-")[-1].split(".")[0]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path if digest.startswith(expected) else None


def lpips_measure(backbone: Path) -> Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.float64]]:
    """A function (frames, truth) -> LPIPS v0.1 with AlexNet of every frame, (F,), inputs scaled to [-1,
    1].
    """
    import lpips
    import torch

    model = lpips.LPIPS(net="alex", pretrained=True, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    weights = torch.load(backbone, map_location="cpu", weights_only=True)
    loaded = 0
    for part in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4, model.net.slice5):
        for name, parameter in part.named_parameters():
            parameter.copy_(weights[f"features.{name}"])
            loaded += 1
    if loaded != 10:
        raise ValueError(f"{backbone.name}: {loaded} of 10 AlexNet tensors matched; this lpips version is not known")

    def measure(frames: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.float64]:
        _same_shape(frames, truth)
        a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2) / 127.5 - 1 for x in (frames, truth))
        with torch.inference_mode():
            return model(a, b).flatten().double().numpy()

    return measure


def _same_shape(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
    if a.shape != b.shape:
        raise ValueError(f"video of shape {a.shape} against {b.shape}; frame count and size must agree")
