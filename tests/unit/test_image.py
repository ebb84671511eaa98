import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from vgr.metrics import image


def test_golden_zeros_against_ones():
    black, white = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 255, np.uint8)
    assert image.psnr(black, white)[0] == 0.0
    assert image.ssim(black, white)[0] == pytest.approx(9.999e-05, rel=1e-3)
    assert image.psnr(black, black)[0] == 100.0 and image.ssim(black, black)[0] == 1.0


def test_psnr_is_the_mean_of_decibels_not_of_errors():
    truth = np.full((2, 32, 32, 3), 100, np.uint8)
    video = truth.copy()
    video[0] += 1
    video[1] += 50
    per_frame = image.psnr(video, truth)
    assert per_frame == pytest.approx([20 * np.log10(255), 20 * np.log10(255 / 50)])
    pooled = 10 * np.log10(255**2 / ((1 + 2500) / 2))
    assert per_frame.mean() > pooled + 5


def test_ssim_equals_its_formula():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 255, (1, 40, 50, 3)).astype(np.uint8)
    b = (a * 0.6 + rng.integers(0, 90, a.shape)).astype(np.uint8)
    values = []
    for c in range(3):
        x, y = a[0, ..., c].astype(float), b[0, ..., c].astype(float)
        blur = lambda z: gaussian_filter(z, 1.5, truncate=3.5, mode="mirror")  # noqa: E731
        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert image.ssim(a, b)[0] == pytest.approx(np.mean(values), abs=1e-5)


def test_ssim_is_torchmetrics_and_its_uniform_form_the_formula():
    import torch
    from scipy.ndimage import uniform_filter
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    rng = np.random.default_rng(3)
    a = rng.integers(0, 256, (2, 40, 52, 3), dtype=np.uint8)
    b = (a * 0.7 + rng.integers(0, 60, a.shape)).astype(np.uint8)
    x, y = (torch.from_numpy(z).permute(0, 3, 1, 2).float() for z in (a, b))
    want = theirs(x, y, gaussian_kernel=True, sigma=1.5, data_range=255.0, reduction="none").numpy()
    assert image.ssim(a, b) == pytest.approx(want, abs=1e-5)
    x, y = a[0].astype(float), b[0].astype(float)
    blur = lambda z: uniform_filter(z, (11, 11, 0), mode="reflect")  # noqa: E731
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    formula = ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert image.ssim(a, b, uniform=True)[0] == pytest.approx(formula, abs=1e-9)
