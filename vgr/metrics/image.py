"""Frame-by-frame agreement of pictures: PSNR and SSIM."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def psnr(frames_FHW3: Pixels, truth_FHW3: Pixels) -> NDArray[np.float64]:
    """PSNR of every frame in dB, (F,), at most 100; a video's value is the mean of these, not of squared errors."""
    import cv2

    pairs = zip(map(np.ascontiguousarray, frames_FHW3), map(np.ascontiguousarray, truth_FHW3), strict=True)
    squares = np.array([cv2.norm(a, b, cv2.NORM_L2SQR) / a.size for a, b in pairs])  # of whole numbers, exact
    return -10 * np.log10(np.maximum(squares / 255**2, 1e-10))


def ssim(frames_FHW3: Pixels, truth_FHW3: Pixels, uniform: bool = False) -> NDArray[np.float64]:
    """SSIM of every frame, (F,): mean over the whole frame and its channels. Forms as in `mean_ssim`."""
    return np.array([mean_ssim(a, b, uniform) for a, b in zip(frames_FHW3, truth_FHW3, strict=True)])


def mean_ssim(a: Pixels, b: Pixels, uniform: bool = False) -> float:
    """SSIM of two pictures (H,W) or (H,W,C), K1 0.01, K2 0.03, range 255.

    A Gaussian window of 11x11 and sigma 1.5 with mirrored borders; uniform: 11x11 weighted equally with borders
    repeated, as SANA-WM's evaluator has it. The two are not comparable.
    """
    import cv2

    def mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
        if uniform:
            return cv2.blur(x, (11, 11), borderType=cv2.BORDER_REFLECT)
        return cv2.GaussianBlur(x, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT_101)

    x, y = a.astype(np.float64), b.astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())
