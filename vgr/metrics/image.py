"""Frame-by-frame agreement with the true continuation: PSNR and SSIM."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def psnr(frames_FHW3: NDArray[np.uint8], truth_FHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """PSNR of every frame in dB, (F,), at most 100; a video's value is the mean of these, not of squared errors."""
    error = (frames_FHW3.astype(np.float64) - truth_FHW3.astype(np.float64)) / 255
    return -10 * np.log10(np.maximum((error**2).mean((1, 2, 3)), 1e-10))


def ssim(frames_FHW3: NDArray[np.uint8], truth_FHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """SSIM of every frame, (F,): Gaussian 11x11 window of sigma 1.5, K1 0.01, K2 0.03, range 255.

    Over the whole frame, with mirrored borders.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() for x in (frames_FHW3, truth_FHW3))
    return measure(a, b, gaussian_kernel=True, sigma=1.5, data_range=255.0, reduction="none").double().numpy()
