"""VBench's nine dimensions for videos of one's own, as reducers (spec 6.1), and the quality score SANA-WM prints.

What networks make of a video comes from outside, as arrays: from weights (`vgr.report.judges`), or from anybody's
networks in <key>.features.npz beside the video:

    subject (F,D)          DINO ViT-B/16 class tokens           background (F,D)  CLIP ViT-B/32 image embeddings
    interpolated (n,H,W,3) frames 1, 3, 5, ... made anew from their neighbours (AMT-S)
    flow (P,)              RAFT between frames 1/8 s apart: mean length of its longest twentieth, pixels
    aesthetic (F,)         LAION's linear head on CLIP ViT-L/14, 0 to 10              imaging (F,)  MUSIQ-SPAQ, 0 to 100
    video (S,D), text (S,D), style (S,D)   ViCLIP of the video or its shots, of their prompts, of the style asked for
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# The range a score is scaled from, and its weight in the quality score, None where it is no part of that.
RANGES: dict[str, tuple[float, float, float | None]] = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "overall_consistency": (0.0, 0.364, None),
    "temporal_style": (0.0, 0.364, None),
}
SCORED = {name for name, (_, _, weight) in RANGES.items() if weight is not None}
SHAPES = {"subject": 2, "background": 2, "interpolated": 4, "flow": 1, "aesthetic": 1, "imaging": 1, "video": 2,
          "text": 2, "style": 2}  # fmt: skip


def consistency(features_FD: ArrayLike) -> float:
    """Subject's and background's: mean over frames after the first of half the cosine with the frame before and half
    that with the first, each at least 0. NaN for one frame."""
    x = _unit(features_FD)
    before, first = ((x[1:] * y).sum(1).clip(0) for y in (x[:-1], x[0]))
    return float((before + first).mean() / 2) if len(x) > 1 else float("nan")


def flickering(frames_FHW3: NDArray[np.uint8]) -> float:
    """1 - mean absolute difference of neighbouring frames / 255, meant for scenes that stand still."""
    steps = [np.abs(b.astype(np.int16) - a).mean() for a, b in zip(frames_FHW3, frames_FHW3[1:])]
    return float(1 - np.mean(steps) / 255)


def smoothness(frames_FHW3: NDArray[np.uint8], interpolated_nHW3: NDArray[np.uint8]) -> float:
    """1 - mean absolute difference of the odd frames from those made anew of their neighbours, / 255. A last odd frame,
    which has no right neighbour, is left out. Raises ValueError for another number or size."""
    odd = frames_FHW3[1 : len(frames_FHW3) - 1 : 2]
    if odd.shape != np.shape(interpolated_nHW3):
        raise ValueError(f"interpolated {np.shape(interpolated_nHW3)}: must be frames 1, 3, 5, ..., {odd.shape}")
    off = [np.abs(b.astype(np.int16) - a).mean() for a, b in zip(odd, interpolated_nHW3)]
    return float(1 - np.mean(off) / 255)


def moves(flow_P: ArrayLike, size_hw: tuple[int, int]) -> float:
    """Dynamic degree of one video, 1 or 0: pairs that move by more than 6 pixels of 256 are a quarter of the frames."""
    flow = np.asarray(flow_P, dtype=np.float64)
    return float((flow > 6 * min(size_hw) / 256).sum() >= round(4 * (len(flow) + 1) / 16))


def alignment(video_SD: ArrayLike, text_SD: ArrayLike) -> float:
    """Overall consistency and temporal style: mean cosine of the embeddings of video (or shots) and text."""
    return float((_unit(video_SD) * _unit(text_SD)).sum(1).mean())


def scores(frames_FHW3: NDArray[np.uint8], given: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """The dimensions of a video that what is `given` (see above) allows, unscaled, and `vbench_quality` where all its
    seven are there. All frames count, the given first one too, as VBench counts them. ValueError names what is wrong.
    """
    count = len(frames_FHW3)
    for name, x in given.items():
        if name not in SHAPES or np.ndim(x) != SHAPES[name] or not len(x) or not np.isfinite(x).all():
            raise ValueError(f"features {name} {np.shape(x)}: known, finite and not empty are {', '.join(SHAPES)}, of "
                             f"{SHAPES.get(name, 'other')} dimensions")
        if name in ("subject", "background", "aesthetic", "imaging") and len(x) != count:
            raise ValueError(f"features {name} has {len(x)} rows; the video has {count} frames")
    found = {"temporal_flickering": flickering(frames_FHW3)}
    reducers: dict[str, tuple[str, Callable[[NDArray[Any]], float]]] = {
        "subject": ("subject_consistency", consistency), "background": ("background_consistency", consistency),
        "interpolated": ("motion_smoothness", lambda x: smoothness(frames_FHW3, x)),
        "flow": ("dynamic_degree", lambda x: moves(x, frames_FHW3.shape[1:3])),
        "aesthetic": ("aesthetic_quality", lambda x: float(np.mean(x)) / 10),
        "imaging": ("imaging_quality", lambda x: float(np.mean(x)) / 100),
    }  # fmt: skip
    if "video" in given:
        reducers |= {name: (dimension, lambda x: alignment(given["video"], x))
                     for name, dimension in (("text", "overall_consistency"), ("style", "temporal_style"))}  # fmt: skip
    found |= {dimension: reduce(given[name]) for name, (dimension, reduce) in reducers.items() if name in given}
    return found | ({"vbench_quality": quality(found)} if found.keys() >= SCORED else {})


def quality(found: Mapping[str, float]) -> float:
    """VBench's quality score x 100, which is SANA-WM's "VBench Overall": the weighted mean of the seven dimensions,
    each scaled from its range. Linear: the mean over videos is the score of the means. KeyError where one lacks."""
    parts = [(w, (found[name] - low) / (high - low)) for name, (low, high, w) in RANGES.items() if w is not None]
    return 100 * sum(w * x for w, x in parts) / sum(w for w, _ in parts)


def _unit(x: ArrayLike) -> Array:
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
