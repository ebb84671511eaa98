"""Clip features. `clipstats48` needs no weights: 48 fixed space-time statistics of a window of frames.

It is a stand-in for smoke tests, sensitive to colour, detail, motion and order of frames, and blind to
meaning; distances on it are named `fd_clipstats48` and compare only with themselves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NAME = "clipstats48"
SIZE = 48
_HEIGHT, _WIDTH = 48, 64  # every clip is brought to this size, so that sizes do not change the statistics
_FLOOR = 1.0 / 255.0  # one grey level; keeps logarithms finite on still video


def clip_features(frames_FHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The 48 statistics of one window of at least 9 frames, float64 (48,).

    Opponent colours (luma, R - G, (R + G) / 2 - B) after an area resize to 64x48. In order: 12 mean colours of a 2x2
    grid (times 4, so that every entry varies by about one between clips); 3 spatial and 3 temporal standard
    deviations; log mean gradient along 4 directions at 2 scales (8); log mean frame difference at lags 1, 2, 4, 8 at 2
    scales (8); the same at lag 1 on the 2x2 grid (4); normal flow in pixels a frame of the left, right, upper and
    lower half at 2 scales (8); log ratio of second to first time differences at 2 scales (2).
    """
    if frames_FHW3.ndim != 4 or frames_FHW3.shape[-1] != 3 or len(frames_FHW3) < 9:
        raise ValueError(f"clip_features: frames have shape {frames_FHW3.shape}; needs (F, H, W, 3) with 9 or more")
    colour = _opponent(frames_FHW3)
    grid = colour.reshape(len(colour), 2, _HEIGHT // 2, 2, _WIDTH // 2, 3).mean((2, 4))
    parts = [4 * grid.mean(0).ravel(), 4 * colour.std((1, 2)).mean(0), 4 * grid.std(0).mean((0, 1))]
    luma = colour[..., 0]
    half = luma.reshape(len(luma), _HEIGHT // 2, 2, _WIDTH // 2, 2).mean((2, 4))
    scales = (luma, half)
    parts += [_gradients(x) for x in scales]
    parts += [np.array([_log(np.abs(x[k:] - x[:-k]).mean()) for k in (1, 2, 4, 8)]) for x in scales]
    change = np.abs(np.diff(luma, axis=0)).mean(0)
    parts.append(_log(change.reshape(2, _HEIGHT // 2, 2, _WIDTH // 2).mean((1, 3))).ravel())
    parts += [_normal_flow(x) for x in scales]
    parts.append(np.array([_roughness(x) for x in scales]))
    return np.concatenate(parts)


def windows(frames_FHW3: NDArray[np.uint8], length: int) -> list[NDArray[np.uint8]]:
    """Non-overlapping windows of `length` frames from the start; the rest is left out."""
    return [frames_FHW3[i : i + length] for i in range(0, len(frames_FHW3) - length + 1, length)]


def _opponent(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    import cv2

    small = np.stack([cv2.resize(f, (_WIDTH, _HEIGHT), interpolation=cv2.INTER_AREA) for f in frames]) / 255.0
    r, g, b = np.moveaxis(small, -1, 0)
    return np.stack([0.299 * r + 0.587 * g + 0.114 * b, r - g, (r + g) / 2 - b], axis=-1)


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(x + _FLOOR)


def _gradients(x: NDArray[np.float64]) -> NDArray[np.float64]:
    dy, dx = np.gradient(x, axis=(1, 2))
    return np.array([_log(np.abs(d).mean()) for d in (dx, dy, (dx + dy) / 2**0.5, (dx - dy) / 2**0.5)])


def _normal_flow(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares shift along x (left, right half) and y (upper, lower half), mean over frame pairs."""
    dt, middle = np.diff(x, axis=0), (x[1:] + x[:-1]) / 2
    dy, dx = np.gradient(middle, axis=(1, 2))
    h, w = x.shape[1] // 2, x.shape[2] // 2
    halves = [
        (dx, np.s_[:, :, :w]), (dx, np.s_[:, :, w:]), (dy, np.s_[:, :h]), (dy, np.s_[:, h:]),
    ]  # fmt: skip
    flow = [-(d[s] * dt[s]).sum((1, 2)) / ((d[s] ** 2).sum((1, 2)) + _FLOOR) for d, s in halves]
    return np.clip(flow, -2, 2).mean(1)


def _roughness(x: NDArray[np.float64]) -> float:
    first, second = np.diff(x, axis=0), np.diff(x, n=2, axis=0)
    return float(_log(np.abs(second).mean()) - _log(np.abs(first).mean()))
