"""Which stretches of a video are worth training on: a figure for each rule, and its limits (specs/world-model 8).

motion and saturation have the paper's limits, and the cameras' are those it puts on all sets. Its learned judges
(DOVER, UniMatch, a VLM) are left to others; sharpness stands in for the first, with a limit of our own that only
plain blur misses, as have black_bars, frame_rate, upscaling and pose_jump.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vgr.geometry.cameras import fov_deg
from vgr.metrics.shots import detect_cuts, detect_jumps

Limit = tuple[float | None, float | None]

LIMITS: dict[str, Limit] = {
    "frame_rate": (0.95, None),  # the file's over the wanted one: below, pictures would be shown twice
    "upscaling": (None, 1.0),  # the wanted size over the file's
    "blank": (None, 0.3),  # share of frames of one colour
    "black_bars": (None, 0.02),  # share of the picture, after the cut to the wanted shape
    "motion": (0.5, 50.0),  # VMAF's: mean change of blurred luma from frame to frame, of 255, on thumbnails
    "sharpness": (10.0, None),  # variance of the Laplacian of grey levels at the size trained on
    "saturation": (0.0, 180.0),  # mean of HSV's, of 255
    "fov_deg": (25.0, 120.0),  # the narrowest and the widest axis
    "focal_spread": (None, 0.2),  # |fx - fy| over their mean
    "pose_jump": (None, 5.0),  # the largest step, or turn, over the 90th percentile
}
# What the paper asks otherwise of some of its sets; the rest (sekai_walking, miradata, spatialvid) is as above.
PRESETS: dict[str, dict[str, Limit | None]] = {
    "omniworld": {"motion": (0.5, 100.0), "saturation": None}, "sekai_game": {"saturation": None},
    "dl3dv_gs": {"motion": (6.0, 50.0)},
}  # fmt: skip
_BLANK, _STILL, _DARK = 4.0, 0.15, 24  # sd of luma; change of blurred luma; luma of a bar's brightest pixels, of 255
_VMAF_BLUR = np.array([0.054488685, 0.244201342, 0.402619947, 0.244201342, 0.054488685])


class Verdict(NamedTuple):
    """The first rule that is broken, its figure and its limit."""

    rule: str
    value: float
    limit: Limit


def judge(figures: Mapping[str, float | tuple[float, float]], limits: Mapping[str, Limit | None]) -> Verdict | None:
    """The first figure outside its limits, in the order of LIMITS; None if all is well. NaN is outside."""
    for rule in LIMITS:
        limit = limits.get(rule)
        if rule not in figures or limit is None:
            continue
        low, high = limit
        for value in np.atleast_1d(figures[rule]).tolist():
            if not ((low is None or value >= low) and (high is None or value <= high)):
                return Verdict(rule, value, (low, high))
    return None


class Meter:
    """Takes a video's thumbnails (H,W,3) in turn, keeps what the rules need of each, and finds its cuts in pieces.

    frames: contrast, saturation, motion from the frame before (NaN for the first), sharpness (NaN unless measured),
    and dark rows and columns as shares, top, bottom, left, right; (F,8) once `done` was called.
    """

    _PIECE, _BEFORE = 256, 128  # frames searched for cuts at once, and those before them that set the usual distance

    def __init__(self) -> None:
        self.frames, self.cuts = np.zeros((0, 8)), list[int]()
        self._rows: list[list[float]] = []
        self._blurred: NDArray[np.float32] | None = None
        self._small: list[NDArray[np.uint8]] = []
        self._first = 0

    def add(self, thumb_HW3: NDArray[np.uint8], whole_HW3: NDArray[np.uint8] | None = None) -> None:
        """One frame; whole: the same at the size trained on, where sharpness is to be measured."""
        import cv2

        grey = cv2.cvtColor(thumb_HW3, cv2.COLOR_RGB2GRAY)
        blurred = cv2.sepFilter2D(grey, cv2.CV_32F, _VMAF_BLUR, _VMAF_BLUR) * np.float32(219 / 255)  # studio luma
        motion = np.nan if self._blurred is None else float(np.abs(blurred - self._blurred).mean())
        self._blurred = blurred
        sharpness = np.nan
        if whole_HW3 is not None:
            sharpness = cv2.Laplacian(cv2.cvtColor(whole_HW3, cv2.COLOR_RGB2GRAY), cv2.CV_32F, ksize=1).var()
        light_r, light_c = np.percentile(grey, 98, axis=1) > _DARK, np.percentile(grey, 98, axis=0) > _DARK
        bars = [_leading(x) for light in (light_r, light_c) for x in (light, light[::-1])]
        saturation = cv2.cvtColor(thumb_HW3, cv2.COLOR_RGB2HSV)[..., 1].mean()
        self._rows.append([float(grey.std()), float(saturation), motion, float(sharpness), *bars])
        width = max(16, round(48 * grey.shape[1] / grey.shape[0]))
        self._small.append(cv2.resize(thumb_HW3, (width, 48), interpolation=cv2.INTER_AREA))
        if len(self._small) == self._BEFORE + self._PIECE + 4:
            self._find_cuts(self._BEFORE + self._PIECE)
            self._small, self._first = self._small[self._PIECE :], self._first + self._PIECE

    def _find_cuts(self, end: int) -> None:
        start = self._BEFORE if self._first else 0
        small = np.stack(self._small)
        found = sorted({*detect_cuts(small), *detect_jumps(small)})
        self.cuts += [self._first + c for c in found if start <= c < end]

    def done(self) -> None:
        """After the last frame."""
        if self._small:
            self._find_cuts(len(self._small))
        self.frames, self._rows = np.array(self._rows).reshape(-1, 8), []

    def stretches(self, least: int) -> list[tuple[int, int, str]]:
        """Runs of more than `least` frames without content or without any change: first frame, end, rule."""
        contrast, motion = self.frames[:, 0], self.frames[:, 2]
        blank = contrast < _BLANK
        found = [(a, b, "blank") for a, b in runs(blank) if b - a > least]
        return found + [(a, b, "static") for a, b in runs((motion < _STILL) & ~blank) if b - a > least]

    def figures(self, a: int, b: int) -> dict[str, float]:
        """Of frames a (included) to b (excluded), what LIMITS knows of pictures."""
        contrast, saturation, motion, sharpness, *bars = self.frames[a:b].T
        within = np.isin(np.arange(a + 1, b), self.cuts, invert=True)  # a cut is no motion
        top, bottom, left, right = (float(x.min()) for x in bars)
        return {
            "blank": float((contrast < _BLANK).mean()),
            "black_bars": 1 - (1 - min(top + bottom, 1)) * (1 - min(left + right, 1)),
            "motion": float(motion[1:][within].mean()) if within.any() else 0.0,
            "sharpness": float(np.nanmedian(sharpness)) if np.isfinite(sharpness).any() else np.inf,
            "saturation": float(saturation.mean()),
        }


def camera_figures(
    c2w_F44: NDArray[np.float64], k_F4: NDArray[np.float64], size_hw: tuple[int, int]
) -> dict[str, float | tuple[float, float]]:
    """Of one shot's cameras, what LIMITS knows of them; steps below a thousandth of the path are no jumps."""
    fov = fov_deg(torch.from_numpy(k_F4)).numpy()
    fx, fy = k_F4[:, 0] * size_hw[1], k_F4[:, 1] * size_hw[0]
    figures = {
        "fov_deg": (float(fov.min()), float(fov.max())),
        "focal_spread": float((np.abs(fx - fy) / ((fx + fy) / 2)).max()),
    }
    if len(c2w_F44) > 2:
        steps = np.linalg.norm(np.diff(c2w_F44[:, :3, 3], axis=0), axis=1)
        cosine = (np.einsum("fij,fij->f", c2w_F44[:-1, :3, :3], c2w_F44[1:, :3, :3]) - 1) / 2
        turns = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        usual = (np.percentile(steps, 90) + 1e-3 * steps.sum() + 1e-9, np.percentile(turns, 90) + 1.0)
        figures["pose_jump"] = float(max(steps.max() / usual[0], turns.max() / usual[1]))
    return figures


def runs(flags: Iterable[bool]) -> list[tuple[int, int]]:
    """First index and end of every run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(flags, np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _leading(light: NDArray[np.bool_]) -> float:
    """Share of a side's rows that are dark before the first light one."""
    return float(light.argmax() / len(light)) if light.any() else 1.0
